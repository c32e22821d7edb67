"""The engine's own copy of the caller's tokenizer, and when another copy is due.

A tokenizer has state that its owner sets: calling it with truncation or padding leaves both behind for
whoever encodes next, and doing so while another thread encodes is an error. The caller's is read, and
never called or changed. Knows no requests.
"""

from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from kvhybrid.engine.content import Shapes, shapes_of
from kvhybrid.engine.decoding.answers import ByToken, Windows
from kvhybrid.engine.decoding.steps import Steps
from kvhybrid.engine.decoding.written import clean_up_steps, steps_of
from kvhybrid.engine.messages import without_none
from kvhybrid.engine.template import drops_reasoning, obstacle_to_appending
from kvhybrid.engine.tokenizer_parts import (
    CLEANING,
    added_tokens_of,
    backend_of,
    cleans_up,
    copied,
    has_usual,
    is_panic,
    special_tokens_of,
    state_of,
)
from kvhybrid.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from kvhybrid.engine.decoding.answers import Decoding

__all__ = ["OwnTokenizer", "Tokenizers"]

# Of more than so many, reading them all takes milliseconds a request.
MOST_COMPARED: Final = 512
# So many tokens of a vocabulary are decoded to see whether a decoder is what its name says.
SAMPLE: Final = 512
# What a text may stand behind without becoming one token with it: one of these will do.
ANCHORS: Final = ("x", ".", "0", "\n")


class Tokenizers:
    """The caller's tokenizer, and our copy of what it was when somebody last looked."""

    def __init__(self, given: PreTrainedTokenizerBase) -> None:
        self._given = given
        self._lock = Lock()
        self._with_added = len(added_tokens_of(given)) <= MOST_COMPARED
        self._state = state_of(given, with_added=self._with_added)
        self.last = OwnTokenizer(given)
        """The copy of the last look."""

    def look(self) -> OwnTokenizer:
        """Return the copy, made anew if the caller has changed what texts become since the last look.

        Noticed: tokens added, special tokens and the chat template set, plain attributes (``add_bos_token``,
        ``split_special_tokens`` ...), another post-processor. Not noticed: an ordinary token declared
        special in a tokenizer with more than 512 added ones, and a normalizer, pre-tokenizer, model or
        decoder put in the place of another: these need another engine.
        """
        with self._lock:
            if (state := state_of(self._given, with_added=self._with_added)) != self._state:
                self._state, self.last = state, OwnTokenizer(self._given)
            return self.last

    @property
    def has_template(self) -> bool:
        """Whether the caller's tokenizer renders chats now."""
        return bool(self._given.chat_template)


class OwnTokenizer:
    """A copy that nobody else has, with truncation and padding off; any number of threads may use it.

    Tokenizers in Python are used by one thread at a time. One that cannot be copied is used by one thread
    of ours at a time, and has truncation and padding off for the length of a call.
    """

    def __init__(self, given: PreTrainedTokenizerBase) -> None:
        own = copied(given)
        self.tokenizer: PreTrainedTokenizerBase = given if own is None else own
        self.is_copy = own is not None
        backend = backend_of(self.tokenizer)
        if backend is not None and self.is_copy:
            backend.no_truncation()
            backend.no_padding()
            self._turn: AbstractContextManager[Any] = nullcontext()
        else:
            self._turn = Lock()
        self.special_tokens = special_tokens_of(self.tokenizer)
        """How the tokens are spelled that no text shows, by their ids."""
        self._cleans_up = cleans_up(self.tokenizer)
        self._steps = self._known_steps()

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the text's tokens, all of them; ``special``: with what is put around a text.

        Raises ``InvalidRequestError`` with the tokenizer's own objection.
        """
        try:
            with self._turn, self._uncut():
                ids = self.tokenizer(
                    text, add_special_tokens=special, truncation=False, padding=False, verbose=False
                )["input_ids"]
        except BaseException as error:  # a tokenizer may be anybody's program: anything may come
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise InvalidRequestError(
                f"the tokenizer cannot read this text: {type(error).__name__}: {error}"
            ) from error
        return list(ids)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the chat as text, ready for an answer.

        Raises ``InvalidRequestError`` without a template, or with the template's own objection.
        """
        if not self.tokenizer.chat_template:
            raise InvalidRequestError("messages need a tokenizer with a chat template: pass text")
        shapes = self._shapes
        fitting = [shapes.fit(without_none(m), f"messages[{i}]") for i, m in enumerate(messages)]
        return self._rendered(fitting)

    @cached_property
    def _shapes(self) -> Shapes:
        return shapes_of(self._rendered)

    def _rendered(self, messages: Sequence[dict[str, Any]]) -> str:
        try:
            with self._turn:
                text = self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True
                )
        except Exception as error:  # a template is a program of the model's author: anything may come
            raise InvalidRequestError(f"the chat template refuses these messages: {error}") from error
        return str(text)

    def encode_behind(self, before: str, text: str) -> list[int]:
        """Return the tokens of a text that goes on behind another, which ends in ``before`` or in anything.

        Many tokenizers mark the beginning of a text as that of a word, which is wrong in the middle of one.
        """
        for anchor in (*filter(None, [before]), *ANCHORS):
            known, found = (self.encode(whole, special=False) for whole in (anchor, anchor + text))
            if found[: len(known)] == known:
                return found[len(known) :]
        return self.encode(text, special=False)

    @cached_property
    def obstacle_to_appending(self) -> str | None:
        """Why nothing can be appended to what the template renders; None when something can."""
        return obstacle_to_appending(self.render) if self.tokenizer.chat_template else None

    @cached_property
    def drops_reasoning(self) -> bool:
        """Whether the template leaves out the reasoning of earlier answers."""
        return bool(self.tokenizer.chat_template) and drops_reasoning(self.render)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return what the tokenizer makes of ``ids``."""
        with self._turn:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def decoding(self) -> Decoding:
        """Return what decodes one answer id by id, special tokens left out."""
        backend = backend_of(self.tokenizer)
        if self._steps is not None and backend is not None:
            return self._by_token(backend, self._steps)
        return Windows(self._text, Steps(clean_up_steps() if self._cleans_up else []))

    def _by_token(self, backend: Tokenizer, steps: Steps) -> ByToken:
        special = self.special_tokens
        return ByToken(lambda i: None if i in special else backend.id_to_token(i), steps.copy())

    def _text(self, ids: Sequence[int]) -> str:
        """Return what the tokenizer makes of ``ids``, before anything is cleaned up that we clean up."""
        try:
            return self._decoded(ids)
        except Exception:  # noqa: BLE001  # a model may say numbers that a tokenizer does not know
            return self._decoded([i for i in ids if self._has_text(i)])

    def _has_text(self, token: int) -> bool:
        try:
            self._decoded([token])
        except Exception:  # noqa: BLE001  # as above
            return False
        return True

    def _decoded(self, ids: Sequence[int]) -> str:
        options = {"clean_up_tokenization_spaces": False} if has_usual(self.tokenizer, CLEANING) else {}
        with self._turn:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, **options))

    def _known_steps(self) -> Steps | None:
        """Return the steps of the decoder, if they are known and do what it does."""
        backend = backend_of(self.tokenizer)
        if backend is None or not has_usual(self.tokenizer, "decode", "_decode"):
            return None
        try:
            written = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
            steps = steps_of(written)
        except Exception:  # noqa: BLE001  # a decoder in Python cannot be written down
            return None
        if steps is None or not self._agrees(backend, steps):
            return None
        return steps.behind(clean_up_steps()) if self._cleans_up else steps

    def _agrees(self, backend: Tokenizer, steps: Steps) -> bool:
        """Return whether ``steps`` say what the tokenizer says of some tokens of the whole vocabulary."""
        size = max(len(self.tokenizer), 1)
        ids = [token * 7919 % size for token in range(0, size, -(-size // SAMPLE))]
        try:
            expected = self._decoded(ids)
        except Exception:  # noqa: BLE001  # whoever cannot decode these is asked about fewer at a time
            return False
        except BaseException as error:
            if not is_panic(error):
                raise
            return True  # the library fails on some tokens that its steps can take
        own = self._by_token(backend, steps)
        return "".join(map(own.push, ids)) + own.end() == expected

    @contextmanager
    def _uncut(self) -> Iterator[None]:
        """Put back what the caller had set, where the tokenizer is the caller's own."""
        backend = None if self.is_copy else backend_of(self.tokenizer)
        if backend is None:
            yield
            return
        truncation, padding = backend.truncation, backend.padding
        try:
            yield
        finally:
            if truncation is not None:
                backend.enable_truncation(**truncation)
            if padding is not None:
                backend.enable_padding(**padding)
