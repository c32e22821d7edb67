"""The door: a request's text becomes tokens, and whether they can be served is settled before they queue.

Runs in a worker thread, because long texts take long. Knows the tokenizer, the vocabulary and the
budget; queues nothing and stores nothing.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvhybrid._core import TokenBuffer
from kvhybrid.engine.own_tokenizer import OwnTokenizer, Tokenizers
from kvhybrid.errors import CapacityError, InvalidRequestError, UnsupportedError
from kvhybrid.model.padding import check_ids, vocab_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvhybrid.engine.held import Held
    from kvhybrid.engine.request import Request

__all__ = ["WHOLE_CHATS", "Door", "Prompt"]

DEFAULT_MAX_LENGTH: Final = 256
WHOLE_CHATS: Final = (
    "pass the whole chat to process_request each turn, which finds cached what stayed the same"
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request came to: its tokens, and how many may follow."""

    tokens: TokenBuffer
    max_length: int
    text: str | None = None
    """What they were rendered from."""
    held: Held | None = None
    """Where its conversation's compressed text lies between turns."""
    own_from: int | None = None
    """From where on it is its conversation's own; None: from what is found cached on."""


class Door:
    """Reads prompts for one model with room for ``capacity`` tokens."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, capacity: int
    ) -> None:
        self._model = model
        self._tokenizers = None if tokenizer is None else Tokenizers(tokenizer)
        self._end_ids: frozenset[int] | None = None
        with contextlib.suppress(UnsupportedError):  # whoever wants a session is told; tried here, at leisure
            self.check_appending(keep_reasoning=False)
        self.capacity = capacity
        config = model.config.get_text_config(decoder=True)
        self.context = int(getattr(config, "max_position_embeddings", None) or 0)

    @property
    def tokenizer(self) -> OwnTokenizer | None:
        """Our copy of the tokenizer, as it was when a prompt was last read."""
        return None if self._tokenizers is None else self._tokenizers.last

    def check_appending(self, *, keep_reasoning: bool) -> None:
        """Raise ``UnsupportedError`` if a conversation cannot be rendered by appending to it."""
        if self._tokenizers is None:
            return
        tokenizer = self._tokenizers.look()
        if (obstacle := tokenizer.obstacle_to_appending) is not None:
            raise UnsupportedError(f"the chat template cannot be appended to: {obstacle}; {WHOLE_CHATS}")
        if tokenizer.drops_reasoning and not keep_reasoning:
            raise UnsupportedError(
                "the chat template cannot be appended to: it leaves out the reasoning of an answer once "
                "another turn follows; pass keep_reasoning=True to have it stay in the conversation, or "
                f"{WHOLE_CHATS}"
            )

    @property
    def has_template(self) -> bool:
        """Whether messages can be rendered."""
        return self._tokenizers is not None and self._tokenizers.has_template

    @property
    def vocab_size(self) -> int:
        """How many token ids the model has embeddings for now."""
        return vocab_size(self._model)

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer now; setting it ends answers there whatever the model says."""
        return _end_ids(self._model, self.tokenizer) if self._end_ids is None else self._end_ids

    @end_ids.setter
    def end_ids(self, ids: frozenset[int]) -> None:
        self._end_ids = ids

    def end_text(self, token: int) -> str:
        """Return how the template spells a token that ends answers; empty for any other token."""
        if token not in self.end_ids or self.tokenizer is None:
            return ""
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def prepare(self, request: Request) -> Prompt:
        """Return the request's prompt.

        Raises ``InvalidRequestError`` for an empty prompt, unknown tokens or what needs a tokenizer that
        is not there; ``CapacityError`` when prompt and answer do not fit into the budget.
        """
        if request.stop and self._tokenizers is None:
            raise InvalidRequestError(f"stop={request.stop!r}: needs a tokenizer, the engine has none")
        if request.token_ids is not None:
            tokens = self.read(request.token_ids)
        elif request.messages is not None:
            tokens = self.encode(self.render(request.messages), special=False)
        else:
            assert request.text is not None
            tokens = self.encode(request.text, special=True)
        return self.fit(TokenBuffer(tokens), request)

    def fit(self, tokens: TokenBuffer, request: Request, text: str | None = None) -> Prompt:
        """Return the prompt with as many new tokens as it may have; raises as ``prepare`` does."""
        if len(tokens) == 0:
            raise InvalidRequestError("the prompt is empty: it has 0 tokens")
        wanted = request.max_length if request.max_length is not None else 1
        for limit, name in ((self.capacity, "the cache's budget"), (self.context, "the model's context")):
            if limit and len(tokens) + wanted > limit:
                raise CapacityError(
                    f"a prompt of {len(tokens)} tokens and {wanted} new ones exceed {name} of {limit} tokens"
                )
        if request.max_length is not None:
            return Prompt(tokens, request.max_length, text)
        room = min(limit for limit in (self.capacity, self.context) if limit) - len(tokens)
        return Prompt(tokens, min(DEFAULT_MAX_LENGTH, room), text)

    def encode(self, text: str, *, special: bool, behind: str | None = None) -> npt.NDArray[np.uint32]:
        """Return the text's tokens; ``special``: with what the tokenizer puts around a text.

        ``behind``: the text goes on behind another, and this is how that ends, if anything is known of it.
        """
        if self._tokenizers is None:
            raise InvalidRequestError("text needs a tokenizer, the engine has none: pass token_ids")
        own = self._tokenizers.look()
        ids = own.encode(text, special=special) if behind is None else own.encode_behind(behind, text)
        return self.read(ids) if ids else np.empty(0, np.uint32)

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """Return the chat as text, ready for an answer.

        Raises ``InvalidRequestError`` without a template, or with the template's own objection.
        """
        if self._tokenizers is None:
            raise InvalidRequestError("messages need a tokenizer with a chat template: pass text")
        return self._tokenizers.look().render(messages)

    def check(self, tokens: TokenBuffer) -> None:
        """Raise ``InvalidRequestError`` unless the model has embeddings for all of these tokens now."""
        if len(tokens):
            check_ids(np.frombuffer(tokens.tobytes(), np.uint32), self.vocab_size)

    def read(self, token_ids: Any) -> npt.NDArray[np.uint32]:
        """Return ``token_ids`` as an array.

        Raises ``InvalidRequestError`` unless they are whole numbers, one-dimensional, at least one, all
        of them in the vocabulary.
        """
        with contextlib.suppress(AttributeError):
            token_ids = token_ids.numpy(force=True)  # a tensor, whatever its device
        try:
            ids = np.asarray(token_ids)
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidRequestError(f"token_ids are no array of whole numbers: {error}") from error
        if ids.size == 0:
            raise InvalidRequestError("the prompt is empty: token_ids has 0 tokens")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InvalidRequestError(
                f"token_ids must be whole numbers in one dimension, got {ids.dtype} {list(ids.shape)}"
            )
        check_ids(ids, self.vocab_size)
        return ids.astype(np.uint32)


def _end_ids(model: PreTrainedModel, tokenizer: OwnTokenizer | None) -> frozenset[int]:
    """The tokens that end an answer: those that end ``model.generate``, else the tokenizer's."""
    config = getattr(model, "generation_config", None) or model.config
    for source in (config, tokenizer and tokenizer.tokenizer):
        found: Any = getattr(source, "eos_token_id", None)
        with contextlib.suppress(AttributeError):
            found = found.tolist()  # a tensor
        if found is not None:
            return frozenset(found if isinstance(found, list | tuple) else [found])
    return frozenset()
