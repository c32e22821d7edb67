"""``Namespaces``: the numbers under which the pool keeps pages apart, and the names that they were given for.

A name is a tuple of text: ``("tenant", tenant, ...)``. Knows which names still have pages; not what they
mean.
"""

from __future__ import annotations

import itertools
import threading
from array import array
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvhybrid._core import PagePool

    Parts: TypeAlias = tuple[str, ...]

LEAST_KEPT: Final = 1024
"""So many names are kept although nothing is cached under them: what was evicted there is still known."""
TENANT: Final = "tenant"


class Namespaces:
    """Names and their numbers. No number is ever given out twice, so two names never share pages.

    Names under which the pool holds nothing are forgotten, the one used longest ago first, once there are
    many.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._lock = threading.RLock()
        self._numbers: dict[Parts, int] = {}  # in order of use
        self._by_tenant: dict[str, dict[Parts, int]] = {}
        self._next = itertools.count()
        self._most = 4 * LEAST_KEPT

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, *parts: str) -> int:
        """Return the number of a name; the same one for as long as anything is cached under it."""
        with self._lock:
            number = self._numbers.pop(parts, None)
            if number is None:
                if len(self._numbers) >= self._most:
                    self._forget_unused()
                number = next(self._next)
                if parts[:1] == (TENANT,):
                    self._by_tenant.setdefault(parts[1], {})[parts] = number
            self._numbers[parts] = number
            return number

    def private(self) -> int:
        """Return a number without a name: nothing under it is ever found again."""
        return next(self._next)

    def of_tenant(self, tenant: str) -> list[int]:
        """Return the numbers of a tenant's names."""
        with self._lock:
            return list(self._by_tenant.get(tenant, {}).values())

    def drop(self, is_gone: Callable[[Parts], bool]) -> int:
        """Forget the names whose parts ``is_gone``, evict their pages and return how many were evicted.

        Pages in use there are evicted later: the same name gets another number.
        """
        with self._lock:
            gone = [parts for parts in self._numbers if is_gone(parts)]
            numbers = [self._forget(parts) for parts in gone]
        return sum(self._pool.drop(number) for number in numbers)

    def _forget(self, parts: Parts) -> int:
        if parts[:1] == (TENANT,):
            names = self._by_tenant[parts[1]]
            del names[parts]
            if not names:
                del self._by_tenant[parts[1]]
        return self._numbers.pop(parts)

    def _forget_unused(self) -> None:
        """Forget names without pages, but for those used last; look again once there are twice as many."""
        names = list(self._numbers)[:-LEAST_KEPT]
        known = self._pool.which_exist(array("q", (self._numbers[parts] for parts in names)))
        for parts, exists in zip(names, known, strict=True):
            if not exists:
                self._forget(parts)
        self._most = max(2 * len(self._numbers), 4 * LEAST_KEPT)
