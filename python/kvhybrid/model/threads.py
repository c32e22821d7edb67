"""Running torch where it leaves nothing behind.

OpenMP keeps a team of workers for every thread that ever computed. Once the teams together outnumber the
cores, their workers sleep after each operation instead of waiting awake, and a step of a small model
takes about twice as long. What is computed once runs in a thread of its own, whose team ends with it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


def in_own_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what ``call`` returns, or raise what it raises, computed in a thread that ends with it."""
    with ThreadPoolExecutor(1, thread_name_prefix="kvhybrid once") as once:
        return once.submit(call, *args, **kwargs).result()
