"""Carrying out what a plan demotes: in its order, or not at all.

Knows plans and the storage. Which page steps down is the pool's to say, how it is written the codec's.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from kvhybrid.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvhybrid._core import Plan
    from kvhybrid.cache.pages import PageStorage


def waves(pairs: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
    """Yield demotions in the runs that can be written at once: no page of a run is named twice in it."""
    start, named = 0, set[int]()
    for index, pair in enumerate(pairs):
        if not named.isdisjoint(pair):
            yield pairs[start:index]
            start, named = index, set()
        named.update(pair)
    if start < len(pairs):
        yield pairs[start:]


def demote(storage: PageStorage, plan: Plan) -> bool:
    """Quantize what a filled plan demotes, under ``storage.still``, before the plan writes anything.

    False: the codec refused a page, which stays in its class from now on, and the plan was abandoned; there
    may be room for it all the same. What was to follow a refused page, into its place perhaps, is undone.
    """
    pairs = plan.demotions
    tried, refused = 0, list[int]()
    for run in waves(pairs):
        taken = storage.quantize(run)
        refused = [tried + index for index, is_taken in enumerate(taken) if not is_taken]
        tried += len(run)
        if storage.states is not None:
            storage.states.move(pair for pair, is_taken in zip(run, taken, strict=True) if is_taken)
        if refused:
            plan.refuse(tried, refused)
            return False
    if pairs:
        plan.moved()
    return True


@contextmanager
def undone(plan: Plan) -> Iterator[Plan]:
    """Abandon a plan that is not finished when an exception comes: nobody else could plan until it is."""
    try:
        yield plan
    except BaseException:
        with suppress(ClosedError):
            plan.abandon()
        raise
