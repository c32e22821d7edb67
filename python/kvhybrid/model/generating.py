"""``Generating``: a call of ``generate`` through the cache, or, where that cannot be, as if there were none.

A call that names no session must work whenever it works without us. So whatever stands in the way of such a
call is noted and the call runs on the model alone; once a token may have been given out, it goes on over
what was computed (``PlainSession``). A call over a session of this cache gets a clear error instead.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import torch

from kvhybrid.errors import KVHybridError, UnsupportedError
from kvhybrid.model.obstacles import (
    ASKED_FOR,
    CALL,
    GIVEN,
    OF_SETTINGS,
    mask_of,
    obstacle_to_reuse,
    origin_of,
    settings_of,
)
from kvhybrid.model.plain_session import PlainSession
from kvhybrid.model.session_compression import compress_turn
from kvhybrid.model.versions import CACHE, over, with_cache_named

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedModel

    from kvhybrid.model.compression import Compression
    from kvhybrid.model.passed_by import PassedBy
    from kvhybrid.model.transformers_cache import PagedSession
    from kvhybrid.model.weights import ModelState

__all__ = ["Generating"]

_log = logging.getLogger(__name__)
_OTHER_CACHE: Final = "another cache"
_FAILED: Final = "it failed in the cache"


class Generating:
    """Runs calls of ``generate`` of one attached model.

    ``own``: the model's own ``generate``. ``forward``: the attached one. ``obstacle``: what of the model as
    it is now no session can take. ``grid``: forward passes end at multiples of it anyhow; 0 for none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        own: Callable[..., Any],
        forward: Callable[..., Any],
        *,
        parameters: Mapping[str, object],
        state: ModelState,
        passed_by: PassedBy,
        session: Callable[[], PlainSession],
        obstacle: Callable[[], str | None],
        compression: Compression,
        grid: int,
    ) -> None:
        self._model = model
        self._own = own
        self._forward = forward
        self._parameters = parameters
        self._state = state
        self._passed_by = passed_by
        self._session = session
        self._obstacle = obstacle
        self._compression = compression
        self._grid = grid
        self._logged: set[type[Exception]] = set()

    def run(
        self, inputs: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_ours: bool
    ) -> Any:
        """Generate. ``is_ours``: the call comes with a session of this cache."""
        named = with_cache_named(kwargs)
        if isinstance(past := named.get(CACHE), PlainSession) and past.handed is not None:
            named, is_ours = {**named, **over(past.handed)}, False
        if named.get(CACHE) is not None and not is_ours:
            return self._without(_OTHER_CACHE, inputs, args, named, is_said=False)
        try:
            ids, settings, why, is_said = self._judge(inputs, args, named, is_ours=is_ours)
        except Exception as error:
            if is_ours:
                raise
            return self._without(_FAILED, inputs, args, named, details=self._said(error))
        if why is not None:
            return self._without(why, inputs, args, named, is_said=is_said)
        return self._through(ids, inputs, args, named, settings, is_ours=is_ours)

    def _judge(
        self, inputs: torch.Tensor | None, args: tuple[Any, ...], named: dict[str, Any], *, is_ours: bool
    ) -> tuple[Any, dict[str, Any], str | None, bool]:
        """Return the prompt, the settings that hold, why the call passes the cache by, and whether to say so.

        Raises ``UnsupportedError`` for what a session cannot take.
        """
        ids = inputs if inputs is not None else named.get("input_ids")
        given = named.get("generation_config", args[0] if args else None)
        settings = settings_of(named, given, self._model.generation_config)
        self._state.survey()
        drops_out = self._state.drops_out
        obstacle = (
            obstacle_to_reuse(ids, named, settings, self._parameters, in_session=is_ours, drops_out=drops_out)
            or self._obstacle()
        )
        if obstacle is None:
            return ids, settings, None, False
        if is_ours:
            raise UnsupportedError(f"a session cannot take {obstacle}")
        name = OF_SETTINGS.get(obstacle, obstacle)
        origin = origin_of(name, named, given, settings[name]) if name in settings else CALL
        has_prompt = ids is not None or named.get("inputs_embeds") is not None
        is_said = has_prompt and (obstacle not in ASKED_FOR or origin not in (CALL, GIVEN))
        where = f" ({origin})" if name in settings else ""
        return ids, settings, f"it cannot take {obstacle}{where}", is_said

    def _through(
        self,
        ids: torch.Tensor,
        inputs: torch.Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        settings: dict[str, Any],
        *,
        is_ours: bool,
    ) -> Any:
        """Generate through the cache."""
        try:
            plain = None if is_ours else self._session()
            mask = mask_of(ids, kwargs, settings)
        except Exception as error:
            if is_ours:
                raise
            return self._without(_FAILED, inputs, args, kwargs, details=self._said(error))
        session: PagedSession = kwargs[CACHE] if plain is None else plain
        with session.rows.owner.in_use(), self._passed_by.serving():
            try:
                session.rows.prepare(ids, mask)
            except Exception as error:
                if is_ours:
                    raise
                session.rows.reset()
                why = _FAILED
                if isinstance(error, KVHybridError):
                    is_mask = isinstance(error, UnsupportedError)
                    why = f"it cannot take this {'attention_mask' if is_mask else 'prompt'}"
                return self._without(why, inputs, args, kwargs, details=self._said(error))
            try:
                return self._over(session, ids, mask, inputs, args, kwargs, settings)
            finally:
                session.rows.release()

    def _over(
        self,
        session: PagedSession,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        inputs: torch.Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        settings: dict[str, Any],
    ) -> Any:
        """Generate over a session that has the prompt."""
        chunk = settings["prefill_chunk_size"]
        if isinstance(session, PlainSession) and kwargs.get(CACHE) is not session:
            session.in_call = True
        try:
            if isinstance(chunk, int) and chunk > 0:
                # The prompt is cut here, after what is cached of it. With a grid, forward cuts every prompt,
                # the same for all.
                kwargs = {**kwargs, "prefill_chunk_size": None}
                if not self._grid:
                    self._prefill(session, ids, mask, chunk)
            output = self._own(inputs, *args, **{**kwargs, **over(session)})
        finally:
            if isinstance(session, PlainSession):
                session.in_call = False
        if kwargs.get(CACHE) is session and self._compression.kept < 1.0:
            compress_turn(session.rows, self._compression.kept, self._compression.scorer)
        return output

    @torch.no_grad()
    def _prefill(
        self, session: PagedSession, ids: torch.Tensor, mask: torch.Tensor | None, chunk: int
    ) -> None:
        """Compute the prompt but for its last token, ``chunk`` columns at a time, after what is cached.

        Left to transformers, versions before 5.23 feed it from its beginning, whatever is cached.
        """
        total = ids.shape[1] if mask is None else mask.shape[1]
        first = total - ids.shape[1]
        options = {"logits_to_keep": 1} if "logits_to_keep" in self._parameters else {}
        for start in range(session.get_seq_length(), total - 1, chunk):
            stop = min(start + chunk, total - 1)
            seen = mask[:, :stop] if mask is not None else None
            fed = ids[:, start - first : stop - first]
            self._forward(input_ids=fed, attention_mask=seen, **over(session), use_cache=True, **options)

    def _without(
        self,
        why: str,
        inputs: torch.Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        details: str = "",
        is_said: bool = True,
    ) -> Any:
        """Generate without the cache."""
        self._passed_by.note(why, details=details, is_said=is_said)
        with self._passed_by.passing():
            return self._own(inputs, *args, **kwargs)

    def _said(self, error: Exception) -> str:
        """Return an error as the end of a sentence; log the first of its kind that is no refusal of ours."""
        kind = type(error)
        if not isinstance(error, KVHybridError) and kind not in self._logged:
            self._logged.add(kind)
            _log.error("a call could not be looked at: it runs without the cache", exc_info=error)
        return f": {kind.__name__}: {error}" if not isinstance(error, KVHybridError) else f": {error}"
