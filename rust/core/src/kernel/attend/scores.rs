//! Queries times keys: every query of a KV head against the tokens of one page.
//!
//! Tiles of four tokens by up to four queries stay in registers: each key is loaded once for all of them, and
//! four sums are taken at once.

use super::ahead::{Ahead, ask_for};
use super::loads::Load;
use super::unroll::each;
use crate::kernel::lanes::Arith;

/// Where scores go and queries come from: `rows` of each, `stride` and `width` numbers apart.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub queries: *const f32,
    pub width: usize,
    pub rows: usize,
    pub scores: *mut f32,
    pub stride: usize,
    pub ahead: Ahead,
}

impl Tile {
    /// The first `R` queries.
    #[inline(always)]
    fn each_query<const R: usize>(self) -> [*const f32; R] {
        let mut queries = [self.queries; R];
        // SAFETY: the caller has that many rows left.
        each!(r < R, { queries[r] = unsafe { self.queries.add(r * self.width) } });
        queries
    }

    #[inline(always)]
    pub(super) fn below(self, rows: usize) -> Self {
        // SAFETY: the caller has that many rows left.
        let (queries, scores) = unsafe { (self.queries.add(rows * self.width), self.scores.add(rows * self.stride)) };
        let ahead = if rows == 0 { self.ahead } else { Ahead::NONE };
        Self { queries, scores, rows: self.rows - rows, ahead, ..self }
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
    let queries = tile.each_query::<R>();
    let mut ahead = tile.ahead.walk(keys, tokens, dim);
    let mut token = 0;
    // SAFETY: `token + 4 <= tokens` and `d + LANES <= whole <= dim` within the loops; the caller's otherwise.
    unsafe {
        while token + 4 <= tokens {
            let key = keys.add(token * dim);
            let key = [key, key.add(dim), key.add(2 * dim), key.add(3 * dim)];
            let mut sums = [[A::splat(0.0); 4]; R];
            let mut d = 0;
            while d < whole {
                ask_for::<A, _>(ahead.at, 4 * d, 4 * A::LANES);
                let mut k = [A::splat(0.0); 4];
                each!(t < 4, { k[t] = L::vector::<A>(key[t].add(d)) });
                each!(r < R, {
                    let q = A::load_f32(queries[r].add(d));
                    each!(t < 4, { sums[r][t] = A::fma(k[t], q, sums[r][t]) });
                });
                d += A::LANES;
            }
            each!(r < R, {
                let mut found = A::sums(sums[r]);
                for d in whole..dim {
                    let q = *queries[r].add(d);
                    each!(t < 4, { found[t] = A::mul_add(L::one(*key[t].add(d)), q, found[t]) });
                }
                tile.scores.add(r * tile.stride + token).cast::<[f32; 4]>().write_unaligned(found);
            });
            ahead.step(4, dim);
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
    let mut ahead = tile.ahead.walk(keys, tokens, dim);
    let mut token = 0;
    // SAFETY: `token + 4 <= tokens`, and `dim` is a multiple of the step of `d`.
    unsafe {
        let mut query = [queries; R];
        each!(r < R, { query[r] = queries.add(r * tile.width) });
        while token + 4 <= tokens {
            let key = keys.add(token * dim);
            let key = [key, key.add(dim), key.add(2 * dim), key.add(3 * dim)];
            let mut sums = [[A::splat(0.0); 4]; R];
            let mut d = 0;
            while d < dim {
                ask_for::<A, _>(ahead.at, 4 * d, 8 * A::LANES);
                each!(r < R, {
                    let query = query[r].add(d);
                    each!(t < 4, { sums[r][t] = A::dot_bf16(sums[r][t], key[t].add(d), query) });
                });
                d += 2 * A::LANES;
            }
            each!(r < R, {
                let found = A::sums(sums[r]);
                tile.scores.add(r * tile.stride + token).cast::<[f32; 4]>().write_unaligned(found);
            });
            ahead.step(4, dim);
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
        while A::LANES == 16 && tile.rows >= 4 {
            quantized_rows::<A, 4>(tile, codes, block, dim, bias, four);
            bias = bias.add(4);
            tile = tile.below(4);
        }
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
    // Vectors of bytes at once.
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
        let mut sums = [[A::splat(0.0); W]; R];
        each!(r < R, { sums[r] = [A::splat(*bias.add(r)); W] });
        let queries = tile.each_query::<R>();
        let ahead = if token == 0 { tile.ahead.next } else { std::ptr::null() };
        let mut code = codes;
        for d in 0..dim {
            let mut k = [A::splat(0.0); W];
            each!(w < W, { k[w] = A::load_u8(code.add(w * A::LANES)) });
            ask_for::<A, _>(ahead, d * block, block);
            each!(r < R, {
                let q = A::splat(*queries[r].add(d));
                each!(w < W, { sums[r][w] = A::fma(k[w], q, sums[r][w]) });
            });
            code = code.wrapping_add(block);
        }
        each!(r < R, {
            let to = tile.scores.add(r * tile.stride + token);
            each!(w < W, { A::store(to.add(w * A::LANES), sums[r][w]) });
        });
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
        let mut low = [[A::splat(0.0); W]; R];
        each!(r < R, { low[r] = [A::splat(*bias.add(r)); W] });
        let mut high = low;
        let queries = tile.each_query::<R>();
        let ahead = if token == 0 { tile.ahead.next } else { std::ptr::null() };
        let mut code = codes;
        for d in 0..dim {
            let mut k = [(A::splat(0.0), A::splat(0.0)); W];
            each!(w < W, { k[w] = A::load_u4(code.add(w * A::LANES)) });
            ask_for::<A, _>(ahead, d * (block / 2), block / 2);
            each!(r < R, {
                let q = A::splat(*queries[r].add(d));
                each!(w < W, {
                    low[r][w] = A::fma(k[w].0, q, low[r][w]);
                    high[r][w] = A::fma(k[w].1, q, high[r][w]);
                });
            });
            code = code.wrapping_add(block / 2);
        }
        each!(r < R, {
            let to = tile.scores.add(r * tile.stride + token);
            each!(w < W, {
                A::store(to.add(w * A::LANES), low[r][w]);
                A::store(to.add(block / 2 + w * A::LANES), high[r][w]);
            });
        });
    }
}
