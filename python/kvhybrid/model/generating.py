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

    def run(
        self, inputs: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_ours: bool
    ) -> Any:
        """Generate. ``is_ours``: the call comes with a session of this cache."""
        named = with_cache_named(kwargs)
        if isinstance(past := named.get(CACHE), PlainSession) and past.handed is not None:
            named, is_ours = {**named, **over(past.handed)}, False
        if named.get(CACHE) is not None and not is_ours:
            return self._without(_OTHER_CACHE, inputs, args, named, is_said=False)
        ids = inputs if inputs is not None else named.get("input_ids")
        given = named.get("generation_config", args[0] if args else None)
        settings = settings_of(named, given, self._model.generation_config)
        self._state.survey()
        obstacle = (
            obstacle_to_reuse(
                ids,
                named,
                settings,
                self._parameters,
                in_session=is_ours,
                drops_out=self._state.drops_out,
            )
            or self._obstacle()
        )
        if obstacle is not None and is_ours:
            raise UnsupportedError(f"a session cannot take {obstacle}")
        if obstacle is not None or ids is None:
            name = OF_SETTINGS.get(str(obstacle), str(obstacle))
            origin = origin_of(name, named, given, settings[name]) if name in settings else CALL
            is_said = (obstacle not in ASKED_FOR or origin != CALL) and (
                ids is not None or named.get("inputs_embeds") is not None
            )
            where = f" ({origin})" if name in settings else ""
            return self._without(f"it cannot take {obstacle}{where}", inputs, args, named, is_said=is_said)
        return self._through(ids, inputs, args, named, settings, is_ours=is_ours)

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
        plain = None if is_ours else self._session()
        session: PagedSession = kwargs[CACHE] if plain is None else plain
        mask = mask_of(ids, kwargs, settings)
        with session.rows.owner.in_use(), self._passed_by.serving():
            try:
                session.rows.prepare(ids, mask)
            except Exception as error:
                if is_ours:
                    raise
                session.rows.reset()
                self._log(error)
                what = "this attention_mask" if isinstance(error, UnsupportedError) else "this prompt"
                return self._without(f"it cannot take {what}", inputs, args, kwargs, details=f": {error}")
            try:
                if plain is not None:
                    plain.in_call = True
                chunk = settings["prefill_chunk_size"]
                if isinstance(chunk, int) and chunk > 0:
                    # The prompt is cut here, after what is cached of it. With a grid, forward cuts every
                    # prompt, the same for all.
                    kwargs["prefill_chunk_size"] = None
                    if not self._grid:
                        self._prefill(session, ids, mask, chunk)
                output = self._own(inputs, *args, **{**kwargs, **over(session)})
                if is_ours and self._compression.kept < 1.0:
                    compress_turn(session.rows, self._compression.kept, self._compression.scorer)
                return output
            finally:
                if plain is not None:
                    plain.in_call = False
                session.rows.release()

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

    def _log(self, error: Exception) -> None:
        if not isinstance(error, KVHybridError):
            _log.error("a prompt could not be looked up: it is computed without the cache", exc_info=error)
