"""``attach``: plain ``model.generate`` and ``model.forward`` run through a ``KVCache``.

Nothing of the model is changed but the name of its attention implementation, and all of it is undone
by ``detach``. The wrapped ``forward`` tells the session which tokens a forward pass brings; the wrapped
``generate`` shows it the whole prompt before transformers slices it.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, Self, cast

from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.errors import ConfigError, InvalidRequestError, UnsupportedError
from kvhybrid.model.attention import PagedAttention
from kvhybrid.model.interface import IMPLEMENTATION, register
from kvhybrid.model.padding import vocab_size
from kvhybrid.model.routes import MaterialisedReader, PagedReader, Route
from kvhybrid.model.session_rows import SessionRows
from kvhybrid.model.transformers_cache import PagedSession

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedModel

    from kvhybrid.config import KVCacheConfig
    from kvhybrid.model.routes import Reader

_ATTACHED = "_kvhybrid_attachment"


class Attachment:
    """A model bound to a cache. ``route`` says how it reads pages, ``reason`` why."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, route: Route, reason: str) -> None:
        self.model = model
        self.cache = cache
        self.route = route
        self.reason = reason
        self.vocab_size = vocab_size(model)
        self._generate = cast("Callable[..., Any]", model.generate)
        self._forward: Callable[..., Any] = model.forward
        self._parameters = list(inspect.signature(model.forward).parameters)
        self._attention = PagedAttention(cache.storage)
        self._implementation: str = model.config._attn_implementation
        # Set on the object by others (accelerate does), and put back by ``detach``.
        self._own = {name: model.__dict__[name] for name in ("forward", "generate") if name in model.__dict__}

    def install(self) -> Self:
        """Put the wrappers in place: not hooks, because some of transformers' loops call ``forward``."""
        model = self.model
        if self.route is Route.PAGED:
            register()
            model.set_attn_implementation(IMPLEMENTATION)
        self.cache.on_session(self.session)
        setattr(model, _ATTACHED, self)
        # Through __dict__: a wrapper must not become a submodule, and not bind a second time.
        model.__dict__["forward"] = _wrapper(self._forward, self.forward)
        model.__dict__["generate"] = _wrapper(self._generate, self.generate)
        return self

    def detach(self) -> None:
        """Give the model back as it was, and close the cache's sessions. Idempotent."""
        if self.model.__dict__.get(_ATTACHED) is not self:
            return
        if self.route is Route.PAGED:
            self.model.set_attn_implementation(self._implementation)
        for name in ("forward", "generate"):
            del self.model.__dict__[name]
        self.model.__dict__.update(self._own)
        delattr(self.model, _ATTACHED)
        self.cache.on_session(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.detach()

    def session(self, session_id: str, tenant: str = "default") -> PagedSession:
        """Make the session of that id; ``KVCache.session`` keeps it."""
        reader: Reader
        if self.route is Route.PAGED:
            reader = PagedReader(self._attention)
        else:
            reader = MaterialisedReader(self.cache.storage)
        namespace = self.cache.tenant_namespace(tenant)
        rows = SessionRows(
            self.cache, reader, namespace=namespace, vocab_size=self.vocab_size, name=session_id
        )
        return PagedSession(rows)

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does, with every cached prefix of the prompt reused.

        Takes what ``model.generate`` takes. Without ``past_key_values`` the prompt is matched against
        everything cached; with a session of this cache it continues that session. Other caches,
        ``use_cache=False`` and prompts given as embeddings pass through untouched.
        """
        past = kwargs.get("past_key_values")
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if past is None:
            if ids is None or not self._can_reuse(kwargs, args):
                return self._generate(inputs, *args, **kwargs)
            session = self.session("")
        elif isinstance(past, PagedSession) and past.rows.cache is self.cache:
            session = past
            if ids is None:
                raise InvalidRequestError(
                    "a session needs the prompt's token ids, got none (inputs_embeds hide them)"
                )
        else:
            return self._generate(inputs, *args, **kwargs)
        session.rows.prepare(ids, kwargs.get("attention_mask"))
        try:
            return self._generate(inputs, *args, **{**kwargs, "past_key_values": session})
        finally:
            session.rows.release()

    def _can_reuse(self, kwargs: dict[str, Any], args: tuple[Any, ...]) -> bool:
        config = kwargs.get("generation_config", args[0] if args else None) or self.model.generation_config
        use_cache = kwargs.get("use_cache", getattr(config, "use_cache", True))
        implementation = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None))
        return use_cache is not False and implementation is None and kwargs.get("inputs_embeds") is None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward pass; one over a session of this cache is a step of that session."""
        kwargs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        session = kwargs.get("past_key_values")
        if not isinstance(session, PagedSession):
            return self._forward(**kwargs)
        rows = session.rows
        kwargs = self._announce(rows, kwargs)
        try:
            output = self._forward(**kwargs)
        except BaseException:
            rows.finish(success=False)
            raise
        rows.finish(success=True)
        return output

    def _announce(self, rows: SessionRows, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Plan the step that ``kwargs`` describe; return them without what is cached all the same."""
        if rows.cache is not self.cache:
            raise UnsupportedError("this session belongs to a cache that is attached to another model")
        ids: torch.Tensor | None = kwargs.get("input_ids")
        if ids is None:
            raise InvalidRequestError("a session needs input_ids, got none (inputs_embeds hide the tokens)")
        evicted = rows.reopen()
        if evicted is not None:
            again, seen = (t.to(ids.device) for t in evicted)
            past = kwargs["past_key_values"]
            self.forward(input_ids=again, attention_mask=seen, past_key_values=past, use_cache=True)
        skip = rows.refed(ids)
        rows.begin(ids[:, skip:], kwargs.get("attention_mask"))
        if not skip:
            return kwargs
        kwargs = {**kwargs, "input_ids": ids[:, skip:]}
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"][..., skip:]
        return kwargs

    def __repr__(self) -> str:
        return f"<Attachment {type(self.model).__name__}, {self.route} route ({self.reason}), {self.cache!r}>"


def _wrapper(own: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with the signature of ``own`` (transformers looks at it) that calls ``ours``."""

    @functools.wraps(own)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    return wrapper


def attach(
    model: PreTrainedModel, cache: KVCache | None = None, *, config: KVCacheConfig | None = None
) -> Attachment:
    """Give plain ``model.generate`` automatic prefix reuse through ``cache``.

    ``cache`` defaults to one laid out for the model by ``config``. A probe runs the model on a few tokens
    and chooses the route. The attachment is also a context manager; ``detach`` undoes it.

    Raises ``UnsupportedError`` for models that neither route serves (encoder-decoder, no attention, state
    that is not K and V), ``LayoutError`` when the cache is laid out for another shape.
    """
    from kvhybrid.model.probe import choose_route

    if model.__dict__.get(_ATTACHED) is not None:
        raise ConfigError("the model is attached already: call kvhybrid.detach(model) first")
    if cache is not None and config is not None:
        raise ConfigError("give a cache or a config, not both: a cache has its config")
    if cache is None:
        cache = KVCache.for_model(model, config)
    route, reason = choose_route(model, cache.layout)
    return Attachment(model, cache, route, reason).install()


def detach(model: PreTrainedModel) -> None:
    """Undo ``attach``; a no-op for a model that is not attached."""
    attachment = model.__dict__.get(_ATTACHED)
    if attachment is not None:
        attachment.detach()
