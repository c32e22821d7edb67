"""The two kernels: attention of a few queries over a share of their pages, and the merge of such shares.

Flash decoding (Dao et al. 2023): a row's pages are cut into parts that programs read side by side, each
leaves a partial output with its log-sum-exp, and the merge weighs them. The same partial results serve a
prefix that several rows share: their queries are stacked and read its pages once (Hydragen, Juravsky et al.
2024; cascade inference, Ye et al. 2024). Pages are found through a block table (PagedAttention, Kwon et al.
2023), and a page's format through its id: below ``first_1`` full precision, below ``first_2`` the first
class of records, from there on the second.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvhybrid.model.triton.tiles import full_tile, record_tile


@triton.jit
def attend_kernel(
    query,
    keys,
    values,
    keys_1,
    values_1,
    keys_2,
    values_2,
    rows,
    works,
    parts,
    part_sums,
    query_row,
    query_head,
    query_token,
    first_1,
    first_2,
    row_width,
    all_spans,
    blocks_of_queries,
    count,
    first_part,
    window,
    scale,
    cap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    VALUE_WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    BITS_1: tl.constexpr,
    BITS_2: tl.constexpr,
    KEY_BYTES_1: tl.constexpr,
    KEY_BYTES_2: tl.constexpr,
    VALUE_BYTES_1: tl.constexpr,
    VALUE_BYTES_2: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """Attend to one part of a work's tokens with up to ``QUERIES`` of its queries, for one KV head.

    Grid ``(works * blocks_of_queries, KV_HEADS, parts)``. ``works`` int32 ``[works, 4]``: first span, spans,
    first token, end; its pages are the first span's. ``rows`` int32 ``[all_spans, row_width]``: row, column,
    count, past, whether it has a part in a shared prefix, page ids.
    Queries of a work are numbered span by span, head by head of the group, token by token of ``count``.
    """
    work = tl.program_id(0) // blocks_of_queries
    head = tl.program_id(1)
    part = tl.program_id(2)
    first_span = tl.load(works + work * 4)
    num_spans = tl.load(works + work * 4 + 1)
    start = tl.load(works + work * 4 + 2)
    stop = tl.load(works + work * 4 + 3)

    number = tl.program_id(0) % blocks_of_queries * QUERIES + tl.arange(0, QUERIES)
    span = number // (GROUP * count)
    within = number % (GROUP * count)
    token = within % count
    is_ours = span < num_spans
    span += first_span
    row = tl.load(rows + span * row_width, mask=is_ours, other=0).to(tl.int64)
    column = tl.load(rows + span * row_width + 1, mask=is_ours, other=0)
    is_ours &= token < tl.load(rows + span * row_width + 2, mask=is_ours, other=0)
    own = tl.load(rows + span * row_width + 3, mask=is_ours, other=0) + token
    at = row * query_row + (head * GROUP + within // count) * query_head + (column + token) * query_token
    d = tl.arange(0, WIDE)
    q = tl.load(query + at[:, None] + d[None, :], mask=is_ours[:, None] & (d[None, :] < HEAD_DIM), other=0.0)

    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    sums = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, VALUE_WIDE), tl.float32)
    tiles = tl.cdiv(stop, TILE) - start // TILE
    share = tl.cdiv(tiles, tl.num_programs(2))
    first_tile = start // TILE + part * share
    tables = rows + first_span * row_width + 5
    for tile in range(first_tile, tl.minimum(first_tile + share, tl.cdiv(stop, TILE))):
        position = tile * TILE + tl.arange(0, TILE)
        live = (position >= start) & (position < stop)
        seen = live[None, :] & (position[None, :] <= own[:, None])
        if HAS_WINDOW:
            seen &= position[None, :] > own[:, None] - window
        pages = tl.load(tables + position // BLOCK, mask=live, other=0).to(tl.int64)
        slots = (pages * KV_HEADS + head) * BLOCK + position % BLOCK
        if BITS_1 == 0:
            top, sums, out = full_tile(
                q, keys, values, slots, live, seen, top, sums, out, scale, cap,
                HEAD_DIM, VALUE_DIM, WIDE, VALUE_WIDE, HAS_CAP, PRECISION,
            )  # fmt: skip
        else:
            page = tl.load(tables + tile * TILE // BLOCK).to(tl.int64)  # a tile lies within one page
            inside = tile * TILE % BLOCK + tl.arange(0, TILE)
            if page < first_1:
                top, sums, out = full_tile(
                    q, keys, values, slots, live, seen, top, sums, out, scale, cap,
                    HEAD_DIM, VALUE_DIM, WIDE, VALUE_WIDE, HAS_CAP, PRECISION,
                )  # fmt: skip
            elif BITS_2 == 0 or page < first_2:
                top, sums, out = record_tile(
                    q, keys_1, values_1, (page - first_1) * KV_HEADS + head, inside, live, seen,
                    top, sums, out, scale, cap, BITS_1, BLOCK, HEAD_DIM, VALUE_DIM, WIDE, VALUE_WIDE,
                    KEY_BYTES_1, VALUE_BYTES_1, HAS_CAP, TERMS, PRECISION,
                )  # fmt: skip
            else:
                top, sums, out = record_tile(
                    q, keys_2, values_2, (page - first_2) * KV_HEADS + head, inside, live, seen,
                    top, sums, out, scale, cap, BITS_2, BLOCK, HEAD_DIM, VALUE_DIM, WIDE, VALUE_WIDE,
                    KEY_BYTES_2, VALUE_BYTES_2, HAS_CAP, TERMS, PRECISION,
                )  # fmt: skip

    queries = GROUP * count
    to = ((first_part + part) * all_spans + span).to(tl.int64) * KV_HEADS + head
    to = to * queries + within
    c = tl.arange(0, VALUE_WIDE)
    sums = tl.where(sums == 0.0, 1.0, sums)  # of queries that see nothing of this part: top says so
    tl.store(part_sums + to, top + tl.log2(sums), mask=is_ours)
    out = out / sums[:, None]
    mask = is_ours[:, None] & (c[None, :] < VALUE_DIM)
    tl.store(parts + to[:, None] * VALUE_DIM + c[None, :], out, mask=mask)


@triton.jit
def merge_kernel(
    parts,
    part_sums,
    rows,
    sinks,
    out,
    out_row,
    out_token,
    out_head,
    row_width,
    all_spans,
    count,
    shared_parts,
    num_parts,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Merge the parts of one query by their log-sum-exp, a sink among them, and write its output.

    Grid ``(spans * count, heads)``. A span's fifth number says whether it has shared parts: the first
    ``shared_parts`` of its parts were never written otherwise.
    """
    span = tl.program_id(0) // count
    token = tl.program_id(0) % count
    head = tl.program_id(1)
    if token < tl.load(rows + span * row_width + 2):
        has_shared = tl.load(rows + span * row_width + 4) != 0
        first = tl.where(has_shared, 0, shared_parts)
        of_part = KV_HEADS * GROUP * count * all_spans
        at = (span * KV_HEADS * GROUP + head).to(tl.int64) * count + token
        c = tl.arange(0, VALUE_WIDE)
        top = -float("inf")
        if HAS_SINKS:
            top = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        sink = top
        for begin in range(first, num_parts, CHUNK):
            part = begin + tl.arange(0, CHUNK).to(tl.int64)
            sums = tl.load(part_sums + at + part * of_part, mask=part < num_parts, other=float("-inf"))
            top = tl.maximum(top, tl.max(sums, axis=0))
        total = 0.0
        if HAS_SINKS:
            total = tl.exp2(sink - top)
        result = tl.zeros((VALUE_WIDE,), tl.float32)
        for begin in range(first, num_parts, CHUNK):
            part = begin + tl.arange(0, CHUNK).to(tl.int64)
            sums = tl.load(part_sums + at + part * of_part, mask=part < num_parts, other=float("-inf"))
            weights = tl.exp2(sums - top)
            held = (part < num_parts)[:, None] & (c[None, :] < VALUE_DIM)
            partial = tl.load(
                parts + (at + part * of_part)[:, None] * VALUE_DIM + c[None, :], mask=held, other=0.0
            )
            result += tl.sum(weights[:, None] * partial, axis=0)
            total += tl.sum(weights, axis=0)
        row = tl.load(rows + span * row_width).to(tl.int64)
        column = tl.load(rows + span * row_width + 1)
        to = row * out_row + (column + token) * out_token + head * out_head
        tl.store(out + to + c, (result / total).to(out.dtype.element_ty), mask=c < VALUE_DIM)
