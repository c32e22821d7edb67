"""Attributes of objects whose classes keep them outside of a dictionary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvhybrid.model.watch.functions import is_of_a_library
from kvhybrid.model.watch.objects import UNSET

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["slots_of"]


def slots_of(item: object) -> Iterator[tuple[str, object]]:
    """Yield names and values of an object's slots, those of a library's classes left out."""
    for kind in type(item).__mro__:
        names = vars(kind).get("__slots__", ())
        if is_of_a_library(kind):
            continue
        for name in (names,) if isinstance(names, str) else tuple(names):
            if name in ("__dict__", "__weakref__"):
                continue
            is_private = name.startswith("__") and not name.endswith("__")
            full = f"_{kind.__name__.lstrip('_')}{name}" if is_private else name
            yield full, getattr(item, full, UNSET)
