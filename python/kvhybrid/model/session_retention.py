"""``SessionRetention``: how long a session's text is wanted, applied whenever its pages are let go of.

Holds pins between calls; knows tokens and namespaces, and neither rows under way nor the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvhybrid.errors import CapacityError
from kvhybrid.model.compressed import shared_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvhybrid._core import PagePool, Pin
    from kvhybrid._core import Sequence as Running
    from kvhybrid.cache.retention import Retention
    from kvhybrid.model.rows import Text

__all__ = ["SessionRetention"]


class SessionRetention:
    """What is said of one session: its priority and time to live, and whether it is pinned.

    What others had computed before the session's first prompt asked for it is theirs, too: it is pinned with
    the rest, but gets no end and no lower priority from this session.
    """

    def __init__(self, pool: PagePool) -> None:
        self.is_pinned = False
        self.num_unpinned_calls = 0
        """Calls after which what had been added could not be pinned, too."""
        self._pool = pool
        self._retention: Retention | None = None
        self._pins: list[Pin] = []
        self._namespace: int | None = None
        self._start: int | None = None
        self._texts: Sequence[Text] = ()

    @property
    def said(self) -> Retention | None:
        """As what its texts are retained; None: as any other."""
        return self._retention

    @property
    def start(self) -> int | None:
        """Where the session's own text begins; None before the first."""
        return self._start

    def begin(self, namespace: int, texts: Sequence[Text], found: Sequence[int]) -> None:
        """Note where texts are kept that are being opened, and how much of them was found there."""
        self._namespace = namespace
        own = [shared_tokens(before, text) for before, text in zip(self._texts, texts, strict=False)]
        if (
            self._start is None
            or len(own) < len(texts)
            or any(f > o for f, o in zip(found, own, strict=True))
        ):
            self._start = min(found, default=0)

    def let_go(self, sequences: Sequence[Running]) -> None:
        """Say as what texts are retained that are about to be closed."""
        if (said := self._retention) is not None:
            for sequence in sequences:
                sequence.retain(said.priority, said.ttl_s, start=self._start or 0)

    def rest(self, texts: Sequence[Text]) -> None:
        """Pin what was let go of, too; where users may not pin so much, what was pinned before stays so."""
        self._texts = texts
        if self.is_pinned:
            try:
                self.pin(texts)
            except CapacityError:
                self.num_unpinned_calls += 1

    def retain(self, texts: Sequence[Text], retention: Retention | None) -> None:
        """Retain these texts so now, and when they are let go of later; None: as any other."""
        before, self._retention = self._retention, retention
        if retention is not None:
            self._apply(texts, retention.priority, retention.ttl_s)
        elif before is not None:
            self._apply(texts, 0, None)

    def pin(self, texts: Sequence[Text]) -> int:
        """Pin these texts, and no others; return how many tokens are.

        Raises ``CapacityError``: all is as it was.
        """
        namespace = self._namespace
        pins = [] if namespace is None else [self._pool.pin(text, namespace) for text in texts]
        before, self._pins, self.is_pinned = self._pins, pins, True
        _release(before)
        return sum(pin.num_tokens for pin in pins)

    def unpin(self) -> None:
        """Pin nothing any more."""
        before, self._pins, self.is_pinned = self._pins, [], False
        _release(before)

    def retire(self, texts: Sequence[Text], *, always: bool = False) -> None:
        """Say that the session is over: what was retained for it, or ``always``, is the first to leave."""
        was_retained = self._retention is not None or self.is_pinned
        self.unpin()
        if was_retained or always:
            self._retention = None
            self._apply(texts, 0, 0.0)

    def forget(self) -> None:
        """Forget the text: the next one begins anew, retained and pinned as this one was."""
        before, self._pins, self._start, self._texts = self._pins, [], None, ()
        _release(before)

    def follow(self, other: SessionRetention) -> None:
        """Be retained as ``other``, of which this is a fork; it is not pinned."""
        self._retention, self._namespace = other._retention, other._namespace
        self._start, self._texts = other._start, other._texts

    def _apply(self, texts: Sequence[Text], priority: int, ttl_s: float | None) -> None:
        if self._namespace is None:
            return
        for text in texts:
            start = min(self._start or 0, len(text))
            self._pool.retain(text, self._namespace, start=start, priority=priority, ttl_s=ttl_s)


def _release(pins: Sequence[Pin]) -> None:
    for pin in pins:
        pin.release()
