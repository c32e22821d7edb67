"""Compressing a session: its rows' context is rewritten into pages of its own, and the originals are let go.

Knows a session's rows and how many tokens are to stay. The text itself is remembered whole: whoever comes
with another one, or finds the pages gone, has it computed again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvhybrid.cache.compress.scorers import NEED_QUERIES, SCORERS
from kvhybrid.cache.memory import is_out_of_memory
from kvhybrid.errors import CapacityError, InvalidRequestError
from kvhybrid.model.rows import Rows
from kvhybrid.model.shorten import Computed, removable, shorten

if TYPE_CHECKING:
    import torch

    from kvhybrid.cache.compress.scorers import Queries
    from kvhybrid.model.rows import Text
    from kvhybrid.model.session_rows import SessionRows
    from kvhybrid.presets import CompressionScorer


def compress(session: SessionRows, kept: float, scorer: CompressionScorer) -> int:
    """Keep a share ``kept`` of the session's old tokens; return how many of all rows' went.

    The share is of the whole text's: compressed again, a text loses what has become old since. Raises
    ``CapacityError`` without room for both, ``InvalidRequestError`` when the queries that ``scorer`` asks for
    were not seen; the session is then as it was.
    """
    rows = session.rows
    if rows is None:
        raise InvalidRequestError(f"session {session.name!r} holds nothing yet")
    if rows.columns < max(rows.pads):
        raise InvalidRequestError(f"some row of session {session.name!r} is padding alone so far")
    rows.take_back()
    texts = [text.copy() for text in rows.held()]
    computed = list(map(Computed, rows.sequences, texts, rows.fronts))
    removed = removable(computed, kept)
    if removed == 0:
        return 0
    queries = _queries(session, texts, scorer)

    def score(layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return SCORERS[scorer](keys, values, queries.get((layer, row)))

    short = shorten(session.cache, computed, kept, score)
    fronts = [each.front for each in short]
    gap = min(pad + front.removed for pad, front in zip(rows.pads, fronts, strict=True))
    fresh = [each.sequence for each in short]
    session.replace(Rows(session.cache, fresh, list(rows.pads), rows.columns, fronts, gap))
    return removed


def compress_turn(session: SessionRows, kept: float, scorer: CompressionScorer) -> int:
    """Compress behind a turn, if that can be done: else the session stays as it is, and that is counted.

    There may be no room, or, behind somebody's own way to generate, no text or no queries seen.
    """
    try:
        return compress(session, kept, scorer)
    except InvalidRequestError:
        session.cache.compressed.skipped()
        return 0
    except (CapacityError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        session.cache.compressed.skipped()
        return 0


def _queries(
    session: SessionRows, texts: list[Text], scorer: CompressionScorer
) -> dict[tuple[int, int], Queries]:
    """Return the queries that ``scorer`` asks for, by layer and row."""
    if scorer not in NEED_QUERIES:
        return {}
    observed, found = session.observed, {}
    for layer in session.cache.layout.kept_layers:
        for row, text in enumerate(texts):
            queries = observed.queries(layer, row, len(text) - 1) if observed is not None else None
            if queries is None:
                why = (
                    f"set compression_scorer={scorer.value!r} in the configuration, so that they are kept"
                    if observed is None
                    else "run it through generate or forward first"
                )
                raise InvalidRequestError(
                    f"{scorer.value} scores by the queries of the last tokens, and of session "
                    f"{session.name!r} none were seen in layer {layer}: {why}"
                )
            found[layer, row] = queries
    return found
