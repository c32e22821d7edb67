"""What a message says, in the shape that a chat template takes: one string, or a list of parts.

Clients send either. Templates that were written for strings print a list as Python would, or refuse it; those
that were written for parts find none in a string. Knows a function that renders messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvhybrid.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Shapes", "shapes_of"]

MARK: Final = "[kvhybrid content]"


class Shapes(NamedTuple):
    """Which shapes of content a template shows as they are meant."""

    strings: bool
    parts: bool

    def fit(self, message: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the message with its content in a shape that the template takes.

        Parts become one string with a line for each. Raises ``InvalidRequestError`` for a part that is no
        text when the template takes strings alone.
        """
        content = message.get("content")
        if isinstance(content, list | tuple) and self.strings and not self.parts:
            texts = [_text_of(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
            return {**message, "content": "\n".join(texts)}
        if isinstance(content, str) and self.parts and not self.strings:
            return {**message, "content": [{"type": "text", "text": content}]}
        return dict(message)


def shapes_of(render: Callable[[Sequence[dict[str, Any]]], str]) -> Shapes:
    """Return which shapes are shown, by trying both."""
    found = []
    for content in (MARK, [{"type": "text", "text": MARK}]):
        try:
            text = render([{"role": "user", "content": content}])
        except InvalidRequestError:
            text = ""
        # A list that is printed as it is has the names of its fields in it.
        found.append(MARK in text and "'type'" not in text and '"type"' not in text)
    return Shapes(*found)


def _text_of(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InvalidRequestError(f"{where}: the chat template takes text alone, this is {kind!r}")
