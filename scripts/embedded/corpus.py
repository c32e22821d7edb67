"""The training text as plain prose and as conversations.

The plays come as blocks, `SPEAKER:` and then the speech, parted by blank lines. Neighbouring
speeches make natural turns of a chat; showing a share of the text that way teaches the chat
template's special tokens, above all that a reply ends.
"""

import random
import re
from dataclasses import dataclass

Message = dict[str, str]

_BLOCK = re.compile(r"(?P<speaker>[^\n:]{1,40}):\n(?P<speech>.+)", re.DOTALL)
_LONGEST_SPEECH = 600
"""Characters. Replies in a chat should be short, so monologues stay out of the conversations."""


@dataclass(frozen=True)
class Speech:
    """One speaker's uninterrupted words."""

    speaker: str
    text: str


def split_text(text: str) -> tuple[str, str]:
    """Return the first 90 % of the characters, to learn from, and the last 10 %, to measure on."""
    cut = int(len(text) * 0.9)
    return text[:cut], text[cut:]


def scenes(text: str) -> list[list[Speech]]:
    """Return the runs of neighbouring speeches that are all short enough for a chat."""
    runs: list[list[Speech]] = [[]]
    for block in text.split("\n\n"):
        match = _BLOCK.fullmatch(block.strip("\n"))
        if match and len(match["speech"]) <= _LONGEST_SPEECH:
            runs[-1].append(Speech(match["speaker"], match["speech"]))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if len(run) >= 2]


def conversations(text: str, rng: random.Random) -> list[list[Message]]:
    """Return the scenes of `text` as chats of 1 to 6 exchanges, some with a system message.

    Half have none; a quarter name the parts being played; a quarter quote the speeches that
    came before, which is how an application would put a document before its question.
    """
    chats: list[list[Message]] = []
    for scene in scenes(text):
        start = 0
        while start + 2 <= len(scene):
            turns = scene[start : start + 2 * rng.randint(1, 6)]
            turns = turns[: len(turns) // 2 * 2]
            chat = _system_message(scene[:start], turns, rng)
            for index, speech in enumerate(turns):
                role = "assistant" if index % 2 else "user"
                chat.append({"role": role, "content": speech.text})
            chats.append(chat)
            start += len(turns)
    rng.shuffle(chats)
    return chats


def _system_message(before: list[Speech], turns: list[Speech], rng: random.Random) -> list[Message]:
    """Return no message or one, as `conversations` describes."""
    draw = rng.random()
    if draw < 0.5:
        return []
    if draw < 0.75 or not before:
        content = f"You are {turns[1].speaker}. You speak with {turns[0].speaker}."
    else:
        quoted = before[-rng.randint(2, 12) :]
        content = "\n\n".join(f"{speech.speaker}:\n{speech.text}" for speech in quoted)
    return [{"role": "system", "content": content}]
