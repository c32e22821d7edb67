"""What one program does with one tile of tokens: scores, online softmax, values; full pages and records.

A record is one page and KV head at 8 or 4 bits (keys a channel, values a token, as in KIVI, Liu et al. 2024;
``cache.codec`` packs them). It is read as it is: codes become numbers in registers, nothing dequantized is
ever written to memory. Values stay codes, which bfloat16 holds exactly: with
``v = (code * scale[t] + minimum[t]) * 2^exponent[d]`` the output is
``((p * scale) . code + p . minimum) * 2^exponent``, where ``p * scale`` is split into ``TERMS`` bfloat16
numbers that together hold its bits. Codes are taken around their middle: the two sums do not cancel.
Keys could be folded alike, ``(q * scale[d]) . code``. But scales differ from page to page and every warp
holds the whole query, so that folding anew takes more registers and instructions than scaling the codes,
of which each warp has its share.

Softmax is online (Milakov and Gimelshein 2018), in base 2. Scores beyond what a query sees are -inf; a slot
that nobody wrote is never loaded, because zero times NaN is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(small, large, TERMS: tl.constexpr):
    """Return ``small`` float32 ``[M, K]`` times ``large`` bfloat16 ``[K, N]``: in ``TERMS`` terms."""
    term = small.to(tl.bfloat16)
    total = tl.dot(term, large)
    for _ in tl.static_range(TERMS - 1):
        small = small - term.to(tl.float32)
        term = small.to(tl.bfloat16)
        total = tl.dot(term, large, total)
    return total


@triton.jit
def exact(left, right, sums, PRECISION: tl.constexpr):
    """Return ``sums + left @ right``; float32 without tensor cores, which would round it to 11 bits."""
    return tl.dot(left, right, sums, input_precision=PRECISION)


@triton.jit
def codes(bytes_, high, BITS: tl.constexpr):
    """Return the codes in ``bytes_`` around their middle, in bfloat16. ``high``: of the high nibble."""
    if BITS == 8:
        return (bytes_ ^ 128).to(tl.int8, bitcast=True).to(tl.bfloat16)
    nibble = tl.where(high, bytes_ >> 4, bytes_ & 15)
    return (nibble.to(tl.int8, bitcast=True) - 8).to(tl.bfloat16)


@triton.jit
def logits(scores, seen, scale, cap, HAS_CAP: tl.constexpr):
    """Scale raw products to base-2 logits, capped if asked (``cap * tanh(x / cap)``), -inf where not seen."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if HAS_CAP:
        x = scores * (scale / cap)
        shrunk = tl.exp2(tl.abs(x) * (-2 * LOG2E))
        scores = tl.where(x < 0, -cap, cap) * ((1 - shrunk) / (1 + shrunk)) * LOG2E
    else:
        scores = scores * (scale * LOG2E)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def softmax(scores, top, sums):
    """Return this tile's weights, what to scale older sums by, and the new maxima and sums."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # A query that has seen nothing yet: minus infinity less minus infinity would be NaN.
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(top - finite)
    return weights, shrink, new_top, sums * shrink + tl.sum(weights, axis=1)


@triton.jit
def full_tile(
    query,
    keys,
    values,
    slots,
    live,
    seen,
    top,
    sums,
    out,
    scale,
    cap,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    VALUE_WIDE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend to a tile of full-precision tokens at ``slots`` (of one head): new ``top, sums, out``."""
    d = tl.arange(0, WIDE)
    c = tl.arange(0, VALUE_WIDE)
    key = tl.load(
        keys + slots[:, None] * HEAD_DIM + d[None, :], mask=live[:, None] & (d[None, :] < HEAD_DIM), other=0.0
    )
    value = tl.load(
        values + slots[:, None] * VALUE_DIM + c[None, :],
        mask=live[:, None] & (c[None, :] < VALUE_DIM),
        other=0.0,
    )
    scores = tl.zeros((query.shape[0], slots.shape[0]), tl.float32)
    scores = exact(query, tl.trans(key.to(query.dtype)), scores, PRECISION)
    weights, shrink, top, sums = softmax(logits(scores, seen, scale, cap, HAS_CAP), top, sums)
    out = exact(weights.to(query.dtype), value.to(query.dtype), out * shrink[:, None], PRECISION)
    return top, sums, out


@triton.jit
def record_tile(
    query,
    keys,
    values,
    record,
    tokens,
    live,
    seen,
    top,
    sums,
    out,
    scale,
    cap,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    VALUE_WIDE: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend to the ``tokens`` (within the page) of one record: new ``top, sums, out``."""
    HALF: tl.constexpr = BLOCK // 2  # 4 bits: a byte holds tokens j and j + HALF ...
    VALUE_HALF: tl.constexpr = (VALUE_DIM + 1) // 2  # ... or channels j and j + VALUE_HALF
    KEY_CODES: tl.constexpr = HEAD_DIM * BLOCK * BITS // 8
    VALUE_CODES: tl.constexpr = BLOCK * (VALUE_DIM if BITS == 8 else VALUE_HALF)
    MIDDLE: tl.constexpr = 128.0 if BITS == 8 else 8.0
    d = tl.arange(0, WIDE)
    c = tl.arange(0, VALUE_WIDE)
    keys += record * KEY_BYTES
    values += record * VALUE_BYTES
    if BITS == 8:
        key_at = d[:, None] * BLOCK + tokens[None, :]
        value_at = tokens[:, None] * VALUE_DIM + c[None, :]
    else:
        key_at = d[:, None] * HALF + (tokens % HALF)[None, :]
        value_at = tokens[:, None] * VALUE_HALF + (c % VALUE_HALF)[None, :]
    key = tl.load(keys + key_at, mask=(d[:, None] < HEAD_DIM) & live[None, :], other=0)
    key_grid = (keys + KEY_CODES).to(tl.pointer_type(tl.float16))
    key_scale = tl.load(key_grid + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    key_least = tl.load(key_grid + HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    key = codes(key, (tokens >= HALF)[None, :], BITS).to(tl.float32)
    key = key * key_scale[:, None] + (key_least + MIDDLE * key_scale)[:, None]
    scores = tl.zeros((query.shape[0], tokens.shape[0]), tl.float32)
    scores = exact(query, key.to(query.dtype), scores, PRECISION)
    value = tl.load(values + value_at, mask=(c[None, :] < VALUE_DIM) & live[:, None], other=0)
    value_grid = (values + VALUE_CODES).to(tl.pointer_type(tl.float16))
    value_scale = tl.load(value_grid + tokens, mask=live, other=0.0).to(tl.float32)
    value_least = tl.load(value_grid + BLOCK + tokens, mask=live, other=0.0).to(tl.float32)
    exponents = (values + VALUE_CODES + 4 * BLOCK).to(tl.pointer_type(tl.int8))
    exponent = tl.load(exponents + c, mask=c < VALUE_DIM, other=0).to(tl.float32)
    weights, shrink, top, sums = softmax(logits(scores, seen, scale, cap, HAS_CAP), top, sums)
    part = product(weights * value_scale[None, :], codes(value, (c >= VALUE_HALF)[None, :], BITS), TERMS)
    part += tl.sum(weights * (value_least + MIDDLE * value_scale)[None, :], axis=1)[:, None]
    return top, sums, out * shrink[:, None] + part * tl.exp2(exponent)[None, :]
