//! Queries times keys: every query of a KV head against the tokens of one page.
//!
//! Tiles of four tokens by up to four queries stay in registers: each key is loaded once for all of them, and
//! four sums are taken at once.

use super::loads::Load;
use crate::kernel::lanes::Arith;

/// Where scores go and queries come from: `rows` of each, `stride` and `width` numbers apart.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub queries: *const f32,
    pub width: usize,
    pub rows: usize,
    pub scores: *mut f32,
    pub stride: usize,
}

impl Tile {
    #[inline(always)]
    fn below(self, rows: usize) -> Self {
        // SAFETY: the caller has that many rows left.
        let (queries, scores) = unsafe { (self.queries.add(rows * self.width), self.scores.add(rows * self.stride)) };
        Self { queries, scores, rows: self.rows - rows, ..self }
    }
}

/// Keys of full precision, `[tokens][dim]`.
///
/// # Safety
/// The tile's rows hold `dim` numbers and room for `tokens`; `keys` holds `tokens * dim`.
#[inline(always)]
pub(super) unsafe fn full<A: Arith, L: Load>(tile: Tile, keys: *const L::Raw, tokens: usize, dim: usize) {
    let mut tile = tile;
    // SAFETY: each call stays within the rows that are left.
    unsafe {
        while A::LANES == 16 && tile.rows >= 4 {
            full_rows::<A, L, 4>(tile, keys, tokens, dim);
            tile = tile.below(4);
        }
        while tile.rows >= 2 {
            full_rows::<A, L, 2>(tile, keys, tokens, dim);
            tile = tile.below(2);
        }
        if tile.rows == 1 {
            full_rows::<A, L, 1>(tile, keys, tokens, dim);
        }
    }
}

#[inline(always)]
unsafe fn full_rows<A: Arith, L: Load, const R: usize>(tile: Tile, keys: *const L::Raw, tokens: usize, dim: usize) {
    let whole = dim - dim % A::LANES;
    let mut token = 0;
    // SAFETY: `token + 4 <= tokens` and `d + LANES <= whole <= dim` within the loops; the caller's otherwise.
    unsafe {
        while token + 4 <= tokens {
            let key: [*const L::Raw; 4] = std::array::from_fn(|t| keys.add((token + t) * dim));
            let mut sums = [[A::splat(0.0); 4]; R];
            let mut d = 0;
            while d < whole {
                let k: [A::V; 4] = std::array::from_fn(|t| L::vector::<A>(key[t].add(d)));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let q = A::load_f32(tile.queries.add(r * tile.width + d));
                    for t in 0..4 {
                        sums[t] = A::fma(k[t], q, sums[t]);
                    }
                }
                d += A::LANES;
            }
            for (r, sums) in sums.into_iter().enumerate() {
                let mut found = A::sums(sums);
                for d in whole..dim {
                    let q = *tile.queries.add(r * tile.width + d);
                    for t in 0..4 {
                        found[t] = A::mul_add(L::one(*key[t].add(d)), q, found[t]);
                    }
                }
                tile.scores.add(r * tile.stride + token).cast::<[f32; 4]>().write_unaligned(found);
            }
            token += 4;
        }
        while token < tokens {
            let key = keys.add(token * dim);
            for r in 0..R {
                let query = tile.queries.add(r * tile.width);
                let mut sum = A::splat(0.0);
                let mut d = 0;
                while d < whole {
                    sum = A::fma(L::vector::<A>(key.add(d)), A::load_f32(query.add(d)), sum);
                    d += A::LANES;
                }
                let mut found = A::sum(sum);
                for d in whole..dim {
                    found = A::mul_add(L::one(*key.add(d)), *query.add(d), found);
                }
                *tile.scores.add(r * tile.stride + token) = found;
            }
            token += 1;
        }
    }
}

/// Keys and queries in bfloat16, two products a lane and instruction. `queries`: as the tile's, in bfloat16.
///
/// # Safety
/// As `full`; `dim` is a multiple of `2 * A::LANES`.
#[inline(always)]
pub(super) unsafe fn bf16_dots<A: Arith>(tile: Tile, queries: *const u16, keys: *const u16, tokens: usize, dim: usize) {
    let (mut tile, mut queries) = (tile, queries);
    // SAFETY: each call stays within the rows that are left.
    unsafe {
        while tile.rows >= 4 {
            bf16_rows::<A, 4>(tile, queries, keys, tokens, dim);
            queries = queries.add(4 * tile.width);
            tile = tile.below(4);
        }
        while tile.rows >= 2 {
            bf16_rows::<A, 2>(tile, queries, keys, tokens, dim);
            queries = queries.add(2 * tile.width);
            tile = tile.below(2);
        }
        if tile.rows == 1 {
            bf16_rows::<A, 1>(tile, queries, keys, tokens, dim);
        }
    }
}

#[inline(always)]
unsafe fn bf16_rows<A: Arith, const R: usize>(
    tile: Tile,
    queries: *const u16,
    keys: *const u16,
    tokens: usize,
    dim: usize,
) {
    let mut token = 0;
    // SAFETY: `token + 4 <= tokens`, and `dim` is a multiple of the step of `d`.
    unsafe {
        while token + 4 <= tokens {
            let key: [*const u16; 4] = std::array::from_fn(|t| keys.add((token + t) * dim));
            let mut sums = [[A::splat(0.0); 4]; R];
            let mut d = 0;
            while d < dim {
                for (r, sums) in sums.iter_mut().enumerate() {
                    let query = queries.add(r * tile.width + d);
                    for t in 0..4 {
                        sums[t] = A::dot_bf16(sums[t], key[t].add(d), query);
                    }
                }
                d += 2 * A::LANES;
            }
            for (r, sums) in sums.into_iter().enumerate() {
                tile.scores.add(r * tile.stride + token).cast::<[f32; 4]>().write_unaligned(A::sums(sums));
            }
            token += 4;
        }
        while token < tokens {
            let key = keys.add(token * dim);
            for r in 0..R {
                let mut sum = A::splat(0.0);
                let mut d = 0;
                while d < dim {
                    sum = A::dot_bf16(sum, key.add(d), queries.add(r * tile.width + d));
                    d += 2 * A::LANES;
                }
                *tile.scores.add(r * tile.stride + token) = A::sum(sum);
            }
            token += 1;
        }
    }
}

/// Quantized keys, `[dim][block]` codes: lanes are tokens, so that nothing is summed across them.
///
/// The tile's queries were multiplied by the channels' scales; `bias` holds each one's product with the
/// channels' minima. `four`: two codes a byte.
///
/// # Safety
/// `codes` holds `dim` channels of `block` tokens (half as many bytes when `four`); the tile's rows hold `dim`
/// numbers and room for `block`; `bias` one number a row. `block` is a multiple of 16.
#[inline(always)]
pub(super) unsafe fn quantized<A: Arith>(
    tile: Tile,
    codes: *const u8,
    block: usize,
    dim: usize,
    bias: *const f32,
    four: bool,
) {
    let (mut tile, mut bias) = (tile, bias);
    // SAFETY: each call stays within the rows that are left.
    unsafe {
        while tile.rows >= 2 {
            quantized_rows::<A, 2>(tile, codes, block, dim, bias, four);
            bias = bias.add(2);
            tile = tile.below(2);
        }
        if tile.rows == 1 {
            quantized_rows::<A, 1>(tile, codes, block, dim, bias, four);
        }
    }
}

#[inline(always)]
unsafe fn quantized_rows<A: Arith, const R: usize>(
    tile: Tile,
    codes: *const u8,
    block: usize,
    dim: usize,
    bias: *const f32,
    four: bool,
) {
    let mut token = 0;
    let bytes = if four { block / 2 } else { block };
    // Vectors of bytes at once: with two rows, eight sums in registers.
    let wide = if four { 2 } else { 4 };
    // SAFETY: vectors end within `bytes`; rows as the caller's.
    unsafe {
        while token < bytes {
            let left = bytes - token;
            if !four && left >= 4 * A::LANES {
                eights::<A, R, 4>(tile, codes.add(token), block, dim, bias, token);
                token += wide * A::LANES;
            } else if !four && left >= A::LANES {
                eights::<A, R, 1>(tile, codes.add(token), block, dim, bias, token);
                token += A::LANES;
            } else if four && left >= 2 * A::LANES {
                fours::<A, R, 2>(tile, codes.add(token), block, dim, bias, token);
                token += wide * A::LANES;
            } else if four && left >= A::LANES {
                fours::<A, R, 1>(tile, codes.add(token), block, dim, bias, token);
                token += A::LANES;
            } else {
                // Of 16 tokens in 4 bits only: 8 bytes a channel.
                for r in 0..R {
                    let (mut low, mut high) = (*bias.add(r), *bias.add(r));
                    for d in 0..dim {
                        let (q, code) = (*tile.queries.add(r * tile.width + d), *codes.add(d * bytes + token));
                        low = A::mul_add(f32::from(code & 15), q, low);
                        high = A::mul_add(f32::from(code >> 4), q, high);
                    }
                    *tile.scores.add(r * tile.stride + token) = low;
                    *tile.scores.add(r * tile.stride + token + bytes) = high;
                }
                token += 1;
            }
        }
    }
}

#[inline(always)]
unsafe fn eights<A: Arith, const R: usize, const W: usize>(
    tile: Tile,
    codes: *const u8,
    block: usize,
    dim: usize,
    bias: *const f32,
    token: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut sums: [[A::V; W]; R] = std::array::from_fn(|r| [A::splat(*bias.add(r)); W]);
        for d in 0..dim {
            let k: [A::V; W] = std::array::from_fn(|w| A::load_u8(codes.add(d * block + w * A::LANES)));
            for (r, sums) in sums.iter_mut().enumerate() {
                let q = A::splat(*tile.queries.add(r * tile.width + d));
                for w in 0..W {
                    sums[w] = A::fma(k[w], q, sums[w]);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (w, sum) in sums.into_iter().enumerate() {
                A::store(tile.scores.add(r * tile.stride + token + w * A::LANES), sum);
            }
        }
    }
}

#[inline(always)]
unsafe fn fours<A: Arith, const R: usize, const W: usize>(
    tile: Tile,
    codes: *const u8,
    block: usize,
    dim: usize,
    bias: *const f32,
    token: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut sums: [[(A::V, A::V); W]; R] =
            std::array::from_fn(|r| [(A::splat(*bias.add(r)), A::splat(*bias.add(r))); W]);
        for d in 0..dim {
            let k: [(A::V, A::V); W] = std::array::from_fn(|w| A::load_u4(codes.add(d * (block / 2) + w * A::LANES)));
            for (r, sums) in sums.iter_mut().enumerate() {
                let q = A::splat(*tile.queries.add(r * tile.width + d));
                for w in 0..W {
                    sums[w] = (A::fma(k[w].0, q, sums[w].0), A::fma(k[w].1, q, sums[w].1));
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (w, (low, high)) in sums.into_iter().enumerate() {
                let to = tile.scores.add(r * tile.stride + token + w * A::LANES);
                A::store(to, low);
                A::store(to.add(block / 2), high);
            }
        }
    }
}
