"""``KVCache``: one device tier, its pages and its books, behind one synchronous object.

Deterministic and without waiting. Knows tensors and token ids; how a model attends is
``kvhybrid.model``'s, and requests are ``kvhybrid.engine``'s.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol, Self, SupportsIndex

import torch

from kvhybrid._core import PagePool
from kvhybrid.cache.budget import make_storage
from kvhybrid.cache.collector import Collector
from kvhybrid.cache.compress.holders import Holders
from kvhybrid.cache.explained import ruling
from kvhybrid.cache.hints import Hints
from kvhybrid.cache.measured import measure_layers
from kvhybrid.cache.namespaces import TENANT, Namespaces
from kvhybrid.cache.process_kv import TensorSessions, check_name
from kvhybrid.cache.said import SaidOfTexts
from kvhybrid.cache.stored import stored
from kvhybrid.config import KVCacheConfig
from kvhybrid.errors import ClosedError, LayoutError, UnsupportedError
from kvhybrid.layout import KVLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from kvhybrid.cache.process_kv import SliceMetadata


class Session(Protocol):
    """What the registry asks of a session: its pages come back when it is closed."""

    def close(self) -> None:
        """Give the pages back; the session's tokens are forgotten."""


class KVCache(SaidOfTexts):
    """K and V of many texts in pages, shared by prefix, within a budget.

    ``layout`` says how wide a token is; ``config`` how many there is room for. ``device`` is where the
    pages lie, ``devices`` where each layer's do when they differ. Raises ``ConfigError`` when the budget
    holds no page, or more than a device could ever hold; ``OutOfMemoryError`` when a device does not set it
    aside now; ``LayoutError`` when ``config`` and ``layout`` contradict each other.
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
        self.storage = make_storage(self.config, layout, torch.device(device), devices)
        self.pool = PagePool(
            self.storage.num_full,
            layout.block_size,
            num_quantized=self.storage.num_quantized,
            num_lowest=self.storage.records[1].num_pages if len(self.storage.records) > 1 else 0,
            policy=self.config.cache_strategy.value,
            max_pinned_share=self.config.max_pinned_share,
        )
        self.storage.most_pinned = int(self.storage.num_full * self.config.max_pinned_share)
        self._collector: Collector | None = None
        if self.config.enable_gc:
            self._collector = Collector(self.pool, self.config.gc_threshold, self.storage)
            self.storage.settled = self._collector.look
        self.compressed = Holders()
        self.hints = Hints(self.pool, self.compressed.make_room)
        self.storage.make_room = self.hints.make_room
        self._tensors = TensorSessions(self.pool, self.storage, self.config, self.compressed)
        self._cleared_pages = 0
        self.passed_by: Counter[str] = Counter()
        """Calls of attached models that ran without this cache, by reason."""
        self._given_up = 0  # tokens that were found cached and had to be computed all the same
        self._lock = threading.RLock()
        self._namespaces = Namespaces(self.pool)
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
        layout = KVLayout.of_layers(
            measured.shapes, dtype=dtype, block_size=config.block_size, state_bytes=measured.state_bytes
        )
        return cls(config, layout=layout, device=measured.devices[0], devices=measured.devices)

    def namespace(self, *parts: str) -> int:
        """Return the number under which pages of ``parts`` (tenant, adapter ...) are kept apart.

        Numbers are given out, not hashed: two namespaces never collide.
        """
        return self._namespaces.number(*parts)

    def drop_namespaces(self, is_gone: Callable[[tuple[str, ...]], bool]) -> int:
        """Evict the pages of the namespaces whose parts ``is_gone``; return how many were evicted.

        Pages in use there are never found again: the same parts get another number.
        """
        return self._namespaces.drop(is_gone)

    def tenant_namespace(self, tenant: str, *parts: str) -> int:
        """Return the namespace of a tenant: its own, or one for all without ``tenant_isolation``.

        ``parts`` keep apart what else must not mix: the model whose K and V these are.
        """
        return self.namespace(TENANT, tenant if self.config.tenant_isolation else "", *parts)

    def private_namespace(self) -> int:
        """Return a namespace without a name: what is cached there is found by no one."""
        return self._namespaces.private()

    def session(self, session_id: str = "default", *, tenant: str = "default") -> Any:
        """Return the ``transformers`` cache of that session, to pass as ``past_key_values``.

        The same id gives the same object until it is dropped. A model must have been attached
        (``kvhybrid.attach(model, cache)``); without one raises ``UnsupportedError``. Raises
        ``InvalidRequestError`` for names that are not text.
        """
        key = (tenant, session_id)
        check_name(key)
        with self._lock:
            self._check_open()
            if self._make_session is None:
                raise UnsupportedError(
                    "no model is attached to this cache: call kvhybrid.attach(model, cache) first"
                )
            if key not in self._sessions:
                self._sessions[key] = self._make_session(session_id, tenant)
            return self._sessions[key]

    def drop_session(self, session_id: str = "default", *, tenant: str = "default") -> bool:
        """Forget a session, a model's or ``process_kv``'s or both of that name. True if it was known.

        What a model computed stays cached until it is evicted, what the session had retained before all else;
        what came as tensors is gone.
        """
        with self._lock:
            session = self._sessions.pop((tenant, session_id), None)
        if session is not None:
            session.close()
        return self._tensors.drop((tenant, session_id)) or session is not None

    def process_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache_position: torch.Tensor | SupportsIndex | None = None,
        *,
        layer_idx: int = 0,
        session_id: str = "default",
        tenant: str = "default",
    ) -> tuple[torch.Tensor, torch.Tensor, SliceMetadata]:
        """Store a slice of one layer's K and V, and return all of the layer up to the slice's end.

        ``key``, ``value`` ``[batch, num_kv_heads, tokens, width]``, in any of the storage dtypes, with or
        without a gradient, which ends here. ``cache_position``: where the slice begins, or its
        consecutive positions as a tensor; None appends. Layers come in any order, each with its own
        progress. Positions that the layer holds already are not overwritten; only what follows is stored.

        Returns K and V ``[batch, num_kv_heads, end, width]``, fresh tensors in the caller's dtype, equal to
        the bit to what went in unless the cache's dtype is narrower, and a ``SliceMetadata``. A page that was
        quantized gives each number back within half a step, which follows from all that the page held then:
        keys a channel over its tokens, values a token over its channels.

        With ``use_compression`` a session keeps a share of its old positions once every layer has come to the
        same end: later calls return what is left, each head its own, the last positions whole and in order,
        and ``positions`` says which. A slice that begins among those of which each head keeps some is
        refused: its own positions could not all be given back.

        A session begins with its first slice and keeps its pages until ``drop_session`` or
        ``truncate_kv``: it is never evicted. Calls of several threads to one session follow each other.

        Whatever is raised, nothing was stored: ``LayoutError`` for shapes, dtypes, devices and another
        batch size; ``InvalidRequestError`` for positions that leave a gap or end where some were removed,
        and for NaN, infinities and numbers that the cache's dtype cannot hold; ``OutOfMemoryError`` when
        there is no room after evicting what may leave and trying once more; ``UnsupportedError`` for a
        ``compression_scorer`` that asks for queries; ``ClosedError``.
        """
        return self._tensors.process(key, value, cache_position, layer_idx, (tenant, session_id))

    def truncate_kv(self, length: int, *, session_id: str = "default", tenant: str = "default") -> None:
        """Drop the positions of a ``process_kv`` session from ``length`` on, in every layer.

        With 0 the session is forgotten. Raises ``InvalidRequestError`` when there is no such session, or
        when it holds fewer positions.
        """
        self._tensors.truncate((tenant, session_id), length)

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

        ``passed_by_calls`` of attached models ran without the cache, ``passed_by[reason]`` says why.

        ``hit_rate``: cached share of all prompt tokens asked for; ``memory_usage``: share of the bytes
        in use; ``*_tokens``, ``*_pages``, ``*_bytes`` as their names say; ``full_*``, ``quantized_*``,
        ``int8_*`` and ``int4_*`` tell pages in use apart by what they are stored in; ``demoted_pages`` went a
        step down, ``demoted_to_int8_pages`` and ``demoted_to_int4_pages``. ``capacity_bytes`` is within
        ``max_memory_mb``; ``buffer_bytes`` is held beside it while texts run. Of ``evicted_pages``,
        ``gc_evicted_pages`` left in the background and ``cleared_pages`` by ``clear``; most others made room.
        By why they were chosen: ``evicted_lru_pages``, ``evicted_survival_pages`` (the learned order),
        ``evicted_ttl_pages`` (their time was over), ``evicted_priority_pages`` (a lower one than the usual)
        and ``evicted_asked_pages``. ``user_pinned_pages`` of at most ``most_user_pinned_pages`` are pinned by
        ``pin``; ``pinned_pages`` are these and those in use.
        ``hinted_requests`` wait with what they need kept from leaving, ``hints_given_up`` were for room.
        ``gc_failures`` counts its runs in which something raised.
        ``compressions`` removed ``removed_tokens`` from sessions; ``skipped_compressions`` found no room,
        ``undone_compressions`` gave theirs back when others needed it. With the strategy ADAPTIVE
        ``learned_order_rules`` is 1 while pages leave in the learned order, 0 while in order of recency, by
        what would have hit more lately: ``shadow_hit_rate_survival`` or ``shadow_hit_rate_lru``. Of models
        with layers that keep a state: ``states`` held, ``state_bytes`` within ``state_capacity_bytes``,
        ``restored_states`` and ``evicted_states``.
        """
        counters = self.pool.statistics()
        asked = counters["queried_tokens"]
        counters["cached_tokens"] -= self._given_up
        held = stored(counters, self.storage)
        return {
            "hit_rate": counters["cached_tokens"] / asked if asked else 0.0,
            "memory_usage": held["used_bytes"] / self.storage.nbytes,
            "capacity_bytes": self.storage.nbytes,
            "capacity_tokens": counters["num_pages"] * self.layout.block_size,
            **held,
            "buffer_bytes": self.storage.buffers.num_bytes,
            "sessions": len(self._sessions) + len(self._tensors),
            "gc_runs": self._collector.runs if self._collector else 0,
            "gc_evicted_pages": self._collector.evicted_pages if self._collector else 0,
            "gc_failures": self._collector.failures if self._collector else 0,
            "cleared_pages": self._cleared_pages,
            "passed_by_calls": self.passed_by.total(),
            **{f"passed_by[{reason}]": count for reason, count in self.passed_by.items()},
            # There is no slower tier to bring pages up from yet: every wish for it comes to nothing.
            "skipped_prefetches": counters["opens"] if self.config.enable_prefetch else 0,
            **counters,
            **ruling(self.pool),
            **self.compressed.statistics(),
            **self.hints.statistics(),
            **(self.storage.states.statistics() if self.storage.states is not None else {}),
        }

    def give_up(self, tokens: int) -> None:
        """Count ``tokens`` that were found cached, but behind where every row of a batch can go on from."""
        if tokens:
            with self._lock:
                self._given_up += tokens

    def clear(self) -> int:
        """Evict every page that nobody holds and return how many left."""
        if self.storage.states is not None:
            self.storage.states.clear()
        evicted = self.pool.evict(self.pool.num_pages)
        with self._lock:
            self._cleared_pages += evicted
        return evicted

    def close(self) -> None:
        """Close every session, end the collector's thread and refuse new sessions. Idempotent."""
        self._closed = True
        self.on_session(None)
        self._tensors.close()
        if self._collector is not None:
            self._collector.stop()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the cache is closed")

    def __repr__(self) -> str:
        state = "closed, " if self._closed else ""
        used = self.pool.num_pages - self.pool.num_free
        return (
            f"<KVCache {state}{used}/{self.pool.num_pages} pages of {self.layout.block_size}, "
            f"{self.layout.dtype} on {self.storage.device}, "
            f"{len(self._sessions) + len(self._tensors)} sessions>"
        )
