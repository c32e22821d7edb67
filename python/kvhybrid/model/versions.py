"""What differs between the versions of transformers that are served: 4.57 and everything behind it.

Nothing else in the package asks for a version. What can be told from an argument or from a class is told
so, and not from a number: releases between those that are tested behave as their classes say.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any, Final

import transformers
from transformers import GenerationMixin
from transformers.cache_utils import Cache

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

OLDEST: Final = (4, 57)

# What ``forward`` and ``generate`` call the cache that they are given: since 5.24 the first.
CACHE_NAMES: Final = ("cache", "past_key_values")
_PREPARED: Final = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE: Final = next(name for name in CACHE_NAMES if name in _PREPARED)

# Since caches can record their past, ``crop`` counts what is to go; before, it named what is to stay.
_CROP_COUNTS: Final = hasattr(Cache, "activate_past_recording")


def _check(version: str) -> None:
    """Raise ``ImportError`` for a transformers that is older than those served."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST:
        raise ImportError(
            f"transformers {version} is installed, kvhybrid needs {'.'.join(map(str, OLDEST))} or newer: "
            "pip install --upgrade transformers"
        )


_check(transformers.__version__)


def over(cache: object) -> dict[str, Any]:
    """Return the argument by which ``forward`` and ``generate`` of this version take a cache."""
    return {CACHE: cache}


def with_cache_named(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call with its cache under this version's name, whichever name it came under.

    Of two the one of this version's name stays, as in transformers, unless it is None.
    """
    if not any(name in kwargs for name in CACHE_NAMES if name != CACHE):
        return kwargs
    named = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
    given = (kwargs.get(name) for name in (CACHE, *CACHE_NAMES))
    return named | over(next((cache for cache in given if cache is not None), None))


def columns_fed(query: int | torch.Tensor) -> int:
    """Return how many columns a forward pass brings, from the argument of ``Cache.get_mask_sizes``.

    Up to 5.3 it is a tensor of their positions, since then their number.
    """
    return query if isinstance(query, int) else int(query.shape[0])


def columns_kept(columns: int, argument: int) -> int:
    """Return how many of ``columns`` are kept by ``Cache.crop(argument)``; negative when there are too few.

    A negative argument removes so many in every version, a positive one keeps so many; 0 keeps none
    where ``crop`` names what is to stay, and removes none where it counts what is to go.
    """
    if argument < 0 or (argument == 0 and _CROP_COUNTS):
        return columns + argument
    return min(argument, columns)


def mask_function_of(kwargs: dict[str, Any]) -> Callable[..., torch.Tensor] | None:
    """Return what a mask is to be made from, out of the arguments of a registered mask function.

    Their names and order change with the versions (``cache_position`` became ``q_length`` and
    ``q_offset``); this one is there in all, by name.
    """
    found: Callable[..., torch.Tensor] | None = kwargs.get("mask_function")
    return found
