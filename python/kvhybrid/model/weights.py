"""What K and V depend on beside the tokens: a model's weights, its adapters, hooks and autocast.

Pages computed under one state are never found under another. A change is noticed by identity, torch's
version counters and a few sampled values of every weight; what none of them shows (a ``.data`` write to
values that were not sampled) must be told: ``Attachment.weights_changed``.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
import weakref
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import torch

from kvhybrid.model.snapshot import Snapshot, views

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from transformers import PreTrainedModel

    from kvhybrid.cache.kv_cache import KVCache

# How configurations call the share of attention weights that are dropped in training.
ATTENTION_RATES: Final = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
# Where the hooks are made that stay on a model once it was asked for hidden states; they only look.
COLLECTING: Final = "transformers.utils.output_capturing"


# One count for the process: weights that were not recognised never get a number that others had.
_epochs = itertools.count(1)


class Left(NamedTuple):
    """How the weights of a model were when nobody watched it any more."""

    epoch: int
    tensors: list[weakref.ref[torch.Tensor]]
    seen: list[object]
    versions: tuple[int, ...]
    values: list[torch.Tensor]


_left: weakref.WeakKeyDictionary[PreTrainedModel, Left] = weakref.WeakKeyDictionary()


class ModelState:
    """Watches one model. ``epoch`` changes with its weights; ``parts`` name all of its state."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.epoch = next(_epochs)
        self.kept_epoch = 0
        self._seen: list[object] = []
        self._views: list[list[torch.Tensor]] = []
        self._values: list[torch.Tensor] = []
        self._versions: tuple[int, ...] = ()
        self._watched: list[torch.Tensor] = []
        self._tuners: list[Any] = []
        self._droppers: list[torch.nn.Module] = []
        self._hooks = ""
        self._digest: tuple[int, str] | None = None
        self._snapshot: Snapshot | None = None
        self._return()
        self.look()

    def leave(self) -> None:
        """Remember the weights for whoever watches this model next: pages of the same ones are then found."""
        self.glance()
        tensors = [weakref.ref(tensor) for tensor in self._watched]
        _left[self._model] = Left(self.epoch, tensors, self._seen, self._versions, self._values)

    def _return(self) -> None:
        left = _left.pop(self._model, None)
        if left is None:
            return
        watched = [tensor for known in left.tensors if (tensor := known()) is not None]
        if len(watched) == len(left.tensors):  # else an address may be another tensor's by now
            self.epoch, self._seen, self._versions, self._values = left.epoch, *left[2:]
            self._watched, self._views = watched, views(watched)

    def survey(self) -> None:
        """Find the adapters, hooks and dropout among the model's modules. Weights are not looked at."""
        snapshot = self._snapshot
        if snapshot is None or not snapshot.has_same_modules():
            self._survey(_modules(self._model))

    def _survey(self, modules: list[torch.nn.Module]) -> None:
        self._snapshot = None
        self._tuners = list(_tuners(modules))
        self._droppers = [module for module in modules if _can_drop(module)] + self._tuners
        self._hooks = _hooks(modules)

    def look(self) -> bool:
        """Compare every weight with how it was, by identity, version and samples. True if one changed.

        Where nothing at all has changed, a snapshot says so at a fraction of the price.
        """
        known = self._snapshot
        if known is not None and known.is_same():
            return False
        modules = _modules(self._model)
        weights = _weights(modules)
        # Before anything is looked at: it must not hide what another thread changes meanwhile.
        snapshot = Snapshot.of(modules, weights)
        self._survey(modules)
        has_changed = self._compare([weight for weight in weights if not weight.is_meta])
        self._snapshot = snapshot
        return has_changed

    def _compare(self, watched: list[torch.Tensor]) -> bool:
        # Of kinds that keep their numbers elsewhere (quantized, sharded) the tensor itself is its place.
        seen: list[object] = [
            (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype)
            for tensor in watched
        ]
        if seen == self._seen:
            return self.glance()
        self._watched, self._seen = watched, seen
        self._views = views(watched)
        self._versions, self._values = self._state()
        self.epoch = next(_epochs)
        return True

    def glance(self) -> bool:
        """Compare the weights known with how they were, by version and samples. True if one changed.

        Versions alone do not do: torch's fused optimizers do not count their writes.
        """
        versions, values = self._state()
        is_same = versions == self._versions and all(map(torch.equal, values, self._values))
        self._versions, self._values = versions, values
        if not is_same:
            self.epoch = next(_epochs)
        return not is_same

    def _state(self) -> tuple[tuple[int, ...], list[torch.Tensor]]:
        with torch.no_grad():
            return tuple(map(_version, self._watched)), [torch.cat(each) for each in self._views]

    def invalidate(self) -> None:
        """Take the weights for changed."""
        self.epoch = next(_epochs)

    @property
    def adapters(self) -> str:
        """The adapters (peft) that are switched on, with their scales; empty without any."""
        if not self._tuners:
            return ""
        states = {
            (tuple(tuner.active_adapters), tuple(sorted(getattr(tuner, "scaling", {}).items())))
            for tuner in self._tuners
            if not tuner.disable_adapters
        }
        return repr(sorted(states)) if states else ""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the state as of the last look, to keep pages apart by."""
        return (str(self.epoch), *filter(None, (self.adapters, self._hooks, _autocast())))

    @property
    def drops_out(self) -> bool:
        """True when a forward pass now would drop anything at random.

        Asked of every module: a fresh adapter is in training mode inside a model that is not.
        """
        if any(module.training and _rate(module) for module in self._droppers):
            return True
        if not self._model.training:
            return False
        config = self._model.config.get_text_config()
        return any(getattr(config, name, 0) for name in ATTENTION_RATES)

    @property
    def mixes_adapters(self) -> bool:
        """True while adapters are chosen row by row (peft's ``adapter_names``): by hooks on its layers."""
        return any(tuner._forward_pre_hooks for tuner in self._tuners)

    @property
    def has_prompt_tuning(self) -> bool:
        """True when peft puts learned tokens or K and V of its own in front of every text."""
        # Such an adapter shows on the model itself by this one method that is no longer its own.
        owner = getattr(self._model.prepare_inputs_for_generation, "__self__", None)
        return bool(getattr(getattr(owner, "active_peft_config", None), "is_prompt_learning", False))

    def fingerprint(self) -> str:
        """Return a digest of every weight's bytes and the adapters: equal on another machine, too.

        Reads the whole model once an epoch.
        """
        self.look()
        if self._digest is None or self._digest[0] != self.epoch:
            digest = hashlib.sha256(type(self._model).__name__.encode())
            for name, tensor in _tensors(self._model):
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            self._digest = self.epoch, digest.hexdigest()
        return hashlib.sha256(f"{self._digest[1]} {self.adapters}".encode()).hexdigest()[:32]


class Tenancy:
    """Where one session's pages are found: its tenant's, of this model as it is now."""

    def __init__(self, state: ModelState, cache: KVCache, tenant: str, model: int) -> None:
        self._state = state
        self._cache = cache
        self._tenant = tenant
        self._model = model
        self._parts: tuple[str, ...] = ()

    def namespace(self, *parts: str) -> int:
        """Return the namespace of the model as it is now; those of older weights are dropped."""
        self._state.look()
        if self._state.kept_epoch != self._state.epoch:
            self._state.kept_epoch = self._state.epoch
            forget_older(self._cache, self._model, self._state.epoch)
        self._parts = self._state.parts
        return self._cache.tenant_namespace(self._tenant, "model", str(self._model), *self._parts, *parts)

    def follow(self, other: Self) -> None:
        """Take over what ``other``'s namespace was asked for, by whoever takes over its pages."""
        self._parts = other._parts

    def is_stale(self) -> bool:
        """Return whether the model has changed since ``namespace`` was last asked."""
        self._state.look()  # weights, hooks and adapters may be other objects by now
        return self._parts != self._state.parts


def forget_older(cache: KVCache, model: int, epoch: int) -> None:
    """Drop what is cached of ``model`` under other weights than those of ``epoch``."""
    mine = ("model", str(model))
    cache.drop_namespaces(lambda parts: parts[2:4] == mine and parts[4:5] != (str(epoch),))


def _modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return every module once. A prompt waits for this: torch's own walk spells every name on its way."""
    found, left = {id(model): model}, [model]
    while left:
        for module in left.pop()._modules.values():
            if module is not None and id(module) not in found:
                found[id(module)] = module
                left.append(module)
    return list(found.values())


def _weights(modules: Iterable[torch.nn.Module]) -> list[torch.Tensor]:
    """Return every parameter and buffer of ``modules`` once."""
    tensors = {
        id(tensor): tensor
        for module in modules
        for held in (module._parameters, module._buffers)
        for tensor in held.values()
        if tensor is not None
    }
    return list(tensors.values())


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


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
    """Yield peft's adapter layers. Nobody can have made one without having imported it."""
    layers = sys.modules.get("peft.tuners.tuners_utils")
    if layers is not None:
        yield from (module for module in modules if isinstance(module, layers.BaseTunerLayer))


def _hooks(modules: Iterable[torch.nn.Module]) -> str:
    """Name every hook that may change what flows through the model; torch never gives a number twice."""
    hooked = []
    for index, module in enumerate(modules):
        if not module._forward_pre_hooks and not module._forward_hooks:
            continue
        before, behind = _changing(module._forward_pre_hooks), _changing(module._forward_hooks)
        if before or behind:
            hooked.append((index, *before, -1, *behind))
    return f"hooks {hooked}" if hooked else ""


def _changing(hooks: Mapping[int, object]) -> list[int]:
    """Return the numbers of hooks, less those by which transformers collects hidden states."""
    return [number for number, hook in hooks.items() if getattr(hook, "__module__", "") != COLLECTING]


def _autocast() -> str:
    """Name the autocast in force: under it K and V are others."""
    kinds = (kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind))
    return ",".join(f"autocast {kind} {torch.get_autocast_dtype(kind)}" for kind in kinds)
