"""The conversations that the demo holds: one long opening that all share, and a line a turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvhybrid.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPENING = """\
SCENE. A counting-house above the harbour. Enter the STEWARD, with two CLERKS and a great book.

STEWARD:
Good morrow, masters. Ere the tide be turned
There come a hundred captains to this door,
And every captain hath the selfsame tale:
Whence he set out, what wind, what weather met,
What port he made, and what the king's man said.
Ye write it fair, each time, from first to last,
As though no pen had ever writ the like.

FIRST CLERK:
So were we taught, my lord; a page begun
Must needs begin at the beginning still.

STEWARD:
Then be untaught. For what is written once,
And is the same, is written well enough.
Keep me the common leaves within this book;
And when a captain comes, read on with him
So far as all his words and ours agree,
And where they part, there take thy pen, and write.

SECOND CLERK:
And if he have a word that is not there?

STEWARD:
Then is it new, and new things must be writ.
But never shall one captain's private leaf
Be read aloud to serve another's tale.
The opening is all men's; the rest, his own.

FIRST CLERK:
And when the book is full, my lord, what then?

STEWARD:
Then tear the last leaf of the oldest tale,
And never tear the leaf on which men stand.

[A bell within. The CLERKS take their places.]
"""

LINES = (
    "Good steward, tell me, what is in thy book?",
    "How many ships are in the harbour now?",
    "Who was the last that came before the tide?",
    "And shall the king himself come here to-day?",
    "Read me the leaf that all the captains share.",
    "What says the clerk who sits beside the door?",
    "I have a tale that no man told before.",
    "Then write it fair, and let me hear it read.",
)
REPEATS = 2  # the opening is read twice: about a thousand tokens of the embedded model
ANSWER_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """Token ids of the opening and of every line; answers are ``answer_tokens`` long."""

    opening: list[int]
    lines: list[list[list[int]]]
    answer_tokens: int

    @property
    def num_sessions(self) -> int:
        """How many conversations there are."""
        return len(self.lines)

    @property
    def num_turns(self) -> int:
        """Turns of all conversations together."""
        return sum(map(len, self.lines))

    @property
    def total_tokens(self) -> int:
        """Room that all conversations take side by side, sharing nothing."""
        own = sum(len(line) + self.answer_tokens for lines in self.lines for line in lines)
        return self.num_sessions * (len(self.opening) + 64) + own

    def transcripts(self) -> list[list[int]]:
        """Return each conversation's tokens before its first line."""
        return [list(self.opening) for _ in self.lines]

    def turns(self) -> Iterator[tuple[int, list[int]]]:
        """Yield ``(session, line)``, turn by turn, the sessions taking turns as users do."""
        for turn in range(len(self.lines[0])):
            for session, lines in enumerate(self.lines):
                yield session, lines[turn]


def write_conversations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, sessions: int, turns: int
) -> Conversations:
    """Tokenise the demo's conversations for a model.

    Raises ``InvalidRequestError`` when they do not fit into the positions that the model knows.
    """
    opening = tokenizer(OPENING * REPEATS)["input_ids"]
    lines = [
        [
            tokenizer(
                f"\nCAPTAIN {session + 1}:\n{LINES[(session + turn) % len(LINES)]}\n\nSTEWARD:\n",
                add_special_tokens=False,
            )["input_ids"]
            for turn in range(turns)
        ]
        for session in range(sessions)
    ]
    longest = len(opening) + max(sum(len(line) + ANSWER_TOKENS for line in talk) for talk in lines)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise InvalidRequestError(
            f"a conversation of {turns} turns takes {longest} tokens, the model knows {positions} positions"
        )
    return Conversations(opening=opening, lines=lines, answer_tokens=ANSWER_TOKENS)
