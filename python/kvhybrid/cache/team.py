"""The threads that native kernels run on: torch's own, where its runtime can be found."""

from __future__ import annotations

import ctypes
from functools import cache


@cache
def team_address() -> int:
    """Return the address of ``GOMP_parallel``, with which torch's own threads do our work, or 0.

    Its threads spin between torch's calls, so that any others would have to fight them for the cores.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # another runtime, or a system whose symbols are not global
        return 0
    return ctypes.cast(parallel, ctypes.c_void_p).value or 0
