"""What an example prints at its end: how many tokens the model computed with and without kvhybrid.

Counted where tokens enter a model, at its embedding, so that the figure is the model's and not the cache's.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


@dataclass
class Count:
    """Tokens that went through the model while it was watched."""

    tokens: int = 0


@contextmanager
def counting(model: PreTrainedModel) -> Iterator[Count]:
    """Count the tokens that ``model`` computes inside the ``with`` block."""
    count = Count()

    def add(_: object, args: tuple[Any, ...]) -> None:
        count.tokens += args[0].numel()

    hook = model.get_input_embeddings().register_forward_pre_hook(add)
    try:
        yield count
    finally:
        hook.remove()


@dataclass(frozen=True)
class Saved:
    """One example's outcome: ``equal`` is whether every answer is the one that the bare model gave."""

    plain: int
    with_kvhybrid: int
    equal: bool
    what: str = "tokens computed"

    def __str__(self) -> str:
        share = 1 - self.with_kvhybrid / self.plain
        answers = "the same answers" if self.equal else "OTHER ANSWERS"
        return (
            f"{self.what}: {self.plain:,} without kvhybrid, {self.with_kvhybrid:,} with it "
            f"({share:.0%} saved), {answers}"
        )
