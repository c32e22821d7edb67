"""``Stepping``: one call of ``forward`` over a session as the forward passes, the steps, that it must be.

What is cached is skipped, what was lost is computed again, equal rows are computed once, and passes end where
a grid or a state asks for it. Knows a model's ``forward``; not how anybody came to call it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from kvhybrid.errors import KVHybridError, UnsupportedError
from kvhybrid.model.interface import reading_pages
from kvhybrid.model.observed import observing
from kvhybrid.model.padding import column_of, read_ids
from kvhybrid.model.passes import WHOLE, join, narrow, parts, widen
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from kvhybrid.model.attention_name import StandIn
    from kvhybrid.model.session_rows import SessionRows
    from kvhybrid.model.transformers_cache import PagedSession

# Marks an error that came out of the model's own forward pass.
_OF_MODEL: Final = "_kvhybrid_of_model"


class Stepping:
    """Runs ``forward``, whose ``parameters`` are named, as plain code: pages cannot be traced.

    ``watching`` is entered around every forward pass, ``stand_in`` around those that read pages.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        parameters: list[str],
        watching: Callable[[], AbstractContextManager[None]],
        stand_in: StandIn | None,
    ) -> None:
        self._forward = forward
        self._stand_in = stand_in
        self._parameters = parameters
        self._watching = watching

    def run(self, session: PagedSession, call: dict[str, Any]) -> Any:
        """Run a call whose arguments a session can take; the session is its owner's."""
        rows = session.rows
        self._recompute(rows, session, call)
        if rows.rows is None or rows.rows.pending == 0:
            return self._run(rows, call)
        ids = read_ids(call["input_ids"], rows.vocab_size)
        if skip := rows.rows.refed(ids, column_of(call)):
            fed = ("input_ids", "position_ids", "cache_position")
            call = {n: v[..., skip:] if n in fed and v is not None else v for n, v in call.items()}
        return self._run(rows, call)

    def _recompute(self, rows: SessionRows, session: PagedSession, call: dict[str, Any]) -> None:
        """Compute again what was lost while the session was released."""
        # A single token goes on with the text as it is; more than one may be a new turn.
        lost = rows.reopen(looks=call["input_ids"].shape[1:] != (1,))
        if lost is None:
            return
        again, seen = (t.to(call["input_ids"].device) for t in lost)
        try:
            lost_call = {"input_ids": again, "attention_mask": seen, **over(session)}
            self.run(session, {**lost_call, "use_cache": True})
        except BaseException:
            rows.stay_released()
            raise

    def _run(self, rows: SessionRows, call: dict[str, Any]) -> Any:
        """Run a call as the forward passes that it must be: equal rows once, and cut where the grid cuts."""
        each = rows.rows.repeats(call["input_ids"]) if rows.rows is not None else 1
        if each > 1:
            call = narrow(call, each)
        stops = rows.stops(call["input_ids"].shape[1], len(call["input_ids"]))
        whole = next((n for n in WHOLE if call.get(n) is not None and call[n] is not False), None)
        if whole and not rows.grid.width:
            stops = stops[-1:]  # cut for states alone: fewer of them are kept
        if len(stops) == 1:
            output = self._pass(rows, call)
        else:
            if whole and rows.grid.width:
                raise UnsupportedError(
                    f"a session cannot take {whole} in a call of {len(stops)} forward passes: "
                    f"reproducible=True cuts every {rows.grid.width} tokens"
                )
            before = rows.mark()
            try:
                output = join([self._pass(rows, part) for part in parts(call, rows.columns, stops)], call)
            except BaseException:
                rows.rewind(before)
                raise
        if each > 1:
            rows.repeat(each)
            output = widen(output, each)
        return output

    def _pass(self, rows: SessionRows, call: dict[str, Any]) -> Any:
        """Run one forward pass as one step of the session."""
        call = dict(call)
        rows.begin(call["input_ids"], call.get("attention_mask"))
        try:
            self._place(rows, call)
            with self._watching(), self._attending(rows), observing(rows.observed):
                output = self._call(call)
        except BaseException as error:
            rows.finish(success=False)
            if type(error).__module__.startswith("torch._dynamo"):
                raise UnsupportedError(
                    "a part of the model was compiled after attach, and pages cannot be traced: detach and "
                    "attach again"
                ) from error
            raise
        rows.finish(success=True)
        return output

    def _call(self, call: dict[str, Any]) -> Any:
        try:
            return self._forward(**call)
        except Exception as error:
            if not isinstance(error, KVHybridError):
                vars(error)[_OF_MODEL] = True
            raise

    def came_from_the_model(self, error: Exception) -> bool:
        """Return whether the model's own code raised an error, and not what stands between it and pages."""
        return _OF_MODEL in vars(error)

    def _attending(self, rows: SessionRows) -> AbstractContextManager[None]:
        if self._stand_in is not None and rows.reader.reads_pages:
            return self._stand_in.attending()
        return reading_pages(False)

    def _place(self, rows: SessionRows, call: dict[str, Any]) -> None:
        """See to it that tokens stand where they are cached: at their place in the text, padding not counted.

        Raises ``UnsupportedError`` for other positions: others would find K that was turned another way.
        """
        assert rows.rows is not None
        ids = call["input_ids"]
        if (seen := rows.rows.seen(ids.shape[1])) is not None:
            if "position_ids" not in self._parameters:
                # Such models (RoFormer) place masks by their own count of columns.
                raise UnsupportedError(
                    "a compressed session cannot take a padded batch of a model without position_ids: "
                    "reset it, and give each text a session of its own"
                )
            call["attention_mask"] = torch.from_numpy(seen).to(ids.device, torch.long)
        given = call.get("position_ids")
        columns = call.get("cache_position")
        if given is not None and columns is None and given.numel() == 1 and rows.rows.pads == [0]:
            is_next = given.item() == rows.columns
            if is_next:
                return  # most steps: one token of one text
        if columns is not None and columns.tolist() != list(range(rows.columns, rows.columns + ids.shape[1])):
            raise UnsupportedError(
                f"a session of {rows.columns} columns cannot take a cache_position of other ones"
            )
        # Without padding the model's own count is right; with it, it counts the padding. Some models with
        # layers that keep a state count from 0 in every forward pass.
        is_told = (any(rows.rows.pads) or rows.states is not None) and "position_ids" in self._parameters
        if given is None and not is_told:
            return
        positions, is_token = rows.rows.positions(ids.shape[1])
        if given is None:
            call["position_ids"] = torch.from_numpy(positions).to(ids.device)
            return
        fits = given.dim() == 2 and given.shape[1] == positions.shape[1]
        if not fits or ((given.cpu().numpy() != positions) & is_token).any():
            raise UnsupportedError(
                "a session cannot take position_ids other than each token's place in its text"
            )
