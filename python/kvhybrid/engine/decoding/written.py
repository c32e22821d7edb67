"""Decoders as the tokenizers library writes them down, read as steps: which decoder is which steps.

The library decodes whole lists of tokens. Here a step takes one token, or, behind the step that joins them,
one piece of text; it gives out what no later token can change and keeps the rest. Pieces joined are what
the library makes of the whole list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from kvhybrid.engine.decoding.of_text import ReplacedText, StrippedText
from kvhybrid.engine.decoding.of_tokens import (
    Bytes,
    FallbackBytes,
    Replaced,
    ReplacedPattern,
    Sounds,
    Spaced,
    Spaces,
    Stripped,
    Suffixes,
    WordPieces,
)
from kvhybrid.engine.decoding.steps import Step, Steps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["clean_up_steps", "steps_of"]

# What transformers replaces in a text with `clean_up_tokenization_spaces`, in this order.
CLEAN_UP: Final = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m")),
    *((" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)
# The library's list has one more.
LIBRARY_CLEAN_UP: Final = (*CLEAN_UP[:7], (" do not", " don't"), *CLEAN_UP[7:])


def steps_of(decoder: Mapping[str, Any] | None) -> Steps | None:
    """Return the steps of a decoder, described as the library writes it down; None for no decoder.

    None as the answer: it has parts that are not known, or whose text depends on all of it.
    """
    if decoder is None:
        return Steps([Spaced()])
    steps: list[Step] = []
    is_text = False
    for part in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        found = _text_steps(part) if is_text else _token_steps(part)
        if found is None:
            return None
        steps += found
        is_text = is_text or part["type"] in ("Fuse", "ByteLevel")
    return Steps(steps)


def clean_up_steps() -> list[Step]:
    """Return what ``clean_up_tokenization_spaces`` does to a whole text."""
    return [ReplacedText(old, new) for old, new in CLEAN_UP]


def _token_steps(part: Mapping[str, Any]) -> list[Step] | None:
    match part["type"]:
        case "Fuse":
            return []
        case "ByteLevel":
            return [Bytes()]
        case "ByteFallback":
            return [FallbackBytes()]
        case "Metaspace":
            return [Spaces(part["replacement"], _first_space(part))]
        case "WordPiece":
            return [WordPieces(part["prefix"], LIBRARY_CLEAN_UP if part["cleanup"] else ())]
        case "BPEDecoder":
            return [Suffixes(part["suffix"])]
        case "CTC":
            return [Sounds(_sound_replacements(part))]
        case "Strip":
            return [Stripped(part["content"], part["start"], part["stop"])]
        case "Replace":
            return _replacing_tokens(part["pattern"], part["content"])
    return None


def _text_steps(part: Mapping[str, Any]) -> list[Step] | None:
    match part["type"]:
        case "Fuse":
            return []
        case "Metaspace":
            first = _first_space(part)
            return [Spaces(part["replacement"], first, first)]
        case "WordPiece":
            return _replacing(LIBRARY_CLEAN_UP if part["cleanup"] else ())
        case "BPEDecoder":
            return _replacing([(part["suffix"], "")])
        case "CTC":
            return _replacing(_sound_replacements(part))
        case "Strip":
            return [StrippedText(part["content"], part["start"], part["stop"])]
        case "Replace" if old := part["pattern"].get("String"):
            return _replacing([(old, part["content"])])
    return None


def _replacing_tokens(pattern: Mapping[str, str], new: str) -> list[Step] | None:
    if old := pattern.get("String"):
        return [Replaced(old, new)]
    return [ReplacedPattern(pattern["Regex"], new)] if "Regex" in pattern else None


def _first_space(part: Mapping[str, Any]) -> str:
    return " " if part["prepend_scheme"] == "never" else ""


def _sound_replacements(part: Mapping[str, Any]) -> list[tuple[str, str]]:
    cleaned = [*LIBRARY_CLEAN_UP, (part["word_delimiter_token"], " ")] if part["cleanup"] else []
    return [(part["pad_token"], ""), *cleaned]


def _replacing(replacements: Sequence[tuple[str, str]]) -> list[Step] | None:
    # Nothing, replaced: what comes between any two characters. Nobody writes such a decoder.
    return None if any(not old for old, _ in replacements) else [ReplacedText(*pair) for pair in replacements]
