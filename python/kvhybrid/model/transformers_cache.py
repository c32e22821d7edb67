"""``PagedSession``: a ``transformers`` cache whose K and V live in shared pages.

The model calls ``update`` layer by layer and knows nothing of pages. What it cannot know, which
tokens these K and V belong to, the wrappers of ``kvhybrid.model.attach`` tell ``rows`` before each
forward pass and after it, so that every reuse is checked token by token.

Only public methods of ``Cache`` are overridden; its layer classes, which change with every second
release, are not used, but for layers that keep a state instead (``layer_states``).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, Self, SupportsIndex

import torch
from transformers.cache_utils import Cache

from kvhybrid.cache.slices import whole_number
from kvhybrid.errors import InvalidRequestError, UnsupportedError
from kvhybrid.model.retained_session import RetainedSession
from kvhybrid.model.session_compression import compress
from kvhybrid.model.session_export import export, import_into
from kvhybrid.model.versions import columns_fed, columns_kept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvhybrid.cache.step import Step
    from kvhybrid.model.compression import Compression
    from kvhybrid.model.session_rows import SessionRows
    from kvhybrid.presets import CompressionScorer


class PagedSession(RetainedSession, Cache):
    """One conversation, or one batch of them, as ``past_key_values``.

    Made by ``KVCache.session``. Continues with whatever prompt it is given: what that prompt shares
    with what is cached is reused, what differs is computed, and nothing else is ever attended to.
    """

    def __init__(
        self,
        rows: SessionRows,
        fresh: Callable[[str], PagedSession],
        fingerprint: Callable[[], str],
        compression: Compression,
    ) -> None:
        """``fresh`` makes an empty session like this one, ``fingerprint`` names the model's weights.

        ``compression``: how the configuration has sessions of this model compressed.
        """
        layers = [LayerView(rows, index) for index in range(rows.cache.layout.num_layers)]
        super().__init__(layers=layers)  # type: ignore[arg-type]  # views, not layer objects
        self.rows = rows
        if rows.states is not None:
            rows.states.live.show_in(self.layers)
        self._fresh = fresh
        self._fingerprint = fingerprint
        self._compression = compression

    def close(self) -> None:
        """Release the pages for good; what was retained for them is wanted no more. Idempotent.

        While another thread uses the session, as soon as it is done.
        """
        self.rows.owner.close()

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Own the session for a while; raises ``ClosedError`` once it has ended."""
        with self.rows.owner.in_use():
            self.rows.owner.check_open()
            yield

    def fork(self, n: int = 1) -> list[PagedSession]:
        """Return ``n`` sessions that go on from here, each its own way.

        Nothing is copied but a partly filled last page, when it is first written to. A fork lives as
        long as somebody holds it, or until ``close``.
        """
        if whole_number("n", n) < 1:
            raise InvalidRequestError(f"fork({n}): at least one")
        forks = []
        with self._open():
            for index in range(n):
                fork = self._fresh(f"{self.rows.name}/{index}")
                self.rows.copy_to(fork.rows)
                forks.append(fork)
        return forks

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Fork: the way in which transformers' own caches are copied."""
        fork: Self = self.fork()[0]  # type: ignore[assignment]  # sessions make sessions of their kind
        memo[id(self)] = fork
        return fork

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse to be pickled: pages and locks belong to a process."""
        raise UnsupportedError("a session cannot be pickled: call its export() for bytes")

    def truncate(self, tokens: int) -> None:
        """Keep the first ``tokens`` tokens; of a padded batch that many columns, padding included.

        Raises ``InvalidRequestError`` when the session holds fewer.
        """
        tokens = whole_number("tokens", tokens)
        with self._open():
            if tokens > self.rows.columns:
                raise InvalidRequestError(f"truncate({tokens}) of a session of {self.rows.columns} tokens")
            self.rows.crop(tokens)

    def compress(
        self,
        kept: float | None = None,
        *,
        removed: float | None = None,
        scorer: CompressionScorer | str | None = None,
    ) -> int:
        """Keep a share ``kept`` of the tokens before the last 32, in every head and layer.

        ``removed``: kvpress's ``compression_ratio``, the share that goes, in place of ``kept``. Both are
        shares of the whole text: compressed again with the same one, a text loses what has become old since.
        Without them, and without ``scorer``, the configuration says. The first 4 tokens and the last 32
        always stay; tokens keep their positions, and the session its length. Shared pages are only read.
        Returns how many tokens went, of all rows.

        Between calls a compressed session keeps its pages, until there is no room for others.

        Raises ``InvalidRequestError`` for shares outside (0, 1], and when pages of the text were evicted or
        the queries that ``scorer`` asks for were not seen: run the text first; ``UnsupportedError`` for
        models that cannot do without tokens; ``CapacityError`` without room beside the text. The session is
        then as it was.
        """
        share, which = self._compression.asked(kept, removed, scorer)
        with self._open():
            self._compression.check(which)
            if self.is_pinned:
                raise InvalidRequestError("a pinned session cannot be compressed: call unpin() first")
            self.rows.take_pages()
            return compress(self.rows, share, which)

    def export(self, *, pages: bool = True, key: bytes = b"") -> bytes:
        """Return the session as bytes: its tokens and, with ``pages``, their K and V as they are stored.

        ``key`` (up to 64 bytes) signs them: ``import_`` takes nothing that was not signed with the same.
        Raises ``InvalidRequestError`` when pages were evicted since the session last ran.
        """
        with self._open():
            return export(self.rows, self._fingerprint() if pages else None, key=key)

    def import_(self, data: bytes, *, key: bytes = b"") -> None:
        """Take an exported session's text in place of this one's; its K and V are not computed again.

        What is imported is found by this tenant's other sessions too: import without a ``key`` only what
        you exported yourself. Raises ``CorruptPageError`` for bytes that are not what was exported or
        signed, ``LayoutError`` for those of another model; the session is then as it was.
        """
        with self._open():
            import_into(self.rows, data, self._fingerprint, key=key)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new K and V; return what the layer's attention is to read."""
        # Asked, for the wrapper costs every layer of every step.
        read = self._read_as_plain_code if torch.compiler.is_compiling() else self._read
        return read(layer_idx, key_states, value_states)

    def _read(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rows.reader.read(self._step(), layer, key, value)

    _read_as_plain_code = torch.compiler.disable(_read)

    def _step(self) -> Step:
        if self.rows.step is None:
            raise UnsupportedError(
                "this session was passed to a model that it is not attached to: call "
                "kvhybrid.attach(model, cache), and pass the session to that model, not to a part of it"
            )
        return self.rows.step

    def _touch(self, layer_idx: int) -> None:
        """Note that the forward pass has come to a layer that keeps a state."""
        self._step()
        if self.rows.states is not None:
            self.rows.states.live.touched.add(layer_idx)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return a layer's convolution state; it may be updated in place."""
        self._touch(layer_idx)
        return super().get_conv_state(layer_idx, state_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Return whether a layer has a state to go on from."""
        if layer_idx is not None:
            self._touch(layer_idx)
        return super().has_previous_state(layer_idx, state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Update a layer's convolution state; return it with what came before."""
        self._touch(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Replace a layer's recurrent state."""
        self._touch(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns held, padding included."""
        return self.rows.columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the column of the next token."""
        return self.rows.columns

    def get_mask_sizes(self, query_length: int | torch.Tensor, layer_idx: int) -> tuple[int, int]:
        """Return ``(columns stored after this forward pass, columns of the text before them)``."""
        gap = self.rows.gap
        return self.rows.columns - gap + columns_fed(query_length), gap

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: no bound but the cache's budget."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return -1; the name that transformers used up to 5.18."""
        return -1

    def crop(self, max_length: int) -> None:
        """Remove the last ``-max_length`` columns, or, given a positive number, keep that many."""
        columns = columns_kept(self.rows.columns, max_length)
        if columns < 0:
            raise InvalidRequestError(f"crop({max_length}) of a session of {self.rows.columns} columns")
        with self.rows.owner.in_use():
            self.rows.crop(columns)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the rows ``beam_idx``, in that order; a row taken twice is forked, not copied."""
        with self.rows.owner.in_use():
            self.rows.select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``, in that order."""
        chosen = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        with self.rows.owner.in_use():
            self.rows.select(chosen.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Fork every row ``repeats - 1`` times, forks beside their row."""
        with self.rows.owner.in_use():
            self.rows.repeat(repeats)

    def reset(self) -> None:
        """Forget the text; the session can be used again."""
        with self.rows.owner.in_use():
            self.rows.reset()

    def activate_past_recording(self) -> None:
        """Have layers that keep a state keep what ``crop`` takes back; K and V can always be cropped."""
        if self.rows.states is not None:
            self.rows.states.live.record()

    @property
    def num_rows(self) -> int:
        """Rows of the batch, 0 before the first prompt."""
        return self.rows.num_rows

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 before the first prompt."""
        return self.num_rows or -1

    @property
    def cached_tokens(self) -> list[int]:
        """Tokens of each row that were found in the cache when its prompt was prepared."""
        return list(self.rows.cached)

    @property
    def is_compileable(self) -> bool:
        """False: pages have no static address."""
        return False

    @property
    def is_initialized(self) -> bool:
        """True once anything is held."""
        return self.rows.columns > 0

    @property
    def is_croppable(self) -> bool:
        """True: any position can be cropped to."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """All False: every layer keeps every token, windows are the mask's."""
        return [False] * len(self.layers)

    def __repr__(self) -> str:
        return f"<PagedSession {self.rows.name!r}: {self.num_rows} rows of {self.rows.columns} columns>"


class LayerView:
    """What code that reads ``cache.layers[i].keys`` sees: copies, made when asked for."""

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, rows: SessionRows, index: int) -> None:
        # Not the session: without a circle, a fork that nobody holds gives its pages back at once.
        self._rows, self._index = rows, index

    @property
    def is_initialized(self) -> bool:
        """True once the layer holds anything; never, for one that keeps no K and V."""
        return self._rows.columns > 0 and self._rows.cache.layout.layers[self._index] is not None

    @property
    def keys(self) -> torch.Tensor:
        """K of this layer, ``[batch, num_kv_heads, columns, head_dim]``."""
        return self._rows.materialise(self._index)[0]

    @property
    def values(self) -> torch.Tensor:
        """V of this layer, ``[batch, num_kv_heads, columns, value_head_dim]``."""
        return self._rows.materialise(self._index)[1]

    def get_seq_length(self) -> int:
        """Return the columns held."""
        return self._rows.columns
