"""``Request``: what may be asked of the engine, typed and validated once.

Knows ranges and types. How text becomes tokens, and whether they fit, is ``kvhybrid.engine.door``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from reprlib import Repr
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kvhybrid.cache.retention import MOST_PRIORITY, Retention
from kvhybrid.engine.expectations import Expectation
from kvhybrid.engine.messages import check_text, copied
from kvhybrid.errors import InvalidRequestError

__all__ = ["MAX_NEW_TOKENS", "Request", "check_names"]

MAX_NEW_TOKENS: Final = 2048
MAX_NAME: Final = 256
MAX_STOPS: Final = 16

ALLOWED: Final = {
    "text": "a non-empty string",
    "messages": "a non-empty list of mappings, each with a role",
    "token_ids": "a non-empty sequence or one-dimensional array of whole numbers",
    "session_id": f"a string of 1 to {MAX_NAME} characters",
    "tenant": f"a string of 1 to {MAX_NAME} characters",
    "max_length": f"a whole number from 1 to {MAX_NEW_TOKENS}",
    "temperature": "a finite number of at least 0",
    "top_p": "a number above 0 and at most 1",
    "seed": f"a whole number from 0 to {2**63 - 1}",
    "stop": f"a non-empty string, or 1 to {MAX_STOPS} of them",
    "priority": f"a whole number from {-(2**31)} to {2**31 - 1}",
    "deadline": "a finite number of seconds above 0",
    "retention": (
        f"a mapping of priority (a whole number from {-MOST_PRIORITY} to {MOST_PRIORITY}) and ttl_s (seconds)"
    ),
    "expects": f"one of {', '.join(Expectation)}",
}
_short = Repr()
_short.maxstring = _short.maxother = 60
PROMPTS: Final = ("text", "messages", "token_ids")
TEXTS: Final = frozenset({"text", "messages", "stop", "session_id", "tenant"})


def _stops(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _message(value: object) -> object:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise ValueError("no message")  # noqa: TRY004  # pydantic collects ValueError only
    return value


def _retention(value: object) -> object:
    if isinstance(value, Mapping):
        try:
            return Retention(**value)
        except TypeError as error:  # another key, which pydantic would let through as our own defect
            raise ValueError(str(error)) from None
    return value


def _expectation(value: object) -> object:
    return Expectation(value) if isinstance(value, str) else value


def _token_ids(value: object) -> object:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
        raise ValueError("no tokens")
    return value


Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
Message = Annotated[dict[str, Any], BeforeValidator(_message)]


class Request(BaseModel):
    """One request: exactly one of ``text``, ``messages`` and ``token_ids``, and how to go on from it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    text: Annotated[str, Field(min_length=1)] | None = None
    """The whole prompt."""

    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    """A chat, rendered by the tokenizer's template."""

    token_ids: Annotated[Any, BeforeValidator(_token_ids)] = None
    """The whole prompt as tokens: a sequence, numpy array or CPU tensor of whole numbers."""

    session_id: Name = "default"
    """Named in the answer. A conversation that is kept is ``KVEngine.session``."""

    tenant: Name = "default"
    """Whose pages may be found, and who may find these."""

    max_length: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    """Most new tokens. None: 256, or as many as the budget has room for."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together reach this share."""

    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    """Makes draws repeatable. None: other draws every time."""

    stop: (
        Annotated[
            tuple[Annotated[str, Field(min_length=1)], ...],
            BeforeValidator(_stops),
            Field(min_length=1, max_length=MAX_STOPS),
        ]
        | None
    ) = None
    """End where one of these would appear; it is not part of the answer, as with OpenAI and vLLM.

    Special tokens count, though the answer leaves them out: a stop may be one ("<|im_end|>") or contain
    one, as ``stop_strings`` of transformers may. The token ends it as a whole; a part of its name does not.
    """

    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    """Higher goes first."""

    deadline: Annotated[float, Field(gt=0)] | None = None
    """Seconds from now after which ``TimeoutError`` is raised."""

    retention: Annotated[Retention, BeforeValidator(_retention)] | None = None
    """How long its text is wanted once it is answered: ``priority`` (lower ones leave first) and ``ttl_s``,
    as ``KVCache.retain`` takes them. What others computed before never leaves earlier for it. None: a
    session's own, or as any other."""

    expects: Annotated[Expectation, BeforeValidator(_expectation)] | None = None
    """What comes next: ``tool_result``, soon; ``user``, sometime; ``nothing``: it is over."""

    @classmethod
    def parse(cls, value: Mapping[str, Any] | Request) -> Self | Request:
        """Return ``value`` as a request.

        Raises ``InvalidRequestError`` naming every wrong field with its value and what is allowed.
        """
        if isinstance(value, Request):
            return value
        if not isinstance(value, Mapping):
            raise InvalidRequestError(f"a request is a mapping or a Request, got {type(value).__name__}")
        problem = _unknown(value)
        if not problem:
            try:
                return cls(**value)
            except ValidationError as error:
                problem = _describe(error)
        raise InvalidRequestError(problem)

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, fields: Any) -> Any:
        """Refuse text that cannot be encoded, and take a copy of what the caller may change afterwards."""
        if not isinstance(fields, Mapping):
            return fields
        read = dict(fields)
        for name in TEXTS & read.keys():
            read[name] = copied(read[name], name)
        return read

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        given = [name for name in PROMPTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of {', '.join(PROMPTS)} is needed, got {', '.join(given) or 'none'}"
            )
        return self


def check_names(**names: object) -> None:
    """Raise ``InvalidRequestError`` unless ``session_id`` or ``tenant`` could be a request's."""
    for name, value in names.items():
        if not isinstance(value, str) or not 1 <= len(value) <= MAX_NAME:
            raise InvalidRequestError(f"{name}={_short.repr(value)}: must be {ALLOWED[name]}")
        try:
            check_text(value, name)
        except ValueError as error:
            raise InvalidRequestError(str(error)) from None


def _unknown(value: Mapping[str, Any]) -> str:
    for name in value:
        if name not in Request.model_fields:
            near = get_close_matches(str(name), Request.model_fields, n=1)
            said = str(name).encode("utf-8", "backslashreplace").decode()
            return f"{said}: no such field" + (f"; did you mean {near[0]}?" if near else "")
    return ""


def _describe(error: ValidationError) -> str:
    found = []
    for item in error.errors(include_url=False):
        if not item["loc"]:
            found.append(str(item["ctx"]["error"]))
            continue
        name = str(item["loc"][0])
        found.append(f"{name}={_short.repr(item['input'])}: must be {ALLOWED[name]}")
    return "; ".join(dict.fromkeys(found))
