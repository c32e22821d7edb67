//! Weights times values: what every query of a KV head takes from the tokens of one page.
//!
//! Lanes are channels. A tile of sums stays in registers over all tokens of the page; each value is loaded
//! once for up to four queries.

use super::ahead::{Ahead, ask_for};
use super::loads::Load;
use super::unroll::each;
use crate::kernel::lanes::Arith;

/// Where weights come from and sums go: `rows` of each, `stride` and `width` numbers apart.
#[derive(Clone, Copy)]
pub(super) struct Mix {
    pub weights: *const f32,
    pub stride: usize,
    pub rows: usize,
    pub sums: *mut f32,
    pub width: usize,
    pub ahead: Ahead,
}

impl Mix {
    #[inline(always)]
    fn below(self, rows: usize) -> Self {
        // SAFETY: the caller has that many rows left.
        let (weights, sums) = unsafe { (self.weights.add(rows * self.stride), self.sums.add(rows * self.width)) };
        Self { weights, sums, rows: self.rows - rows, ahead: Ahead::NONE, ..self }
    }
}

/// Add values of full precision (or codes of 8 bits), `[tokens][dim]`, weighted.
///
/// # Safety
/// The rows hold `tokens` weights and `dim` sums; `values` holds `tokens * dim`.
#[inline(always)]
pub(super) unsafe fn full<A: Arith, L: Load>(mix: Mix, values: *const L::Raw, tokens: usize, dim: usize) {
    let mut mix = mix;
    // SAFETY: each call stays within the rows that are left.
    unsafe {
        while A::LANES == 16 && mix.rows >= 4 {
            full_rows::<A, L, 4>(mix, values, tokens, dim);
            mix = mix.below(4);
        }
        while mix.rows >= 2 {
            full_rows::<A, L, 2>(mix, values, tokens, dim);
            mix = mix.below(2);
        }
        if mix.rows == 1 {
            full_rows::<A, L, 1>(mix, values, tokens, dim);
        }
    }
}

#[inline(always)]
unsafe fn full_rows<A: Arith, L: Load, const R: usize>(mix: Mix, values: *const L::Raw, tokens: usize, dim: usize) {
    let mut d = 0;
    // SAFETY: tiles end within `dim`.
    unsafe {
        while A::LANES == 16 && d + 4 * A::LANES <= dim {
            columns::<A, L, R, 4>(mix, values, tokens, dim, d);
            d += 4 * A::LANES;
        }
        while d + 2 * A::LANES <= dim {
            columns::<A, L, R, 2>(mix, values, tokens, dim, d);
            d += 2 * A::LANES;
        }
        while d + A::LANES <= dim {
            columns::<A, L, R, 1>(mix, values, tokens, dim, d);
            d += A::LANES;
        }
        while d < dim {
            for r in 0..R {
                let sum = mix.sums.add(r * mix.width + d);
                for t in 0..tokens {
                    *sum = A::mul_add(L::one(*values.add(t * dim + d)), *mix.weights.add(r * mix.stride + t), *sum);
                }
            }
            d += 1;
        }
    }
}

#[inline(always)]
unsafe fn columns<A: Arith, L: Load, const R: usize, const W: usize>(
    mix: Mix,
    values: *const L::Raw,
    tokens: usize,
    dim: usize,
    d: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut to = [mix.sums; R];
        let mut weights = [mix.weights; R];
        let mut sums = [[A::splat(0.0); W]; R];
        each!(r < R, {
            to[r] = mix.sums.add(r * mix.width + d);
            weights[r] = mix.weights.add(r * mix.stride);
            each!(w < W, { sums[r][w] = A::load_f32(to[r].add(w * A::LANES)) });
        });
        let mut value = values.add(d);
        let mut ahead = mix.ahead.walk(values, tokens, dim);
        for t in 0..tokens {
            ask_for::<A, _>(ahead.at, d, W * A::LANES);
            ahead.step(1, dim);
            let mut v = [A::splat(0.0); W];
            each!(w < W, { v[w] = L::vector::<A>(value.add(w * A::LANES)) });
            each!(r < R, {
                let weight = A::splat(*weights[r].add(t));
                each!(w < W, { sums[r][w] = A::fma(v[w], weight, sums[r][w]) });
            });
            value = value.wrapping_add(dim);
        }
        each!(r < R, { each!(w < W, { A::store(to[r].add(w * A::LANES), sums[r][w]) }) });
    }
}

/// Add codes of 4 bits, `[tokens][ceil(dim / 2)]` bytes: byte j holds channel j and channel j + ceil(dim / 2).
///
/// # Safety
/// As `full`, with rows of `2 * ceil(dim / 2)` sums.
#[inline(always)]
pub(super) unsafe fn fours<A: Arith>(mix: Mix, codes: *const u8, tokens: usize, dim: usize) {
    let mut mix = mix;
    // SAFETY: each call stays within the rows that are left.
    unsafe {
        while A::LANES == 16 && mix.rows >= 4 {
            fours_rows::<A, 4>(mix, codes, tokens, dim);
            mix = mix.below(4);
        }
        while mix.rows >= 2 {
            fours_rows::<A, 2>(mix, codes, tokens, dim);
            mix = mix.below(2);
        }
        if mix.rows == 1 {
            fours_rows::<A, 1>(mix, codes, tokens, dim);
        }
    }
}

#[inline(always)]
unsafe fn fours_rows<A: Arith, const R: usize>(mix: Mix, codes: *const u8, tokens: usize, dim: usize) {
    let half = dim.div_ceil(2);
    let mut j = 0;
    // SAFETY: tiles end within `half`.
    unsafe {
        while j + 2 * A::LANES <= half {
            nibbles::<A, R, 2>(mix, codes, tokens, half, j);
            j += 2 * A::LANES;
        }
        while j + A::LANES <= half {
            nibbles::<A, R, 1>(mix, codes, tokens, half, j);
            j += A::LANES;
        }
        while j < half {
            for r in 0..R {
                let (low, high) = (mix.sums.add(r * mix.width + j), mix.sums.add(r * mix.width + j + half));
                for t in 0..tokens {
                    let (code, weight) = (*codes.add(t * half + j), *mix.weights.add(r * mix.stride + t));
                    *low = A::mul_add(f32::from(code & 15), weight, *low);
                    *high = A::mul_add(f32::from(code >> 4), weight, *high);
                }
            }
            j += 1;
        }
    }
}

#[inline(always)]
unsafe fn nibbles<A: Arith, const R: usize, const W: usize>(
    mix: Mix,
    codes: *const u8,
    tokens: usize,
    half: usize,
    j: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut to = [mix.sums; R];
        let mut weights = [mix.weights; R];
        let mut low = [[A::splat(0.0); W]; R];
        let mut high = low;
        each!(r < R, {
            to[r] = mix.sums.add(r * mix.width + j);
            weights[r] = mix.weights.add(r * mix.stride);
            each!(w < W, {
                low[r][w] = A::load_f32(to[r].add(w * A::LANES));
                high[r][w] = A::load_f32(to[r].add(half + w * A::LANES));
            });
        });
        let mut code = codes.add(j);
        let ahead = if j == 0 { mix.ahead.next } else { std::ptr::null() };
        for t in 0..tokens {
            ask_for::<A, _>(ahead, t * half, half);
            let mut v = [(A::splat(0.0), A::splat(0.0)); W];
            each!(w < W, { v[w] = A::load_u4(code.add(w * A::LANES)) });
            each!(r < R, {
                let weight = A::splat(*weights[r].add(t));
                each!(w < W, {
                    low[r][w] = A::fma(v[w].0, weight, low[r][w]);
                    high[r][w] = A::fma(v[w].1, weight, high[r][w]);
                });
            });
            code = code.wrapping_add(half);
        }
        each!(r < R, {
            each!(w < W, {
                A::store(to[r].add(w * A::LANES), low[r][w]);
                A::store(to[r].add(half + w * A::LANES), high[r][w]);
            });
        });
    }
}
