"""``process_kv``: a cache for callers who have K and V and no model of ours. Its sessions, and its door.

Whole or not at all: a call that raises has stored nothing, whatever raised. Pages of these sessions hold
what nobody can compute again, because there are no tokens to compute it from; so they are never
evicted, and leave when their session is truncated or dropped. What makes room is the cache of prefixes.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, SupportsIndex, TypedDict

from kvhybrid.cache.compress.scorers import NEED_QUERIES
from kvhybrid.cache.memory import is_out_of_memory
from kvhybrid.cache.slices import as_stored, check_slice, read_start, whole_number
from kvhybrid.cache.tensor_session import TensorSession
from kvhybrid.errors import (
    CapacityError,
    ClosedError,
    InvalidRequestError,
    LayoutError,
    OutOfMemoryError,
    UnsupportedError,
)
from kvhybrid.presets import CompressionScorer

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from kvhybrid._core import PagePool
    from kvhybrid.cache.compress.holders import Holders
    from kvhybrid.cache.pages import PageStorage
    from kvhybrid.config import KVCacheConfig

__all__ = ["SliceMetadata", "TensorSessions", "check_name"]


class SliceMetadata(TypedDict):
    """What ``process_kv`` did with one slice."""

    cached: bool
    """True when all of the slice was there already, and nothing was stored."""
    position: int
    """Where the slice begins."""
    tokens: int
    """Positions stored by this call: the slice's length, less what was cached of it."""
    bytes: int
    """Bytes of the pages that those took, in this layer, over all rows."""
    codec: str
    """How they are stored: the dtype of full-precision pages."""
    positions: torch.Tensor | None
    """Which positions came back, int64 ``[batch, num_kv_heads, tokens]``; None when all did."""
    evicted: int
    """Pages of cached prefixes that left to make room. Never those of a ``process_kv`` session."""


class TensorSessions:
    """The sessions of ``process_kv``, by ``(tenant, session_id)``."""

    def __init__(
        self, pool: PagePool, storage: PageStorage, config: KVCacheConfig, compressed: Holders
    ) -> None:
        """``compressed`` counts what is removed where ``config`` has old context compressed."""
        self._pool = pool
        self._storage = storage
        self._rule = config.compression_ratio if config.use_compression else 1.0, config.compression_scorer
        self._compressed = compressed
        self._known: dict[tuple[str, str], TensorSession] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._known)

    def process(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache_position: torch.Tensor | SupportsIndex | None,
        layer: int,
        name: tuple[str, str],
    ) -> tuple[torch.Tensor, torch.Tensor, SliceMetadata]:
        """Store a slice and return its layer up to the slice's end: see ``KVCache.process_kv``."""
        check_name(name)
        if self._rule[0] < 1.0 and self._rule[1] in NEED_QUERIES:
            raise UnsupportedError(
                f"compression_scorer={self._rule[1].value!r} scores by queries, which process_kv never "
                f"sees: use one of {', '.join(sorted(set(CompressionScorer) - NEED_QUERIES))}"
            )
        layer = whole_number("layer_idx", layer)
        check_slice(self._storage, layer, key, value)
        start = read_start(cache_position, key.shape[2])
        if key.shape[0] > self._pool.num_pages:  # before a sequence is opened for each
            raise OutOfMemoryError(
                f"{key.shape[0]} rows: each takes a page at least, and there are {self._pool.num_pages}"
            )
        with self._entered(name, key.shape[0]) as session:
            filled = session.filled(layer)
            position = filled if start is None else start
            if position > filled:
                raise InvalidRequestError(
                    f"cache_position begins at {position}, but layer {layer} of session {name[1]!r} holds "
                    f"{filled} positions: {position - filled} are missing in between"
                )
            if position < session.front.length:
                raise InvalidRequestError(
                    f"positions from {position} on are asked for, but of the first {session.front.length} of "
                    f"session {name[1]!r} each head keeps some: begin there or later, or drop it"
                )
            found = self._store(session, layer, position, key, value, name[1])
            if self._rule[0] < 1.0:
                self._compress(session)
            return found

    def _compress(self, session: TensorSession) -> None:
        """Compress what has become old, if that can be done: the slice is stored, whatever happens."""
        try:
            if removed := session.compress(self._rule):
                self._compressed.compressed(removed, removed * self._storage.layout.bytes_per_token)
        except Exception as error:
            self._compressed.skipped()
            if not is_out_of_memory(error):
                logging.getLogger(__name__).exception("a process_kv session could not be compressed")

    def _store(
        self,
        session: TensorSession,
        layer: int,
        position: int,
        key: torch.Tensor,
        value: torch.Tensor,
        session_id: str,
    ) -> tuple[torch.Tensor, torch.Tensor, SliceMetadata]:
        """Try; when memory runs out, make room and try once more."""
        evicted_before = session.evicted
        try:
            return self._try(session, layer, position, key, value, evicted_before)
        except (CapacityError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # A plan that finds no page has counted all that may leave: only what others give back meanwhile
            # helps then, and evicting the rest would cost others their prefixes for nothing.
            lacks_pages = isinstance(error, CapacityError)
        if not lacks_pages:
            session.evicted += self._pool.evict(key.shape[0] * -(-key.shape[2] // self._pool.block_size))
        try:
            return self._try(session, layer, position, key, value, evicted_before)
        except (CapacityError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"no room for {key.shape[2]} tokens in {key.shape[0]} rows of session {session_id!r}, twice "
                f"(sessions of process_kv keep their pages until dropped or truncated): {error}"
            ) from error

    def _try(
        self,
        session: TensorSession,
        layer: int,
        position: int,
        key: torch.Tensor,
        value: torch.Tensor,
        evicted_before: int,
    ) -> tuple[torch.Tensor, torch.Tensor, SliceMetadata]:
        """Store what is not there yet and read all of it; after a failure the session is as it was."""
        storage, length = self._storage, session.length
        end = position + key.shape[2]
        count = max(end - session.filled(layer), 0)
        try:
            if count:
                first = key.shape[2] - count
                session.store(
                    layer,
                    as_stored("K", key[:, :, first:], storage.dtype),
                    as_stored("V", value[:, :, first:], storage.dtype),
                )
            keys, values = session.read(layer, end, key.dtype)
            positions = session.front.held(layer, end)
            session.advance(layer, end)
        except BaseException:
            session.truncate(length)
            raise
        layout = storage.layout
        return (
            keys,
            values,
            {
                "cached": count == 0,
                "position": position,
                "tokens": count,
                "bytes": key.shape[0] * count * layout.layer_bytes_per_token(layer),
                "codec": layout.dtype,
                "positions": positions,
                "evicted": session.evicted - evicted_before,
            },
        )

    def truncate(self, name: tuple[str, str], length: int) -> None:
        """Keep the first ``length`` positions of every layer; with 0 the session is forgotten.

        Raises ``InvalidRequestError`` when there is no such session, or when it is shorter.
        """
        check_name(name)
        length = whole_number("length", length)
        session = self._known.get(name)
        unknown = InvalidRequestError(f"process_kv knows no session {name[1]!r} of tenant {name[0]!r}")
        if session is None:
            raise unknown
        with session.turn:
            if session.is_closed:
                raise unknown
            if length > session.length:
                raise InvalidRequestError(
                    f"cannot truncate session {name[1]!r} to {length}: it holds {session.length} positions"
                )
            if 0 < length < session.front.length:
                raise InvalidRequestError(
                    f"cannot truncate session {name[1]!r} to {length}: of its first {session.front.length} "
                    "positions each head keeps some"
                )
            session.truncate(length)
            if length == 0:
                self._forget(name, session)

    def drop(self, name: tuple[str, str]) -> bool:
        """Give the pages of a session back, after the call under way. True if it was known.

        Called by a finalizer or a signal handler in the middle of a call of its own thread, it does not wait.
        """
        session = self._known.pop(name, None)
        if session is None:
            return False
        session.turn.soon(session.close)
        return True

    def close(self) -> None:
        """Drop every session and refuse new ones. Idempotent."""
        self._closed = True
        while self._known:
            for name in list(self._known):
                self.drop(name)

    @contextmanager
    def _entered(self, name: tuple[str, str], batch: int) -> Iterator[TensorSession]:
        """Own the session of that name for one call; one that then holds nothing is forgotten."""
        while True:
            # No lock: each step is one operation of a dictionary, and a finalizer may come between any two.
            session = self._known.get(name)
            if session is None:
                fresh = TensorSession(self._pool, self._storage, batch)
                session = self._known.setdefault(name, fresh)
                if session is not fresh:
                    fresh.close()
            if self._closed:
                self.drop(name)
                raise ClosedError("the cache is closed")
            with session.turn:
                if session.is_closed:  # dropped while this thread waited: there is a new one, or will be
                    continue
                if session.num_rows != batch:
                    raise LayoutError(
                        f"K has {batch} rows, session {name[1]!r} was begun with {session.num_rows}: "
                        "drop it first"
                    )
                try:
                    yield session
                finally:
                    if session.length == 0:
                        self._forget(name, session)
                return

    def _forget(self, name: tuple[str, str], session: TensorSession) -> None:
        if self._known.get(name) is session:
            self._known.pop(name, None)
        session.close()


def check_name(name: tuple[str, str]) -> None:
    """Raise ``InvalidRequestError`` unless tenant and session id are text: 1 and True would be one tenant."""
    for field, part in zip(("tenant", "session_id"), name, strict=True):
        if not isinstance(part, str):
            raise InvalidRequestError(f"{field}={part!r}: must be text")
        try:
            part.encode()  # names are written down: in exports, logs and statistics
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"{field}={part!a}: position {error.start} is half of a surrogate pair, no character"
            ) from None
