"""Structured output with outlines: JSON of one shape, many times, behind one long prompt.

outlines masks the logits at every step and leaves the rest to ``model.generate``. The rules and the schema in
front of every call are computed once.
"""

from __future__ import annotations

from typing import Literal

import outlines
from pydantic import BaseModel, Field
from saved import Saved, counting

import kvhybrid
from kvhybrid.model.load import load_model


class Report(BaseModel):
    """What the clerk writes down of a message."""

    place: Literal["harbour", "bridge", "tower", "field"]
    men: str = Field(pattern="^[0-9]{1,4}$")
    urgent: bool


RULES = f"""You are the king's clerk. Read the message and write down where it comes from, how many men it
tells of, and whether the king must hear it tonight. Write nothing else. A message of ships comes from the
harbour, a message of prisoners from the tower. Where no number is told, write 0. What the king must hear
tonight is whatever cannot be helped tomorrow. Write JSON of this shape:
{Report.model_json_schema()}

Message: """
MESSAGES = [
    "The ships are come, my lord, with forty men.",
    "The bridge is taken, and three hundred stand on it.",
    "The prisoner asks for a priest.",
    "York is in the field with five thousand men!",
    "The ships are come, my lord, and nobody is aboard.",
]


def main() -> Saved:
    """Have every message written down, without kvhybrid and with it."""
    model, tokenizer = load_model()  # the small model inside the package; yours goes here
    tokenizer.chat_template = None  # outlines would wrap each prompt as a chat
    clerk = outlines.Generator(outlines.from_transformers(model, tokenizer), Report)

    def write_down() -> list[str]:
        return [clerk(f"{RULES}{text}\n", max_new_tokens=60, do_sample=False) for text in MESSAGES]

    with counting(model) as plain:
        expected = write_down()
    with kvhybrid.attach(model) as attachment, counting(model) as cached:
        answers = write_down()
        stats = attachment.cache.get_stats()

    for text, answer in zip(MESSAGES, answers, strict=True):
        print(f"{text}\n    {Report.model_validate_json(answer)!r}")
    print(f"prompt tokens: {stats['queried_tokens']:,}, of them cached {stats['cached_tokens']:,}")
    saved = Saved(plain.tokens, cached.tokens, answers == expected)
    print(saved)
    return saved


if __name__ == "__main__":
    main()
