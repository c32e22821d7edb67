"""``Session``: a conversation whose tokens stay on the native side; every turn tokenises only what is new.

    turn 1   [ rendered chat, ready for an answer ][ answer ]
    turn 2   [ ............. held as tokens ..................][ what the template puts next ][ answer ]

Knows the door, which renders and encodes, and the intake, which serves. Holds no page, but where old context
is compressed: those would not be found again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kvhybrid._core import TokenBuffer
from kvhybrid.engine.door import WHOLE_CHATS
from kvhybrid.engine.request import Request
from kvhybrid.engine.retained import RetainedConversation
from kvhybrid.engine.template import ANSWER, PartedError, added_behind, answered
from kvhybrid.errors import InvalidRequestError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvhybrid.cache.kv_cache import KVCache
    from kvhybrid.engine.door import Prompt
    from kvhybrid.engine.held import Held
    from kvhybrid.engine.intake import Intake
    from kvhybrid.engine.running import Running
    from kvhybrid.engine.stream import Stream
    from kvhybrid.engine.ticket import Ticket

__all__ = ["Session"]


class Session(RetainedConversation):
    """One conversation of one tenant. Turns follow one another; made by ``KVEngine.session``.

    With a chat template a string is a user's message and each turn appends what the template renders
    anew; without one, text is appended as it is. A turn that fails, is cancelled or left early never
    happened.
    """

    def __init__(
        self, session_id: str, tenant: str, intake: Intake, cache: KVCache, held: Held | None = None
    ) -> None:
        """``held``: takes and keeps the conversation's compressed pages; None where it is not compressed."""
        super().__init__(cache, is_compressed=held is not None)
        self.id = session_id
        self.tenant = tenant
        self.num_turns = 0
        self._held = held
        self._intake = intake
        self._tokens = TokenBuffer()
        self._messages: list[dict[str, Any]] = []
        self._rendered = ""
        self._end_text = ""  # the end token that the last answer came with, as the template spells it
        self._is_busy = False
        self._was_dropped = False  # during the turn under way
        self._asked: TokenBuffer | None = None  # that turn's text, as far as it has come

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversation so far, answers included."""
        return len(self._tokens)

    def tokens(self) -> bytes:
        """Copy out the conversation's tokens as native-endian uint32."""
        return self._tokens.tobytes()

    @property
    def _is_chat(self) -> bool:
        """Whether a string is a user's message: as its turns began, so they go on."""
        return bool(self._rendered) if self.num_turns else self._intake.door.has_template

    async def send(self, prompt: str | Sequence[Mapping[str, Any]], **parameters: Any) -> dict[str, Any]:
        """Append a turn, and return its answer as ``KVEngine.process_request`` does.

        ``prompt``: a string, or new messages for the chat template. ``parameters``: the request's other
        fields (``max_length``, ``temperature`` ...). Raises ``InvalidRequestError`` while another turn is
        under way, ``CapacityError`` when the conversation has outgrown the budget, ``UnsupportedError``
        when the template rewrites earlier turns.
        """
        request = self._begin(prompt, parameters)
        finished = None
        try:
            finished = await self._intake.run(request, partial(self._prepare, request))
        finally:
            self._end(request, finished)
        return finished.answer()

    def stream(self, prompt: str | Sequence[Mapping[str, Any]], **parameters: Any) -> Stream:
        """Append a turn and return its answer as a stream; it counts once the last piece is fetched."""
        request = self._begin(prompt, parameters)
        return self._intake.stream(request, partial(self._prepare, request), partial(self._end, request))

    def _begin(self, prompt: str | Sequence[Mapping[str, Any]], parameters: dict[str, Any]) -> Request:
        self._intake.check_open()
        if self._is_busy:
            raise InvalidRequestError(f"session {self.id!r}: turn {self.num_turns + 1} is still under way")
        own = {"session_id": self.id, "tenant": self.tenant}
        if taken := sorted({*own, "text", "messages", "token_ids"} & parameters.keys()):
            raise InvalidRequestError(f"{taken[0]}={parameters[taken[0]]!r}: a session has its own")
        if isinstance(prompt, str) and self._is_chat and prompt:
            fields: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
        elif isinstance(prompt, str):
            fields = {"text": prompt}
        else:
            given: object = prompt  # whatever it is, the request says what is wrong with it
            fields = {"messages": list(given) if isinstance(given, Sequence) else given}
        if self._retention.said is not None:
            fields["retention"] = self._retention.said
        request = Request.parse({**fields, **own, **parameters})
        self._is_busy, self._asked = True, None
        return request

    def _end(self, request: Request, finished: Ticket | None) -> None:
        """Make the turn true, if it was finished. Restores nothing: a turn changes nothing before."""
        self._is_busy = False
        if finished is not None:
            self._add(request, finished.running)
        if self._was_dropped:
            self._was_dropped = False
            self.retire(self._asked)

    def _add(self, request: Request, running: Running) -> None:
        last = running.generated[-1]
        kept = running.text.num_kept_tokens()
        self._end_text = "" if running.text.stopped else self._intake.door.end_text(last)
        if request.messages is None and last in running.end_ids:
            kept = min(kept, len(running.generated) - 1)  # raw text goes on, so it did not end
        running.tokens.truncate(running.num_prompt_tokens + kept)
        self._tokens = running.tokens
        self._rendered = running.prompt.text or ""
        self._messages += [*(request.messages or ()), answered()]
        self.num_turns += 1
        self._end_turn(running.namespace, running.cached_tokens)

    def _prepare(self, request: Request) -> Prompt:
        """Return the conversation with the new turn behind it. Runs in the door's thread."""
        door = self._intake.door
        door.check(self._tokens)  # of its own time; embeddings may be fewer now
        tokens, rendered = TokenBuffer(self._tokens), None
        is_first = self.num_turns == 0
        if request.messages is None:
            assert request.text is not None
            added = door.encode(request.text, special=is_first, behind=None if is_first else "")
        else:
            rendered = door.render([*self._messages, *request.messages])
            text = self._what_is_new(rendered, request.messages)
            added = door.encode(text, special=False, behind=None if is_first else self._end_text)
        tokens.append(added)
        self._asked = tokens
        return replace(door.fit(tokens, request, rendered), held=self._held, own_from=self._retention.start)

    def drop(self) -> None:
        """Let go of it, and have its own text leave first, once a turn under way has ended."""
        self._was_dropped = self._is_busy
        self.let_go()
        self.retire()

    def let_go(self) -> None:
        """Give back what is held between turns. Its turns, if more follow, begin with a whole text."""
        if self._held is not None:
            self._held.close()

    def _what_is_new(self, rendered: str, messages: Sequence[dict[str, Any]]) -> str:
        """Return what the template puts behind the last answer, all of it in the first turn."""
        render = self._intake.door.render
        try:
            self._look_ahead(messages)
            if self.num_turns == 0:
                return rendered
            before = self._rendered + ANSWER
            if rendered.startswith(before):
                added = rendered[len(before) :]
            else:
                added = added_behind(render, self._messages[:-1], messages)
        except PartedError as error:
            raise UnsupportedError(
                f"session {self.id!r}: with the messages of turn {self.num_turns + 1} the chat template "
                f"cannot be appended to: it renders a turn differently once another follows ({error}); "
                f"{WHOLE_CHATS}"
            ) from None
        if self._end_text and added.lstrip().startswith(self._end_text):
            return added.lstrip()[len(self._end_text) :]
        return added

    def _look_ahead(self, messages: Sequence[dict[str, Any]]) -> None:
        """Raise ``PartedError`` if nothing could be appended to a turn of these messages.

        Of plain ones it is known since the session was made. Some templates put a system's message into
        whatever turn is the last: better said now than in the next turn.
        """
        if all(message.keys() == {"role", "content"} and message["role"] == "user" for message in messages):
            return
        with suppress(InvalidRequestError):  # what may follow these messages is the template's to say
            past = [*self._messages, *messages]
            added_behind(self._intake.door.render, past, [{"role": "user", "content": "And then?"}])
