"""What callers say, read once: text that is no text is found here, and what they may change later is copied.

Knows plain data (strings, lists, mappings) and neither requests nor templates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["check_text", "copied", "without_none"]

# Half of a character of UTF-16. Python's strings may hold them (`json.loads` and file names bring them
# along), but no text does: they cannot be encoded, so neither tokenized nor written down.
PAIR: Final = re.compile("[\ud800-\udbff][\udc00-\udfff]")
# Deeper than any chat: what contains itself ends here, too.
MAX_DEPTH: Final = 64


def check_text(text: str, where: str) -> None:
    """Raise ``ValueError`` saying what is wrong and ``where``, unless ``text`` can be encoded.

    A pair of surrogates is refused as a single one is: it is a character that was decoded in halves, and
    putting it together would be a guess at what was meant.
    """
    if text.isascii():
        return
    try:
        text.encode()  # the quickest way to look at a long text
    except UnicodeEncodeError as error:
        at = error.start
    else:
        return
    if PAIR.match(text, at):
        what = (
            f"{text[at : at + 2]!a} is one character decoded in two halves: "
            "put it together with .encode('utf-16', 'surrogatepass').decode('utf-16')"
        )
    else:
        what = f"{text[at]!a} is half of a surrogate pair, no character"
    raise ValueError(f"{where}: position {at}: {what}")


def copied(value: Any, where: str, depth: int = 0) -> Any:
    """Return a copy of plain data that its owner may change afterwards; other objects stay what they are.

    Raises ``ValueError`` for text in it that cannot be encoded (keys included), and for what is nested too
    deeply.
    """
    if isinstance(value, str):
        check_text(value, where)
        return value
    if not isinstance(value, Mapping | list | tuple):
        return value
    if depth == MAX_DEPTH:
        raise ValueError(f"{where[:80]}...: is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        for key in value:
            if isinstance(key, str):
                check_text(key, f"{where}, the key {key!a}")
        return {key: copied(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    items = [copied(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    return items if isinstance(value, list) else tuple(items)


def without_none(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message without its fields that are None.

    Clients send ``content=None`` beside tool calls. Templates that print it would say "None", and newer
    versions of transformers leave such fields out, too.
    """
    return {name: value for name, value in message.items() if value is not None}
