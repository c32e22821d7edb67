"""``attach``: plain ``model.generate`` and ``model.forward`` run through a ``KVCache``.

Nothing of the model is changed but the name of its attention implementation, and all of it is undone
by ``detach``. The wrapped ``forward`` tells the session which tokens a forward pass brings; the wrapped
``generate`` shows it the whole prompt before transformers slices it.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from typing import TYPE_CHECKING, Any, NoReturn, Self, SupportsIndex, cast

import torch

from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.errors import ConfigError, LayoutError, UnsupportedError
from kvhybrid.model.attention import PagedAttention
from kvhybrid.model.compression import Compression
from kvhybrid.model.grid import GRID
from kvhybrid.model.interface import (
    model_number,
    own_implementation,
    switch_off,
    switch_on,
)
from kvhybrid.model.layer_states import LayerStates, name_layers, state_layers
from kvhybrid.model.observed import Observed
from kvhybrid.model.obstacles import (
    ASKED_FOR,
    mask_of,
    mixes_rows,
    obstacle_in_precision,
    obstacle_to_reuse,
    obstacle_to_step,
    precision_of,
    settings_of,
)
from kvhybrid.model.original import ATTACHED, WRAPPED, original, plain_copy, plain_forward, wrapper
from kvhybrid.model.padding import vocab_size
from kvhybrid.model.probe_compression import obstacle_to_compression
from kvhybrid.model.routes import MaterialisedReader, PagedReader, Route
from kvhybrid.model.session_compression import compress_turn
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


class Attachment:
    """A model bound to a cache. ``route`` says how it reads pages, ``reason`` why."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, route: Route, reason: str) -> None:
        self.model = model
        self.cache = cache
        self.route = route
        self.reason = reason
        self.weights = ModelState.of(model)
        self._namespaces = ModelNamespaces(self.weights, cache, model_number(model))
        self._generate = cast("Callable[..., Any]", model.generate)
        self._forward: Callable[..., Any] = model.forward
        self._parameters = list(inspect.signature(model.forward).parameters)
        plain = plain_forward(model)
        self._stepping = Stepping(plain, self._parameters, self.weights.learning)
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
        self._said: set[str] = set()
        self._passing = threading.local()
        # Set on the object by others (accelerate does), and put back by ``detach``.
        self.own = {name: model.__dict__[name] for name in WRAPPED if name in model.__dict__}

    def install(self) -> Self:
        """Put the wrappers in place: not hooks, because some of transformers' loops call ``forward``."""
        model = self.model
        if self.route is Route.PAGED:
            switch_on(model)
        self.cache.on_session(self.session)
        setattr(model, ATTACHED, self)
        # Through __dict__: a wrapper must not become a submodule, and not bind a second time.
        model.__dict__["forward"] = wrapper(self._forward, self.forward)
        model.__dict__["generate"] = wrapper(self._generate, self.generate)
        model.__dict__["__deepcopy__"] = self._copy_model
        return self

    def detach(self) -> None:
        """Give the model back as it was, and close the cache's sessions. Idempotent."""
        if self.model.__dict__.get(ATTACHED) is not self:
            return
        for name in (*WRAPPED, ATTACHED):
            del self.model.__dict__[name]
        self.model.__dict__.update(self.own)
        self.cache.on_session(None)
        self.weights.leave()
        if self.route is Route.PAGED:
            switch_off(self.model)

    def _copy_model(self, memo: dict[int, Any]) -> PreTrainedModel:
        """Deep-copy the model as it is without us: our wrappers would run the original for the copy."""
        own = own_implementation(self.model) if self.route is Route.PAGED else None
        return plain_copy(self.model, self.own, memo, own)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse to be pickled, and with this the attached model: pages and locks belong to a process."""
        raise UnsupportedError("an attached model cannot be pickled: call kvhybrid.detach(model) first")

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
        session = PagedSession(rows, fresh, self.weights.fingerprint, self._compression)
        # Whoever holds it, it ends with the attachment: another model would read this one's pages.
        self.cache.watch(session)
        return session

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does, with every cached prefix of the prompt reused.

        Takes what ``model.generate`` takes, a cache as ``past_key_values`` or ``cache`` in every version of
        transformers. Without one the prompt is matched against everything cached; with a session of this
        cache it continues that session, whose context is compressed behind the answer if the configuration
        says so. Other caches and ``use_cache=False`` pass through
        untouched. So does whatever a session cannot take (embeddings, images, masks with holes, dropout),
        with one warning for each kind; with a session it is a clear error.
        """
        named = with_cache_named(kwargs)
        past = named.get(CACHE)
        is_ours = isinstance(past, PagedSession) and past.rows.cache is self.cache
        if past is not None and not is_ours:
            return self._generate(inputs, *args, **kwargs)
        kwargs = named
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        given = kwargs.get("generation_config", args[0] if args else None)
        settings = settings_of(kwargs, given, self.model.generation_config)
        self.weights.survey()
        obstacle = (
            obstacle_to_reuse(ids, kwargs, settings, in_session=is_ours, drops_out=self.weights.drops_out)
            or self._obstacle_in_model()
        )
        if obstacle is not None and is_ours:
            raise UnsupportedError(f"a session cannot take {obstacle}")
        if obstacle is not None or ids is None:
            is_said = obstacle not in ASKED_FOR and (
                ids is not None or kwargs.get("inputs_embeds") is not None
            )
            return self._without(f"it cannot take {obstacle}" if is_said else "", "", inputs, args, kwargs)
        session = past if isinstance(past, PagedSession) else self.session("")
        chunk = settings["prefill_chunk_size"]
        if isinstance(chunk, int) and chunk > 0:
            kwargs["prefill_chunk_size"] = None  # the prompt is cut here, behind what is cached of it
        mask = mask_of(ids, kwargs, settings)
        with session.rows.owner.in_use():
            try:
                session.rows.prepare(ids, mask)
            except UnsupportedError as error:
                if is_ours:
                    raise
                return self._without("it cannot take this attention_mask", f": {error}", inputs, args, kwargs)
            try:
                # With a grid, forward cuts every prompt, the same for everybody.
                if isinstance(chunk, int) and chunk > 0 and not self._grid:
                    self._prefill(session, ids, mask, chunk)
                output = self._generate(inputs, *args, **{**kwargs, **over(session)})
                if is_ours and self._compression.kept < 1.0:
                    compress_turn(session.rows, self._compression.kept, self._compression.scorer)
                return output
            finally:
                session.rows.release()

    @torch.no_grad()
    def _prefill(
        self, session: PagedSession, ids: torch.Tensor, mask: torch.Tensor | None, chunk: int
    ) -> None:
        """Compute the prompt but for its last token, ``chunk`` columns at a time, behind what is cached.

        Left to transformers, versions before 5.23 feed it from its beginning, whatever is cached.
        """
        total = ids.shape[1] if mask is None else mask.shape[1]
        first = total - ids.shape[1]
        options = {"logits_to_keep": 1} if "logits_to_keep" in self._parameters else {}
        for start in range(session.rows.columns, total - 1, chunk):
            stop = min(start + chunk, total - 1)
            seen = mask[:, :stop] if mask is not None else None
            fed = ids[:, start - first : stop - first]
            self.forward(input_ids=fed, attention_mask=seen, **over(session), use_cache=True, **options)

    def _obstacle_in_model(self) -> str | None:
        if self.weights.mixes_adapters:
            return "adapters chosen row by row"
        if self.weights.has_prompt_tuning:
            return "an adapter with tokens of its own"
        return obstacle_in_precision(precision_of(self.model), self._precision, self.cache.storage.dtype)

    def _without(
        self,
        why: str,
        details: str,
        inputs: torch.Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Generate without the cache, and warn once for every ``why``.

        Calls that transformers makes within such a call (early exit drafts with the model itself) say
        nothing.
        """
        is_within = getattr(self._passing, "on", False)
        if why and not is_within and why not in self._said:
            self._said.add(why)
            warnings.warn(f"generate runs without the cache: {why}{details}", stacklevel=4)
        self._passing.on = True
        try:
            return self._generate(inputs, *args, **kwargs)
        finally:
            self._passing.on = is_within

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward pass; one over a session of this cache is a step of that session."""
        kwargs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        named = with_cache_named(kwargs)
        session = named.get(CACHE)
        if not isinstance(session, PagedSession):
            return self._forward(**kwargs)
        return self._step(session, named)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's has no annotations
    def _step(self, session: PagedSession, kwargs: dict[str, Any]) -> Any:
        """Run a call of ``forward`` over a session, if it can take it."""
        rows = session.rows
        if rows.cache is not self.cache:
            raise UnsupportedError("this session belongs to a cache that is attached to another model")
        if rows.rows is None:
            self.weights.survey()
        is_direct = rows.owner.depth == 0  # inside a call of ``generate`` the model was asked before
        obstacle = obstacle_to_step(kwargs, drops_out=is_direct and self.weights.drops_out)
        if is_direct:
            obstacle = obstacle or self._obstacle_in_model()
        if obstacle is not None:
            raise UnsupportedError(f"a session cannot take {obstacle}")
        with rows.owner.in_use():
            return self._stepping.run(session, kwargs)

    def __repr__(self) -> str:
        return f"<Attachment {type(self.model).__name__}, {self.route} route ({self.reason}), {self.cache!r}>"


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
