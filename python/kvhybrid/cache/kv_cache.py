"""``KVCache``: one device tier, its pages and its books, behind one synchronous object.

Deterministic and without waiting. Knows tensors and token ids; how a model attends is
``kvhybrid.model``'s, and requests are ``kvhybrid.engine``'s.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from kvhybrid._core import PagePool
from kvhybrid.cache.measured import measure_layers
from kvhybrid.cache.pages import PageStorage
from kvhybrid.config import KVCacheConfig
from kvhybrid.errors import ClosedError, LayoutError, UnsupportedError
from kvhybrid.layout import KVLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel


class Session(Protocol):
    """What the registry asks of a session: its pages come back when it is closed."""

    def close(self) -> None:
        """Give the pages back; the session's tokens are forgotten."""


class KVCache:
    """K and V of many texts in pages, shared by prefix, within a budget.

    ``layout`` says how wide a token is; ``config`` how many there is room for. ``device`` is where the
    pages lie, ``devices`` where each layer's do when they differ. Raises ``ConfigError`` when the budget
    holds no page, ``LayoutError`` when ``config`` and ``layout`` contradict each other.
    """

    def __init__(
        self,
        config: KVCacheConfig | None = None,
        *,
        layout: KVLayout,
        device: torch.device | str = "cpu",
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        self.config = config if config is not None else KVCacheConfig(block_size=layout.block_size)
        if self.config.block_size != layout.block_size:
            raise LayoutError(
                f"config.block_size={self.config.block_size}, the layout says {layout.block_size}"
            )
        if self.config.dtype is not None and self.config.dtype != layout.dtype:
            raise LayoutError(f"config.dtype={self.config.dtype}, the layout says {layout.dtype}")
        self.layout = layout
        num_pages = layout.num_pages(self.config.max_tokens, self.config.max_memory_mb)
        self.pool = PagePool(num_pages, layout.block_size)
        pin_memory, non_blocking = self.config.host_copies(torch.device(device).type)
        self.storage = PageStorage(
            layout, num_pages, device, devices=devices, pin_memory=pin_memory, non_blocking=non_blocking
        )
        self._lock = threading.RLock()
        self._namespaces: dict[tuple[str, ...], int] = {}
        self._numbers = itertools.count()
        self._sessions: dict[tuple[str, str], Any] = {}
        self._unnamed: weakref.WeakSet[Session] = weakref.WeakSet()
        self._make_session: Callable[[str, str], Session] | None = None
        self._closed = False

    @classmethod
    def for_model(cls, model: PreTrainedModel, config: KVCacheConfig | None = None) -> Self:
        """Lay a cache out for ``model``: as it keeps K and V itself, on the devices where it does.

        Runs the model on three tokens to see. Pages are in the model's dtype unless ``config`` names
        another. Raises ``LayoutError`` for a model without a KV cache and ``UnsupportedError``, naming the
        layer, where a layer keeps something else.
        """
        config = config if config is not None else KVCacheConfig()
        measured = measure_layers(model)
        dtype = config.dtype if config.dtype is not None else measured.dtype
        layout = KVLayout.of_layers(measured.shapes, dtype=dtype, block_size=config.block_size)
        return cls(config, layout=layout, device=measured.devices[0], devices=measured.devices)

    def namespace(self, *parts: str) -> int:
        """Return the number under which pages of ``parts`` (tenant, adapter ...) are kept apart.

        Numbers are given out, not hashed: two namespaces never collide.
        """
        with self._lock:
            if parts not in self._namespaces:
                self._namespaces[parts] = next(self._numbers)
            return self._namespaces[parts]

    def drop_namespaces(self, is_gone: Callable[[tuple[str, ...]], bool]) -> int:
        """Evict what nobody holds of the namespaces whose parts ``is_gone``; return how many pages left.

        What is still held there is never found again: the same parts get another number.
        """
        with self._lock:
            gone = [parts for parts in self._namespaces if is_gone(parts)]
            numbers = [self._namespaces.pop(parts) for parts in gone]
        return sum(self.pool.drop(number) for number in numbers)

    def tenant_namespace(self, tenant: str, *parts: str) -> int:
        """Return the namespace of a tenant: its own, or everybody's without ``tenant_isolation``.

        ``parts`` keep apart what else must not mix: the model whose K and V these are.
        """
        return self.namespace("tenant", tenant if self.config.tenant_isolation else "", *parts)

    def session(self, session_id: str = "default", *, tenant: str = "default") -> Any:
        """Return the ``transformers`` cache of that session, to pass as ``past_key_values``.

        The same id gives the same object until it is dropped. A model must have been attached
        (``kvhybrid.attach(model, cache)``); without one raises ``UnsupportedError``.
        """
        self._check_open()
        if self._make_session is None:
            raise UnsupportedError(
                "no model is attached to this cache: call kvhybrid.attach(model, cache) first"
            )
        with self._lock:
            key = (tenant, session_id)
            if key not in self._sessions:
                self._sessions[key] = self._make_session(session_id, tenant)
            return self._sessions[key]

    def drop_session(self, session_id: str = "default", *, tenant: str = "default") -> bool:
        """Forget a session; what it computed stays cached until it is evicted. True if it was known."""
        with self._lock:
            session = self._sessions.pop((tenant, session_id), None)
        if session is None:
            return False
        session.close()
        return True

    def watch(self, session: Session) -> None:
        """Close an unnamed session (a fork), should it still live, together with the named ones."""
        with self._lock:
            self._unnamed.add(session)

    @property
    def is_attached(self) -> bool:
        """True while a model makes this cache's sessions."""
        return self._make_session is not None

    def on_session(self, make: Callable[[str, str], Session] | None) -> None:
        """Set who makes sessions (``kvhybrid.attach`` does); None takes the maker and its sessions away."""
        with self._lock:
            self._make_session = make
            sessions = [*self._sessions.values(), *self._unnamed]
            self._sessions, self._unnamed = {}, weakref.WeakSet()
        for session in sessions:
            session.close()

    def get_stats(self) -> dict[str, int | float]:
        """Return flat counters, JSON-ready, at a cost that does not depend on the pool's size.

        ``hit_rate``: cached share of all prompt tokens asked for; ``memory_usage``: share of the pages
        in use; ``*_tokens``, ``*_pages``, ``*_bytes`` as their names say.
        """
        counters = self.pool.statistics()
        used = counters["num_pages"] - counters["free_pages"]
        asked = counters["queried_tokens"]
        page = self.layout.bytes_per_page
        return {
            "hit_rate": counters["cached_tokens"] / asked if asked else 0.0,
            "memory_usage": used / counters["num_pages"],
            "used_bytes": used * page,
            "capacity_bytes": counters["num_pages"] * page,
            "capacity_tokens": counters["num_pages"] * self.layout.block_size,
            "sessions": len(self._sessions),
            # There is no slower tier to bring pages up from yet: every wish for it comes to nothing.
            "skipped_prefetches": counters["opens"] if self.config.enable_prefetch else 0,
            **counters,
        }

    def clear(self) -> int:
        """Evict every page that nobody holds and return how many left."""
        return self.pool.evict(self.pool.num_pages)

    def close(self) -> None:
        """Close every session and refuse new ones. Idempotent."""
        self._closed = True
        self.on_session(None)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the cache is closed")

    def __repr__(self) -> str:
        state = "closed, " if self._closed else ""
        used = self.pool.num_pages - self.pool.num_free
        return (
            f"<KVCache {state}{used}/{self.pool.num_pages} pages of {self.layout.block_size}, "
            f"{self.layout.dtype} on {self.storage.device}, {len(self._sessions)} sessions>"
        )
