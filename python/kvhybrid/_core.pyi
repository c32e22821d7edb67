"""The native core: page pool, prefix tree, block tables and eviction order of one tier.

It knows token ids, page ids and order. It has never heard of tensors, models or event loops:
what a page holds is the caller's, and so is every copy.

Tokens cross the boundary as buffers (numpy int32, int64 or uint32, ``array.array``, ``memoryview``, a
torch CPU tensor), never as lists, and stay on this side between turns.
"""

from collections.abc import Iterable
from typing import Any, Final, Literal, Protocol, TypeAlias, final

import numpy.typing as npt
from typing_extensions import Buffer

__all__ = [
    "Batch",
    "CapacityError",
    "ClosedError",
    "KVHybridError",
    "PageCodec",
    "PageKernel",
    "PagePool",
    "Pin",
    "Plan",
    "Replay",
    "Sequence",
    "StepRows",
    "TokenBuffer",
    "Trace",
    "__version__",
    "holds",
    "read_at",
    "sums_at",
]

# numpy's arrays are buffers, but their types say so only from Python 3.12 on.
_Buffer: TypeAlias = Buffer | npt.NDArray[Any]
_Tokens: TypeAlias = _Buffer | _HasArray | TokenBuffer

class _HasArray(Protocol):
    """What is no buffer, but gives an array over its memory: a torch tensor."""

    def __array__(self) -> npt.NDArray[Any]: ...

__version__: Final[str]

class KVHybridError(Exception):
    """Base of every error that kvhybrid raises on its own account."""

class CapacityError(KVHybridError):
    """The pool cannot hold what was asked, even after evicting all that may leave."""

class ClosedError(KVHybridError):
    """The handle was closed, or its plan was already committed or abandoned."""

def holds(
    owners: list[Any],
    types: list[type],
    containers: list[Any],
    counts: _Buffer,
    contents: list[Any],
    entries: list[Any],
) -> bool:
    """Return whether ``owners`` are of ``types`` and have the first ``containers`` as their attributes, and
    whether all containers hold what they held: ``counts`` (int64) items each, ``contents`` one after the
    other (keys and values of dictionaries, items of lists), in order and no others; of the attributes of a
    class (``vars(kind)``) only the number. An ellipsis stands for anything. ``entries``: triples of a
    dictionary and a key, or of any other object and the name of an attribute, and what must be there. All by
    identity. Raises ``ValueError`` for lists that do not fit each other."""

def read_at(addresses: _Buffer, lengths: _Buffer) -> bytes | None:
    """Return the bytes at addresses (both int64), one piece after the other; None where some of them are not
    mapped. Reads through the operating system, so that no address can end the process. Raises ``OSError``."""

def sums_at(addresses: _Buffer, lengths: _Buffer) -> bytes | None:
    """Return a sum of each piece (XXH3, native-endian uint64), as ``read_at`` reads them. Every byte and its
    place count. Works without the interpreter lock."""

@final
class TokenBuffer:
    """A growing run of token ids kept on the native side (4 bytes a token)."""

    def __new__(cls, tokens: _Tokens | None = None) -> TokenBuffer: ...
    def __len__(self) -> int: ...
    def append(self, tokens: _Tokens) -> int:
        """Add tokens at the end and return the new length."""
    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens; a no-op when it is already shorter."""
    def tobytes(self, start: int = 0, stop: int | None = None) -> bytes:
        """Copy out ``[start, stop)`` as native-endian uint32."""
    def common_prefix(self, tokens: _Tokens) -> int:
        """Return how many leading tokens equal those of ``tokens``."""

@final
class Sequence:
    """Tokens with a block table: one running text, pinning the cached prefix that it stands on.

    Dropping the handle closes it. ``length`` tokens have K and V in pages, ``pending`` more are
    known and wait for a plan.
    """

    @property
    def length(self) -> int: ...
    @property
    def pending(self) -> int: ...
    @property
    def cached(self) -> int:
        """Tokens that were found in the prefix tree when the sequence was opened."""
    @property
    def num_pages(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    def append(self, tokens: _Tokens) -> None:
        """Add tokens that wait to be computed."""
    def tokens(self) -> bytes:
        """Copy out all ``length + pending`` tokens as native-endian uint32."""
    def block_table(self) -> bytes:
        """Copy out the page ids in order as native-endian int32."""
    def fork(self) -> Sequence:
        """Return a second sequence over the same pages; the first to write into a shared, partly
        filled page gets its own copy (see ``Plan.copies``)."""
    def share_up_to(self, length: int) -> None:
        """Let others find the first ``length`` tokens at most; what was sealed before stays sealed.

        Blocks that a raised bound admits are sealed by the next commit.
        """
    def require_verification(self) -> None:
        """Seal only what ``verify`` names from here on. What is computed now counts as verified."""
    def verify(self, length: int) -> None:
        """Say that K and V of the first ``length`` tokens are what the namespace says, those of an open plan
        included. The next commit or the end of the sequence seals them; a smaller ``length`` than before
        changes nothing. Raises ``ValueError`` beyond the tokens known."""
    def freeze(self, length: int) -> None:
        """Say that the first ``length`` tokens are written: pages of whole blocks of them may be quantized
        though they are never sealed (``share=False``). For what was committed with ``written=False``."""
    def retain(
        self, priority: int = 0, ttl_s: float | None = None, *, lapses: bool = False, start: int = 0
    ) -> None:
        """Say as what the text is retained once this closes, from position ``start`` on: see
        ``PagePool.retain``. What lies before ``start`` is others', too, and retained for no less."""
    def truncate(self, length: int) -> None:
        """Drop every token from position ``length`` on, pending ones included."""
    def close(self) -> None:
        """Give back the private pages and unpin the cached ones. Idempotent."""

@final
class Batch:
    """The sequences that step together, in row order.

    It names them and does not keep them alive: a dropped handle is a closed row.
    """

    def __new__(cls, pool: PagePool, sequences: Iterable[Sequence] | None = None) -> Batch: ...
    def __len__(self) -> int: ...
    def add(self, sequence: Sequence) -> int:
        """Add a row at the end and return its index."""
    def remove(self, sequence: Sequence) -> None:
        """Take the row out; later rows move up by one."""
    def plan(self, counts: _Buffer | None = None, *, tokens: _Tokens | None = None) -> Plan:
        """Reserve pages for the next step of every row, all of them or none.

        ``counts``: int32, one a row: how many pending tokens to compute (0 leaves the row out, and
        its place in the buffers stays); ``None`` takes all that are pending. ``tokens``: one token a
        row, appended first (a decode step). Victims are chosen now; their content is gone only once
        the plan was filled.

        Raises ``CapacityError`` with the numbers, and nothing has changed.
        """

@final
class Plan:
    """Pages reserved for one step. Commit it after the forward pass, or abandon it.

    Dropping it unfinished abandons it.
    """

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_evicted(self) -> int: ...
    @property
    def max_pages(self) -> int:
        """Longest block table of the rows: the least width that ``fill`` takes."""
    @property
    def copies(self) -> list[tuple[int, int]]:
        """``(source, destination)`` pages to copy before anything is written (copy on write)."""
    @property
    def demotions(self) -> list[tuple[int, int]]:
        """``(source, destination)`` pages to quantize once the plan is filled, before anything else is copied
        or written: in this order, for a destination may be an earlier one's source. Each lies in the class
        below its source's. Sequences and the tree name the destination already. So until ``moved`` nobody
        else can plan, and whoever reads pages outside of a plan holds a lock that this one holds, too."""
    def moved(self) -> None:
        """Say that the demotions were written."""
    def refuse(self, tried: int, refused: list[int]) -> None:
        """Abandon a filled plan. Of its first ``tried`` demotions all were written but for those at the
        places ``refused``: the codec refused their pages, which stay in their class and are not chosen again.
        The others are undone. Raises ``ValueError`` for places that are not among the first ``tried``."""
    def fill(self, tables: _Buffer, slots: _Buffer, lengths: _Buffer) -> None:
        """Write block tables, slots and lengths into the caller's int32 buffers.

        ``tables`` [rows, width >= max_pages], entries past a row's table left alone; ``slots``
        [num_tokens], ``page * block_size + offset`` in row order; ``lengths`` [rows, 2]: tokens
        already computed, and tokens of this step. Larger buffers are left alone past that, and so are
        the tables of rows without tokens. From here on the victims are gone for good.
        """
    def commit(self, *, written: bool = True) -> None:
        """Make the step true: full blocks are sealed and found by whoever comes next.

        ``written=False``: by a caller who writes later, and says so with ``Sequence.freeze``.
        """
    def abandon(self) -> None:
        """Undo the plan: tokens appended by it are taken back, reserved pages return, and, unless
        it was filled, victims stand where they stood; unless its demotions were ``moved``, so do their
        sources."""

@final
class PageCodec:
    """Whole pages of keys, or of values, to records of 8 or 4 bits and back, on a CPU, by address.

    ``shape``: heads, tokens a page (a power of two, at least 16), channels of a token. ``pages``: address,
    how many there are, 0, 1 or 2 for float32, float16 or bfloat16, and strides in bytes from page to page,
    head to head and token to token; a token's channels are neighbours. ``records``: address and how many,
    ``[records, heads, record_bytes]``. Ids: int32, as many of the one as of the other. The interpreter is
    released; what lies at the addresses must stay alive and be nobody else's meanwhile, and nobody can check
    that here. ``threads`` of them work, on the team of ``parallel`` (see ``PageKernel.attend``).

    Raises ``IndexError`` for ids outside, ``ValueError`` for what does not fit or would be written twice, and
    nothing was written.
    """

    def __new__(cls, part: Literal["keys", "values"], bits: int) -> PageCodec: ...
    def record_bytes(self, block_size: int, width: int) -> int:
        """Return the bytes of one page's record of one head."""
    def quantize(
        self,
        shape: tuple[int, int, int],
        pages: tuple[int, int, int, tuple[int, int, int]],
        page_ids: _Buffer,
        records: tuple[int, int],
        record_ids: _Buffer,
        *,
        threads: int = 1,
        parallel: int = 0,
    ) -> list[int]:
        """Write the records of pages; return which of them, counted from 0, could not be quantized."""
    def dequantize(
        self,
        shape: tuple[int, int, int],
        records: tuple[int, int],
        record_ids: _Buffer,
        pages: tuple[int, int, int, tuple[int, int, int]],
        page_ids: _Buffer,
        *,
        threads: int = 1,
        parallel: int = 0,
    ) -> None:
        """Write the numbers of records to pages."""

@final
class StepRows:
    """The rows of one step, as ``PageKernel`` reads them; made once a step, for all layers."""

    def __new__(cls, tables: _Buffer, lengths: _Buffer, places: _Buffer, block_size: int) -> StepRows:
        """``tables``: the page ids of every row, rows of one width behind each other. ``lengths``: for
        each row its tokens before the step and its new ones; ``places``: the row and first column of these in
        the query. All int32, one-dimensional. Raises ``ValueError`` where they do not fit together."""

@final
class PageKernel:
    """Attention of a few new tokens a row over pages, on the CPU, in the best instruction set it has."""

    def __new__(
        cls,
        layers: list[
            tuple[
                tuple[int, int, int],
                int,
                tuple[int, int, int, int],
                list[tuple[tuple[int, int, int], int]],
            ]
        ],
        *,
        isa: str | None = None,
    ) -> PageKernel:
        """``layers``: for each one the addresses of full keys and values and how many pages lie there; their
        format (0, 1, 2: float32, float16, bfloat16); heads of K, tokens a page, widths of K and of V;
        and, for each of up to two formats of quantized pages, their addresses and number and the bits of a
        code; ids count through them in this order. Whoever made the tensors keeps them alive. ``isa``: one
        of ``available()``, the best one when None."""
    @property
    def isa(self) -> str: ...
    @staticmethod
    def available() -> list[str]:
        """Return the instruction sets that this machine has, the best one last."""
    def attend(
        self,
        layer: int,
        rows: StepRows,
        float_code: int,
        heads: int,
        query: tuple[int, int, int, int],
        answer: tuple[int, int, int, int],
        scale: float,
        *,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: list[float] | None = None,
        new: tuple[tuple[int, int, int, int], tuple[int, int, int, int]] | None = None,
        threads: int = 1,
        parallel: int = 0,
    ) -> None:
        """Attend causally and write the answer, in the query's format. The interpreter is released.

        Tensors are an address and strides in numbers: from row to row, head to head, token to token.
        ``new``: the step's own K and V in the pages' format, written into the pages first. ``heads``: query
        heads. ``window``: a token sees itself and the ``window - 1`` before it. ``soft_cap``, ``sinks`` (one
        a query head): as Gemma-2 and GPT-OSS define them. ``parallel``: address of ``GOMP_parallel`` in this
        process, 0 for threads of our own.
        """

@final
class Pin:
    """A cached text that neither leaves nor steps down. Dropping the handle lets go of it."""

    @property
    def num_tokens(self) -> int:
        """Leading tokens of the text that were cached when it was pinned: so many it holds."""
    @property
    def is_held(self) -> bool:
        """False once it was released, its time is over, or its namespace was dropped."""
    def release(self) -> None:
        """Let go. Idempotent."""

@final
class PagePool:
    """Pages of ``block_size`` tokens, the prefix tree over them, and who must leave first."""

    def __new__(
        cls,
        num_pages: int,
        block_size: int,
        *,
        num_quantized: int = 0,
        num_lowest: int = 0,
        keep_tails: bool = True,
        policy: str = "lru",
        seed: int | None = None,
        max_pinned_share: float = 0.5,
    ) -> PagePool:
        """``num_pages`` pages of full precision, ids from 0 on, and ``num_quantized`` behind them, which
        take whole blocks that are cold (``Plan.demotions``) when the others are short; the last
        ``num_lowest`` of these take them from the other quantized ones in turn. ``keep_tails``: a
        closed sequence leaves its last, partly filled block behind, too, so that a short prompt, or what
        follows the last full block, is found again; else full blocks only.

        ``policy``: ``lru``, of which ``paged`` is another name, or ``adaptive``, which
        learns what is wanted again. It does so in a thread of its
        own, now and then; ``seed`` chooses which blocks it samples. ``survival``, to compare, is the same
        without the guard that sets recency back in. ``max_pinned_share``: of the pages of each class, those
        that ``pin`` may hold."""
    @property
    def num_pages(self) -> int:
        """Pages of all classes."""
    @property
    def num_quantized(self) -> int: ...
    @property
    def num_lowest(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def num_free_quantized(self) -> int: ...
    @property
    def num_evictable(self) -> int: ...
    def match(self, tokens: _Tokens, namespace: int = 0) -> int:
        """Return how many leading tokens are cached, to the token. Changes nothing."""
    def open(
        self, tokens: _Tokens, namespace: int = 0, *, reuse: bool = True, share: bool = True, align: int = 1
    ) -> Sequence:
        """Open a sequence on the longest cached prefix, and pin that prefix.

        At most ``len(tokens) - 1`` tokens are matched (rounded down to a multiple of ``align``), so
        that one is left to compute and there are logits to sample from; the rest is pending. A match
        that ends inside a block reuses that page by copy on write. ``reuse=False`` matches nothing;
        ``share=False`` never seals: the pages stay private.
        """
    def retain(
        self,
        tokens: _Tokens,
        namespace: int = 0,
        *,
        start: int = 0,
        stop: int | None = None,
        priority: int = 0,
        ttl_s: float | None = None,
        lapses: bool = False,
    ) -> int:
        """Have ``tokens[start:stop]``, as far as they are cached, in whole blocks, leave before or after
        others.

        Lower priorities (-100 to 100, 0 the usual one) leave before higher ones. With ``ttl_s`` they leave
        after all else of their priority until it is over, and then before everything; with ``lapses`` they
        are then as any other. What stands before them stays as long as they do. Replaces what was said of
        them before, and counts as a use. Returns how many leading tokens are cached and end the range, or lie
        before it.
        """
    def pin(self, tokens: _Tokens, namespace: int = 0, *, ttl_s: float | None = None) -> Pin:
        """Pin a text as far as it is cached, until the handle is released, or for ``ttl_s`` seconds.

        Raises ``CapacityError`` with the numbers when users would pin more than they may.
        """
    def hint(self, tokens: _Tokens, namespace: int = 0, *, most_pages: int) -> Pin | None:
        """Keep a text from leaving for somebody who waits for it; None when nothing of it is cached, or hints
        would hold more than ``most_pages`` pages. One counts once, however many hold it, and also where a
        user's pin or a running sequence does."""
    def demote(self, num_pages: int) -> Plan:
        """Plan a step of no rows that takes up to ``num_pages`` pages of full precision from the coldest that
        nobody holds. Fill it, write ``demotions``, say ``moved``, and abandon it: the pages are free."""
    def rule(self) -> dict[str, Any]:
        """Return who rules: ``ruling``, ``lru`` or ``survival``. With the policy ``adaptive`` also why:
        ``shadow_hit_rate_lru`` and ``shadow_hit_rate_survival``, what each would have hit lately;
        ``rule_changes``; and ``lessons``, times that it has learned."""
    def explain(self, tokens: _Tokens, namespace: int = 0) -> dict[str, Any]:
        """Return why a text is not found, or not all of it. Changes nothing.

        ``cached`` leading tokens; ``evicted``, how many behind them were cached and left, as far as that is
        remembered; ``unseen``, the rest; ``evicted_by``: ``lru``, ``survival``, ``ttl``, ``priority`` or
        ``asked``, and ``evicted_s_ago``, both None when none was."""
    def set_time(self, microseconds: int) -> None:
        """Stop following the machine's clock: it is this late until set again. Learning is then done at
        once, so that every run is the same."""
    def evict(self, num_pages: int) -> int:
        """Evict up to ``num_pages`` cold pages and return how many left."""
    def which_exist(self, namespaces: _Buffer) -> bytes:
        """Return a byte for each namespace (int64): 1 where any page or running text is under it, else 0."""
    def drop(self, namespace: int) -> int:
        """Evict every unpinned page of a namespace and return how many left."""
    def statistics(self) -> dict[str, int]:
        """Return counters, flat and O(1): ``num_pages``, ``num_quantized_pages``, ``free_pages``,
        ``free_quantized_pages``, ``mutable_pages``, ``sealed_pages``, ``shared_pages``, ``pinned_pages``,
        ``evictable_pages``, ``sequences``, ``nodes``, ``opens``, ``queried_tokens``, ``cached_tokens``,
        ``evicted_pages``, ``sealed_total``, ``duplicate_pages``, ``copied_pages``, ``demoted_pages``,
        ``refused_pages``, ``plans``, ``abandoned_plans``, ``returned_pages`` (they entered the tree again
        after they had been evicted), ``ghosts`` (evicted blocks whose ids are remembered); ``user_pins``,
        ``user_pinned_pages`` of ``most_user_pinned_pages``; and by why they left ``evicted_lru_pages``,
        ``evicted_survival_pages``, ``evicted_ttl_pages``, ``evicted_priority_pages``,
        ``evicted_asked_pages``."""
    def bookkeeping_bytes(self) -> int:
        """Return the bytes that the bookkeeping owns, token ids not counted. Walks the tree: not for
        the request path."""
    def check(self) -> None:
        """Verify every invariant; raises ``AssertionError`` naming the one that broke. For tests."""

@final
class Trace:
    """A recorded workload on the native side: requests in order of arrival, each a path of blocks."""

    def __new__(cls, block_tokens: int, *, join: int = 1, full_blocks_only: bool = False) -> Trace:
        """``join`` makes one block of so many, named by the last of them, and leaves out what does not
        fill one; ``full_blocks_only`` leaves out a last block that a prompt fills in part."""
    def __len__(self) -> int:
        """Requests."""
    @property
    def num_references(self) -> int:
        """Blocks of all prompts together."""
    @property
    def num_unique(self) -> int:
        """Different blocks."""
    @property
    def block_tokens(self) -> int:
        """Tokens of a block, after joining."""
    def extend(self, requests: _Buffer, runs: _Buffer) -> None:
        """Add requests. ``requests``: int64, four a request: milliseconds, prompt tokens, generated
        tokens, and how many numbers of ``runs`` are its own. ``runs``: int64, pairs of a block's id and
        how many consecutive ids begin there.

        Raises ``ValueError`` naming the request; those before it were added. Raises ``RuntimeError``
        once the trace is being replayed.
        """

@final
class Replay:
    """A trace on its way through a pool of ``num_blocks`` pages, a block a page."""

    def __new__(cls, trace: Trace, num_blocks: int, *, policy: str = "lru", seed: int = 0) -> Replay:
        """``policy``: ``lru`` or ``adaptive``; the latter is the same in every run of a ``seed``."""
    def rule(self) -> dict[str, Any]:
        """Return who rules, and why: see ``PagePool.rule``."""
    def advance(self, requests: int) -> int:
        """Replay up to so many more requests, without the interpreter. Returns how many are done in all."""
    @property
    def hits(self) -> int:
        """Blocks that were cached when a prompt asked for them."""
    @property
    def references(self) -> int:
        """Blocks that prompts asked for so far."""
