"""``ModelState``: a name for everything that K and V depend on beside the tokens.

Weights, adapters, hooks, replaced code, plain attributes, training mode, autocast. Pages computed under one
name are never found under another. A look is taken where a text is opened and where pages are about to be
sealed; what happens in between costs nothing. ``docs/model-state.md`` says which changes are seen at once,
which within a bound, and which must be told (``weights_changed``).
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
import sys
import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

from kvhybrid._core import holds
from kvhybrid.model.original import is_ours, replaced
from kvhybrid.model.watch.changing import Changing
from kvhybrid.model.watch.classes import plain_function
from kvhybrid.model.watch.module_scan import ModuleScan
from kvhybrid.model.watch.objects import objects
from kvhybrid.model.watch.optimizer_steps import unwatch_optimizers, watch_optimizers
from kvhybrid.model.watch.weight_watch import WeightWatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedModel

    from kvhybrid.model.watch.objects import Number

# How configurations call the share of attention weights that are dropped in training.
ATTENTION_RATES: Final = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
# Forward passes that are watched to learn which attributes the model writes itself.
LEARNING_PASSES: Final = 4
# Names that are remembered though more counted when they were given.
MOST_NAMES: Final = 64

# One count for the process: weights that were not recognised never get a number that others had.
_epochs: Final = itertools.count(1)
_states: Final[weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[ModelState]]] = (
    weakref.WeakKeyDictionary()
)
_making: Final = threading.RLock()
# Weights of models that no one watches any more, as they were last, with their epochs. Keeps none of them
# alive.
_remembered: Final[weakref.WeakKeyDictionary[torch.nn.Module, tuple[int, WeightWatch]]] = (
    weakref.WeakKeyDictionary()
)
# Names what cannot be told apart by value in another process, where the same number means something else.
_process: Final = secrets.token_hex(16)


class StateName(NamedTuple):
    """What a forward pass of the calling thread computes: with equal names, the same K and V for a text."""

    epoch: int
    """Changes with the numbers in the weights, and never comes back."""
    facts: str
    """A digest of modules, hooks, attributes and adapters. The same again when these are as they were."""
    precision: str
    """Autocast and the precision of products, as the calling thread has set them."""

    changes: int = 0
    """How many changes looks had found by then. Not part of the name: what comes back has its name again."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StateName) and self[:3] == other[:3]

    def __ne__(self, other: object) -> bool:
        return not self == other  # a tuple's own would count the changes

    def __hash__(self) -> int:
        return hash(self[:3])

    def is_unchanged_since(self, before: StateName) -> bool:
        """Return whether the model has this name and no look found another one in between."""
        return self == before and self.changes == before.changes

    @property
    def parts(self) -> tuple[str, ...]:
        """The name as parts of a namespace's, the epoch first."""
        return str(self.epoch), self.facts, self.precision


class ModelState:
    """Watches one model for all that use it. Made by ``of``; looks of several threads follow one another."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self.epoch = next(_epochs)
        self._lock = threading.RLock()
        self._is_looking = False
        self._told = self._told_before = 0
        self._scan: ModuleScan | None = None
        self._watch: WeightWatch | None = None
        self._watched: frozenset[int] = frozenset()
        self._held: dict[int, tuple[object, Number]] = {}
        self._facts = self._described = ""
        self._known_as: dict[str, str] = {}  # digests of what is described now, and the names of before
        self._tuners: list[Any] = []
        self._droppers: list[torch.nn.Module] = []
        self._fingerprint: tuple[int, str] | None = None
        self._changing = Changing()
        self._passes = 0
        self._users = 0
        self._seen, self._changes = (0, ""), 0
        self.latest = StateName(0, "", "")
        """The name that the last look found, of whatever thread."""
        watch_optimizers(self)
        self.look()

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelState:
        """Return the state of ``model``: the same one for all that use it at a time."""
        with _making:
            known = _states.get(model)
            state = known() if known is not None else None
            if state is None:
                state = cls(model)
                _states[model] = weakref.ref(state)
            state._users += 1
            return state

    def leave(self) -> None:
        """End one use of the state. After the last one the weights are remembered for the next."""
        with _making:
            self._users -= 1
            model = self._model()
            if self._users > 0 or model is None:
                return
            _states.pop(model, None)
            unwatch_optimizers(self)
            if self.look() is not None and self._watch is not None:
                self._watch.release()
                _remembered[model] = self.epoch, self._watch
            self._scan = self._watch = None
            self._watched = frozenset()

    @property
    def model(self) -> PreTrainedModel:
        """The model, which whoever uses its state keeps alive."""
        model = self._model()
        assert model is not None, "the model is gone"
        return model

    def look(self, tokens: npt.NDArray[np.int64] | None = None) -> StateName | None:
        """Compare the model with how it was, and return its name now.

        ``tokens``: those of a text that is being opened; their rows of the input embedding are compared, too.
        Returns None when asked by a finalizer or a signal handler in the middle of a look of the same thread:
        the caller then shares nothing.
        """
        precision = _precision()
        with self._lock:
            if self._is_looking:
                return None
            self._is_looking = True
            try:
                self._look(tokens)
            finally:
                self._is_looking = False
            if (seen := (self.epoch, self._facts)) != self._seen:
                self._seen, self._changes = seen, self._changes + 1
            self.latest = StateName(*seen, precision, self._changes)
            return self.latest

    def _look(self, tokens: npt.NDArray[np.int64] | None) -> None:
        scan, told = self._scan, self._told
        if scan is None or not scan.is_exact or not holds(*scan.holds_arguments()):
            scan = self._scanned()
        watch = self._watch
        is_same = (
            watch is not None
            and told == self._told_before
            and (scan is self._scan or self._has_same_tensors(watch, scan))
            and watch.is_same()
            and (tokens is None or watch.has_same_rows(tokens))
        )
        self._scan, self._told_before = scan, told
        if is_same:
            return
        epoch, watch = _remembered.pop(self.model, (0, None)) if self._watch is None else (0, None)
        if watch is None or not watch.resume(scan.tensors):
            epoch, watch = next(_epochs), self._new_watch(scan)
        self._watch, self.epoch = watch, epoch
        self._watched = frozenset(map(id, watch.tensors))

    def _scanned(self) -> ModuleScan:
        scan = self._scan_with()
        self._held = scan.held
        self._described = _digest(scan)
        self._facts = self._known_as.get(self._described, self._described)
        self._tuners = list(_tuners(scan.modules))
        self._droppers = [module for module in scan.modules if _can_drop(module)] + self._tuners
        return scan

    def _scan_with(self, **options: Any) -> ModuleScan:
        model = self.model
        return ModuleScan(
            model, changing=self._changing, held=self._held, is_ours=is_ours, own=replaced(model), **options
        )

    def _has_same_tensors(self, watch: WeightWatch, scan: ModuleScan) -> bool:
        """Return whether a scan found the tensors that are watched, or others in the very same places."""
        tensors = [tensor for tensor in scan.tensors if not tensor.is_meta]
        if len(tensors) != len(watch.tensors):
            return False
        if all(a is b for a, b in zip(tensors, watch.tensors, strict=True)):
            return True
        return places(tensors) == places(watch.tensors)

    def _new_watch(self, scan: ModuleScan) -> WeightWatch:
        embedding = getattr(self.model.get_input_embeddings(), "weight", None)
        return WeightWatch(scan.tensors, embedding if isinstance(embedding, torch.Tensor) else None)

    def survey(self) -> None:
        """Find adapters, hooks and dropout among the modules. Weights are not looked at."""
        with self._lock:
            scan = self._scan
            if not self._is_looking and (
                scan is None or not scan.is_exact or not holds(*scan.holds_arguments())
            ):
                before = self._watch
                self._scan = scan = self._scanned()
                if before is not None and not self._has_same_tensors(before, scan):
                    self.weights_changed()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Learn from the forward pass inside which plain attributes the model writes itself.

        They describe the last pass, so they are left out of what names the model. A few passes are enough,
        and again a few after ``suspect``.
        """
        if self._passes >= LEARNING_PASSES:
            yield
            return
        if not self._passes:
            self._changing.start()
        self._passes += 1
        before = self._scan_with()
        yield
        with self._lock:
            if self._changing.learn(before, self._scan_with()):
                self._keep_name(before)

    def _keep_name(self, before: ModuleScan) -> None:
        """Call the model what it was called, though less of it counts from now on: it has not changed."""
        if _digest(before) == self._described:
            self._known_as[_digest(self._scan_with())] = self._facts
            while len(self._known_as) > MOST_NAMES:
                self._known_as.pop(next(iter(self._known_as)))

    def suspect(self) -> None:
        """Learn from the next passes again: while a text was computed, the model has become another."""
        self._passes = 0

    def weights_changed(self) -> None:
        """Take the weights for others from now on. Takes no lock."""
        self._told = next(_epochs)

    def uses(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Return whether the model has one of these tensors among its weights."""
        watched = self._watched
        return any(id(tensor) in watched for tensor in tensors)

    @property
    def drops_out(self) -> bool:
        """True when a forward pass now would drop anything at random.

        Asked of every module: a fresh adapter is in training mode inside a model that is not.
        """
        if any(module.training and _rate(module) for module in self._droppers):
            return True
        model = self.model
        if not model.training:
            return False
        config = model.config.get_text_config()
        return any(getattr(config, name, 0) for name in ATTENTION_RATES)

    @property
    def mixes_adapters(self) -> bool:
        """True while adapters are chosen row by row (peft's ``adapter_names``): by hooks on its layers."""
        return any(tuner._forward_pre_hooks for tuner in self._tuners)

    @property
    def has_prompt_tuning(self) -> bool:
        """True when peft puts learned tokens or K and V of its own in front of every text."""
        # Such an adapter shows on the model itself by this one method that is no longer its own.
        owner = getattr(self.model.prepare_inputs_for_generation, "__self__", None)
        return bool(getattr(getattr(owner, "active_peft_config", None), "is_prompt_learning", False))

    def fingerprint(self) -> str:
        """Return a digest of every weight's bytes and of all else that K and V depend on.

        Equal on another machine, but where code was replaced by what no file holds. Reads the whole model
        once an epoch.
        """
        with self._lock:
            name = self.look()
            if name is None:
                return secrets.token_hex(16)
            if self._fingerprint is None or self._fingerprint[0] != name.epoch:
                digest = hashlib.sha256(type(self.model).__name__.encode())
                for key, tensor in itertools.chain(self.model.named_parameters(), self.model.named_buffers()):
                    digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
                    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
                self._fingerprint = name.epoch, digest.hexdigest()
            facts = self._scan_with(name=_portable).facts
        return hashlib.sha256(f"{self._fingerprint[1]} {facts!r} {name.precision}".encode()).hexdigest()[:32]


def _digest(scan: ModuleScan) -> str:
    return hashlib.blake2b(repr(scan.facts).encode(), digest_size=16).hexdigest()


def places(tensors: Iterable[torch.Tensor]) -> list[object]:
    """Return where and how tensors lie. Kinds that keep their numbers elsewhere are named by identity."""
    return [
        (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors
    ]


def _portable(item: object, _: dict[int, tuple[object, Number]]) -> object:
    """Return a name for an object that means the same in another process: where its file has it, by that."""
    module, name = getattr(item, "__module__", None), getattr(item, "__qualname__", None)
    if isinstance(module, str) and isinstance(name, str):
        found: object = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, "__dict__", {}).get(part)
        if item in (found, plain_function(found), getattr(found, "__wrapped__", None)):
            return f"{module}:{name}"
    return _process, id(item)


def _can_drop(module: torch.nn.Module) -> bool:
    return "Dropout" in type(module).__name__


def _rate(module: Any) -> float:
    """Return how much a module, dropout or one of peft's layers, drops while it trains."""
    if _can_drop(module):
        return float(getattr(module, "p", 0))
    # Some adapters drop whole ranks, or themselves, by rates that they keep by their names.
    rates = (getattr(module, name, None) for name in ("rank_dropout", "module_dropout"))
    return max((float(r) for of in rates if isinstance(of, dict) for r in of.values()), default=0.0)


def _tuners(modules: Iterable[torch.nn.Module]) -> Iterator[Any]:
    """Yield peft's adapter layers. No one can have made one without having imported it."""
    layers = sys.modules.get("peft.tuners.tuners_utils")
    if layers is not None:
        yield from (module for module in modules if isinstance(module, layers.BaseTunerLayer))


def _precision() -> str:
    """Name the autocast in force and the precision of products: under others K and V are others."""
    kinds = (kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind))
    cast = [f"autocast {kind} {torch.get_autocast_dtype(kind)}" for kind in kinds]
    return ",".join((torch.get_float32_matmul_precision(), *cast, *_modes()))


def _modes() -> Iterator[str]:
    """Name what this thread has put around torch's functions, but for default devices."""
    for mode in (*function_modes(), *dispatch_modes()):
        if not isinstance(mode, DeviceContext):
            yield f"{type(mode).__qualname__} {_process} {objects.number(mode, {}).value}"
