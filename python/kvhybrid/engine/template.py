"""Whether a chat template can be appended to: what it puts behind an answer, and where two renderings part.

    turn 1   <user>Hello<end><assistant>
    turn 2   <user>Hello<end><assistant>[answer]<end><user>And?<end><assistant>      can be appended to
    turn 2   <user>1 of 2: Hello<end><assistant>[answer] ...                         parts: cannot

Knows a function that renders messages, and nothing of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from kvhybrid.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    Messages: TypeAlias = Sequence[dict[str, Any]]
    Render: TypeAlias = Callable[[Messages], str]

__all__ = ["ANSWER", "PartedError", "added_behind", "answered", "drops_reasoning", "obstacle_to_appending"]

# Stands for each answer when the chat is rendered again. The model's own tokens are kept, however the
# template would have spelt them (many strip spaces): what was cached stays a prefix.
ANSWER: Final = "[kvhybrid answer]"
REASONING: Final = "[kvhybrid reasoning]"
# As models write it that reason aloud, and as their templates look for it.
REASONED: Final = (
    f"<think>\n{REASONING}\n</think>\n\n{ANSWER}",
    f"[THINK]{REASONING}[/THINK]{ANSWER}",
)
# What users say: once as people write, once with spaces around that many templates strip.
QUESTIONS: Final = (
    ("What is the time?", "And the date?", "Thank you.", "Good night."),
    (" \n What is the time? ", "\n\nAnd the date?  ", "  Thank you.\n"),
)
# A template may show the time: the second between two renderings may be over once, and not thrice.
TRIES: Final = 3
AROUND: Final = 24


class PartedError(ValueError):
    """Two renderings part where one should go on behind the other; the message says where."""


def answered(content: str = ANSWER) -> dict[str, Any]:
    """Return the message that stands for an answer."""
    return {"role": "assistant", "content": content}


def added_behind(render: Render, past: Messages, following: Messages) -> str:
    """Return what the template puts behind the answer to ``past`` when ``following`` come next.

    Both renderings are made now: a date in them may be another than it was when ``past`` was answered.
    Raises ``PartedError`` unless one begins the other, and what ``render`` raises.
    """
    parting = ""
    for _ in range(TRIES):
        before = render(past) + ANSWER
        after = render([*past, answered(), *following])
        if after.startswith(before):
            return after[len(before) :]
        parting = _parting(before, after)
    raise PartedError(parting)


def obstacle_to_appending(render: Render) -> str | None:
    """Return why plain conversations cannot be appended to, None when they can."""
    for questions in QUESTIONS:
        past: list[dict[str, Any]] = []
        for i, question in enumerate(questions):
            following = [{"role": "user", "content": question}]
            try:
                if i > 0:
                    added_behind(render, past, following)
                    past.append(answered())
                else:
                    render(following)
            except InvalidRequestError as error:
                return f"it refuses a conversation of a user and an assistant in turn {i + 1} ({error})"
            except PartedError as error:
                return f"it renders turn {i} differently once turn {i + 1} follows ({error})"
            past += following
    return None


def drops_reasoning(render: Render) -> bool:
    """Return whether the reasoning of an answer is left out once the user has gone on."""
    first, second = ({"role": "user", "content": question} for question in QUESTIONS[0][:2])
    for content in REASONED:
        try:
            found = render([first, answered(content), second])
        except InvalidRequestError:
            continue
        if ANSWER in found and REASONING not in found:
            return True
    return False


def _parting(before: str, after: str) -> str:
    shorter = min(len(before), len(after))
    at = next((i for i in range(shorter) if before[i] != after[i]), shorter)
    start = max(at - AROUND, 0)
    old, new = (f"{text[start : at + AROUND]!r}" for text in (before, after))
    return f"at character {at} {old} becomes {new}"
