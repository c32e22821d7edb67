"""What is inside a tokenizer of transformers: its native part, a copy of it, and what tells that it changed.

Knows transformers' and the tokenizers library's classes, in both of their generations; holds nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CLEANING",
    "added_tokens_of",
    "backend_of",
    "cleans_up",
    "copied",
    "has_usual",
    "is_panic",
    "special_tokens_of",
    "state_of",
]

# What a call sets on a tokenizer, or only speaks of cutting and padding, which are off in ours.
NOT_OURS: Final = frozenset({"padding_side", "truncation_side", "model_max_length", "verbose"})
CLEANING: Final = "clean_up_tokenization"
"""The method that cleans up a decoded text."""
TRIES: Final = 3


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """Return the native part of a fast tokenizer; None where there is none."""
    found = getattr(tokenizer, "_tokenizer", None)
    return found if isinstance(found, Tokenizer) else None


def copied(given: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """Return a copy that shares nothing that a call changes; None when there is none to be had."""
    backend = backend_of(given)
    own = given
    for _ in range(TRIES):  # its owner may be adding tokens meanwhile
        try:
            own = copy.deepcopy(given)
            break
        except Exception:  # noqa: BLE001, S112  # whatever stands in the way of a copy, there is another way
            continue
    if own is not given and (backend is None or backend_of(own) is not backend):
        return own
    if backend is None or (rebuilt := _rebuilt(backend)) is None:
        return None
    try:
        own = copy.copy(given)
        own._tokenizer = rebuilt  # noqa: SLF001  # no public way to replace it
    except Exception:  # noqa: BLE001  # as above
        return None
    return own if own is not given else None


def _rebuilt(backend: Tokenizer) -> Tokenizer | None:
    """Return a tokenizer of the same parts, for those with parts in Python, which cannot be copied."""
    own = Tokenizer(backend.model)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (part := getattr(backend, name)) is not None:
            setattr(own, name, part)
    own.encode_special_tokens = backend.encode_special_tokens
    added = backend.get_added_tokens_decoder()
    own.add_tokens([added[number] for number in sorted(added)])
    return own if own.get_added_tokens_decoder() == added else None


def state_of(given: PreTrainedTokenizerBase, *, with_added: bool) -> tuple[Any, ...]:
    """Return what decides how texts become tokens, cheaply; equal as long as nothing was changed."""
    plain = {
        name: value
        for name, value in vars(given).items()
        if name not in NOT_OURS and (value is None or isinstance(value, str | int | float))
    }
    template = given.chat_template
    found: list[Any] = [
        len(given),
        repr(given.special_tokens_map),
        dict(template) if isinstance(template, Mapping) else template,
        plain,
    ]
    if (backend := backend_of(given)) is not None:
        found.append(_written(backend.post_processor))
    if with_added:
        found.append(added_tokens_of(given))
    return tuple(found)


def _written(part: Any) -> object:
    """Return a part of a native tokenizer in a form that compares by content."""
    try:
        return None if part is None else part.__getstate__()
    except Exception:  # noqa: BLE001  # a part in Python: which one it is must do
        return type(part)


def special_tokens_of(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return what decoding leaves out with ``skip_special_tokens``."""
    if backend_of(tokenizer) is None:
        return dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {i: token.content for i, token in added_tokens_of(tokenizer).items() if token.special}


def added_tokens_of(tokenizer: PreTrainedTokenizerBase) -> dict[int, AddedToken]:
    """Return the tokens that were added, by their ids."""
    found: object = getattr(tokenizer, "added_tokens_decoder", None)
    return dict(found) if isinstance(found, Mapping) else {}  # some tokenizers take none


def cleans_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a decoded text is cleaned up, and in the usual way."""
    if not tokenizer.clean_up_tokenization_spaces or not has_usual(tokenizer, CLEANING):
        return False
    # Newer versions of transformers do not do it to BPE, unless asked twice.
    forced = getattr(
        tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", True
    )
    backend = backend_of(tokenizer)
    return bool(forced) or backend is None or not isinstance(backend.model, BPE)


def has_usual(tokenizer: PreTrainedTokenizerBase, *names: str) -> bool:
    """Return whether methods are those of transformers' own base classes."""
    return all(
        name not in vars(tokenizer)
        and getattr(type(tokenizer), name).__module__.startswith("transformers.tokenization_")
        for name in names
    )


def is_panic(error: BaseException) -> bool:
    """Return whether a native library has failed; its own kind of error is not an ``Exception``."""
    return type(error).__name__ == "PanicException"
