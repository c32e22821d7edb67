"""``attach``: plain ``model.generate`` and ``model.forward`` run through a ``KVCache``.

Two functions are put on the model object, and ``detach`` takes them away; its configuration is not touched.
The wrapped ``forward`` tells the session which tokens a forward pass brings; the wrapped ``generate`` shows
it the whole prompt before transformers slices it.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, NoReturn, Self, SupportsIndex, TypeVar, cast

import torch

from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.errors import CapacityError, ConfigError, KVHybridError, LayoutError, UnsupportedError
from kvhybrid.model.attention import PagedAttention
from kvhybrid.model.attention_name import StandIn
from kvhybrid.model.compression import Compression
from kvhybrid.model.generating import Generating
from kvhybrid.model.grid import GRID
from kvhybrid.model.interface import model_number
from kvhybrid.model.layer_states import LayerStates, name_layers, state_layers
from kvhybrid.model.observed import Observed
from kvhybrid.model.obstacles import (
    mixes_rows,
    obstacle_in_precision,
    obstacle_to_step,
    precision_of,
    standing_obstacle,
)
from kvhybrid.model.original import (
    ATTACHED,
    WRAPPED,
    leads_to,
    original,
    plain_forward,
    plain_state,
    wrapper,
)
from kvhybrid.model.padding import vocab_size
from kvhybrid.model.passed_by import PassedBy
from kvhybrid.model.plain_session import PlainSession
from kvhybrid.model.probe_compression import obstacle_to_compression
from kvhybrid.model.routes import MaterialisedReader, PagedReader, Route
from kvhybrid.model.session_rows import SessionRows
from kvhybrid.model.session_states import SessionStates
from kvhybrid.model.stepping import Stepping
from kvhybrid.model.tenancy import ModelNamespaces, Tenancy
from kvhybrid.model.transformers_cache import PagedSession
from kvhybrid.model.versions import CACHE, over, with_cache_named
from kvhybrid.model.weights import ModelState

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from kvhybrid.config import KVCacheConfig
    from kvhybrid.model.routes import Reader

Kind = TypeVar("Kind", bound=PagedSession)


class Attachment:
    """A model bound to a cache. ``route`` says how it reads pages, ``reason`` why."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, route: Route, reason: str) -> None:
        self.model = model
        self.cache = cache
        self.route = route
        self.reason = reason
        self.weights = ModelState.of(model)
        self.passed_by = PassedBy(cache)
        self._namespaces = ModelNamespaces(self.weights, cache, model_number(model))
        self._generate = cast("Callable[..., Any]", model.generate)
        self._forward: Callable[..., Any] = model.forward
        parameters = inspect.signature(model.forward).parameters
        self._parameters = {name: parameter.default for name, parameter in parameters.items()}
        plain = plain_forward(model)
        stand_in = StandIn(model) if route is Route.PAGED else None
        self._stepping = Stepping(plain, list(parameters), self.weights.learning, stand_in)
        self._state_layers = state_layers(model.config)
        if bool(self._state_layers) != bool(cache.layout.state_bytes):
            kept = name_layers(model.config, self._state_layers) or "no layer"
            raise LayoutError(
                f"{kept} of {type(model).__name__} keeps a state, the layout says {cache.layout.state_bytes} "
                "bytes: KVCache.for_model(model) lays a cache out for it"
            )
        self._grid = max(GRID, cache.layout.block_size) if cache.config.reproducible else 0
        self._attention = PagedAttention(cache.storage, always_gather=cache.config.reproducible)
        self._compression = Compression(
            cache.config,
            sees_queries=route is Route.PAGED,
            obstacle=functools.partial(obstacle_to_compression, model, plain, cache.layout, route),
        )
        self._precision = precision_of(model)
        self._generating = Generating(
            model,
            self._generate,
            self.forward,
            parameters=self._parameters,
            state=self.weights,
            passed_by=self.passed_by,
            session=functools.partial(self._make_session, "", "default", PlainSession),
            obstacle=self._obstacle_in_model,
            compression=self._compression,
            grid=self._grid,
        )
        # Set on the object by others (accelerate does), and put back by ``detach``.
        self.own = {name: vars(model)[name] for name in WRAPPED if name in vars(model)}
        self._wrappers: dict[str, Callable[..., Any]] = {}

    def install(self) -> Self:
        """Put the wrappers in place: not hooks, because some of transformers' loops call ``forward``."""
        model = self.model
        self.cache.on_session(self.session)
        setattr(model, ATTACHED, self)
        self._wrappers = {
            "forward": wrapper(self._forward, self.forward),
            "generate": wrapper(self._generate, self.generate),
            "__getstate__": self._plain_state,
        }
        # Through __dict__: a wrapper must not become a submodule, and not bind a second time.
        vars(model).update(self._wrappers)
        return self

    def detach(self) -> None:
        """Give the model back as it was, and close the cache's sessions. Idempotent.

        What others have put around our functions since stays; ours then only hand on.
        """
        if not self.is_attached:
            return
        plain = plain_state(self.model, self.own, self._wrappers)
        for name in [name for name in vars(self.model) if name not in plain]:
            del vars(self.model)[name]
        vars(self.model).update(
            {name: value for name, value in plain.items() if vars(self.model)[name] is not value}
        )
        self.cache.on_session(None)
        self.weights.leave()

    @property
    def is_attached(self) -> bool:
        """True until ``detach``."""
        return vars(self.model).get(ATTACHED) is self

    def _plain_state(self) -> dict[str, Any]:
        """Return what is copied and pickled of the model: all but what is ours."""
        return plain_state(self.model, self.own, self._wrappers)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse to be pickled: pages and locks belong to a process."""
        raise UnsupportedError("an attachment cannot be pickled; its model can, without it")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.detach()

    @property
    def vocab_size(self) -> int:
        """Token ids that the model has embeddings for, as of now: embeddings can be resized."""
        return vocab_size(self.model)

    def weights_changed(self) -> None:
        """Say that the weights are others now, so that nothing computed with the old ones is found.

        Optimizer steps, ``load_state_dict``, other adapters and new hooks are noticed without it; a
        write through ``.data`` to a few values, or into what a quantized or sharded weight is made of, or a
        hook that does something else now, is not.
        """
        self.weights.weights_changed()

    def session(self, session_id: str, tenant: str = "default") -> PagedSession:
        """Make the session of that id; ``KVCache.session`` keeps it."""
        return self._make_session(session_id, tenant, PagedSession)

    def _make_session(self, session_id: str, tenant: str, kind: type[Kind]) -> Kind:
        reader: Reader
        if self.route is Route.PAGED:
            reader = PagedReader(self._attention)
        else:
            reader = MaterialisedReader(self.cache.storage)
        states = None
        if self.cache.storage.states is not None:
            live = LayerStates(self._state_layers)
            states = SessionStates(live, self.cache.storage.states, self.cache.layout.block_size)
        rows = SessionRows(
            self.cache,
            reader,
            Tenancy(self._namespaces, tenant),
            vocab_size=functools.partial(vocab_size, self.model),
            name=session_id,
            grid=self._grid,
            mixes_rows=mixes_rows(self.model),
            states=states,
            observed=Observed(self.cache.storage.buffers) if self._compression.observes else None,
        )
        fresh = functools.partial(self.session, tenant=tenant)
        session = kind(rows, fresh, self.weights.fingerprint, self._compression)
        # Whoever holds it, it ends with the attachment: another model would read this one's pages.
        self.cache.watch(session)
        return session

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does, with every cached prefix of the prompt reused.

        Takes what ``model.generate`` takes, a cache as ``past_key_values`` or ``cache`` in every version of
        transformers. Without one the prompt is matched against everything cached; with a session of this
        cache it continues that session, whose context is compressed after the answer if the configuration
        says so. Other caches and ``use_cache=False`` pass through untouched. So does whatever a session
        cannot take (embeddings, images, masks with holes, dropout), counted (``get_stats()``) and with one
        warning for each kind; with a session it is a clear error.
        """
        past = with_cache_named(kwargs).get(CACHE)
        is_ours = isinstance(past, PagedSession) and past.rows.cache is self.cache
        if not self.is_attached and not is_ours:
            return self._generate(inputs, *args, **kwargs)
        return self._generating.run(inputs, args, kwargs, is_ours=is_ours)

    def _obstacle_in_model(self) -> str | None:
        if not leads_to(self.model.forward, self._wrappers.get("forward")):
            return "a forward that was put in place of the attached one"
        if self.weights.mixes_adapters:
            return "adapters chosen row by row"
        if self.weights.has_prompt_tuning:
            return "an adapter with tokens of its own"
        return obstacle_in_precision(precision_of(self.model), self._precision, self.cache.storage.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward pass; one over a session of this cache is a step of that session."""
        session = next((each for each in (*args, *kwargs.values()) if isinstance(each, PagedSession)), None)
        if session is None or not self.is_attached:
            if self.is_attached and len(getattr(kwargs.get("input_ids"), "shape", ())) == 2:
                self.passed_by.note_forward()
            return self._forward(*args, **kwargs)
        named = with_cache_named({**dict(zip(self._parameters, args, strict=False)), **kwargs})
        return self._step(session, named)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's has no annotations
    def _step(self, session: PagedSession, kwargs: dict[str, Any]) -> Any:
        """Run a call of ``forward`` over a session, if it can take it."""
        rows = session.rows
        if rows.cache is not self.cache:
            raise UnsupportedError("this session belongs to a cache that is attached to another model")
        if isinstance(session, PlainSession) and (session.in_call or session.handed is not None):
            return self._plain_step(session, kwargs)
        if rows.rows is None:
            self.weights.survey()
        is_direct = rows.owner.depth == 0  # inside a call of ``generate`` the model was asked before
        obstacle = obstacle_to_step(kwargs, self._parameters, drops_out=is_direct and self.weights.drops_out)
        if is_direct:
            obstacle = obstacle or self._obstacle_in_model()
        if obstacle is not None:
            raise UnsupportedError(f"a session cannot take {obstacle}")
        with rows.owner.in_use():
            return self._stepping.run(session, kwargs)

    def _plain_step(self, session: PlainSession, kwargs: dict[str, Any]) -> Any:
        """Run a forward pass of a call that knows of no session: on the model alone, if a session cannot."""
        if session.handed is not None:
            return self._forward(**{**kwargs, **over(session.handed)})
        why = details = ""
        obstacle = obstacle_to_step(kwargs, self._parameters, drops_out=False)
        if obstacle is not None:
            if not session.can_hand_over:
                raise UnsupportedError(f"a session cannot take {obstacle}")
            why = f"it cannot take {obstacle}"
        else:
            try:
                with session.rows.owner.in_use():
                    return self._stepping.run(session, kwargs)
            except Exception as error:
                # What the model's own code raises, it raises without us, too.
                if not session.can_hand_over or self._stepping.came_from_the_model(error):
                    raise
                why, details = _said_of(error), f": {error}"
        handed = session.hand_over(self.model, precision_of(self.model)[1], len(kwargs["input_ids"]))
        self.passed_by.note(why, details=details)
        return self._forward(**{**kwargs, **over(handed)})

    def __repr__(self) -> str:
        standing = self.standing_obstacle() if self.is_attached else "it was detached"
        calls = f"every call passes by: {standing}" if standing is not None else str(self.passed_by)
        return (
            f"<Attachment {type(self.model).__name__}, {self.route} route ({self.reason}), {calls}, "
            f"{self.cache!r}>"
        )

    def standing_obstacle(self) -> str | None:
        """Return why a plain call that says nothing of its own would pass the cache by, or None."""
        return standing_obstacle(self.model) or self._obstacle_in_model()


def _said_of(error: Exception) -> str:
    if isinstance(error, CapacityError):
        return "there are no pages for all of it"
    return "it failed in the cache" if not isinstance(error, KVHybridError) else "it cannot take this call"


def attach(
    model: PreTrainedModel, cache: KVCache | None = None, *, config: KVCacheConfig | None = None
) -> Attachment:
    """Give plain ``model.generate`` automatic prefix reuse through ``cache``.

    ``cache`` defaults to one laid out for the model by ``config``. A probe runs the model on a few tokens
    and chooses the route. The attachment is also a context manager; ``detach`` undoes it. A peft model
    is attached by the model inside it.

    Raises ``UnsupportedError`` for models that neither route serves (encoder-decoder, no attention, state
    that is not K and V), ``LayoutError`` when the cache is laid out for another shape.
    """
    from kvhybrid.model.probe import choose_route

    model = original(model)
    if model.__dict__.get(ATTACHED) is not None:
        raise ConfigError("the model is attached already: call kvhybrid.detach(model) first")
    if cache is not None and config is not None:
        raise ConfigError("give a cache or a config, not both: a cache has its config")
    # A compiled model is probed as plain code, as which it will run over pages: tracing takes minutes.
    with torch.compiler.set_stance("force_eager"):
        if cache is None:
            cache = KVCache.for_model(model, config)
        if cache.is_attached:
            raise ConfigError("the cache is attached to a model already: give this one a cache of its own")
        route, reason = choose_route(model, cache.layout)
    return Attachment(model, cache, route, reason).install()


def detach(model: PreTrainedModel) -> None:
    """Undo ``attach``; a no-op for a model that is not attached."""
    attachment = original(model).__dict__.get(ATTACHED)
    if attachment is not None:
        attachment.detach()
