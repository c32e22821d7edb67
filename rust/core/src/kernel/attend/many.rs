//! Queries times keys where a vector's worth of queries reads one page: lanes are queries.
//!
//! A key's number is multiplied with that of all queries at once, so that nothing is summed across lanes; with
//! few queries that sum costs half as much as the products (`scores`), with many it is all there is to save.

use super::loads::{Load, ask_for};
use super::scores::Tile;
use super::unroll::each;
use crate::kernel::lanes::Words;
use crate::kernel::transpose::to_columns;

/// Tokens whose sums are in registers at once.
const TOKENS: usize = 8;

/// Room for `score`.
#[derive(Default)]
pub(super) struct Room {
    /// Queries `[groups of LANES][dim][LANES]`.
    queries: Vec<f32>,
    /// Keys of one page, widened.
    keys: Vec<f32>,
}

/// Turn `rows` queries, `width` numbers apart, so that their lanes are queries. `rows` is a multiple of `A::LANES`.
#[inline(always)]
pub(super) fn turn<A: Words>(room: &mut Room, queries: &[f32], rows: usize, width: usize, dim: usize) {
    let needed = rows * dim;
    if room.queries.len() < needed {
        room.queries.resize(needed, 0.0);
    }
    for (group, to) in room.queries[..needed].chunks_exact_mut(A::LANES * dim).enumerate() {
        for (d, lanes) in to.chunks_exact_mut(A::LANES).enumerate() {
            for (lane, number) in lanes.iter_mut().enumerate() {
                *number = queries[(group * A::LANES + lane) * width + d];
            }
        }
    }
}

/// Scores of the tile's first rows, as many as were turned, over keys of full precision, `[tokens][dim]`.
///
/// # Safety
/// As `scores::full`.
#[inline(always)]
pub(super) unsafe fn score<A: Words, L: Load>(
    room: &mut Room,
    tile: Tile,
    rows: usize,
    keys: *const L::Raw,
    tokens: usize,
    dim: usize,
) {
    if room.keys.len() < tokens * dim {
        room.keys.resize(tokens * dim, 0.0);
    }
    // SAFETY: `keys` holds `tokens * dim` numbers, and so does the room.
    unsafe {
        let (whole, to) = (tokens * dim / A::LANES * A::LANES, room.keys.as_mut_ptr());
        let mut index = 0;
        while index < whole {
            A::store(to.add(index), L::vector::<A>(keys.add(index)));
            index += A::LANES;
        }
        for index in whole..tokens * dim {
            *to.add(index) = L::one(*keys.add(index));
        }
    }
    let mut found = [[0_u32; 16 * 16]; 2];
    for first in (0..rows).step_by(A::LANES) {
        let queries = room.queries[first * dim..][..A::LANES * dim].as_ptr();
        let mut token = 0;
        while token < tokens {
            let count = (tokens - token).min(A::LANES);
            let mut at = 0;
            while at < count {
                if first == 0 && !tile.ahead.is_null() {
                    let ahead = tile.ahead.cast::<L::Raw>().wrapping_add((token + at) * dim);
                    ask_for::<A, _>(ahead, TOKENS.min(count - at) * dim);
                }
                // SAFETY: at most `tokens` keys are read; the table holds a square of the most lanes.
                unsafe {
                    let key = room.keys.as_ptr().add((token + at) * dim);
                    let to = found[0].as_mut_ptr().cast::<f32>().add(at * A::LANES);
                    if count - at >= TOKENS {
                        products::<A, TOKENS>(queries, key, dim, to);
                        at += TOKENS;
                    } else {
                        products::<A, 1>(queries, key, dim, to);
                        at += 1;
                    }
                }
            }
            let [words, other] = &mut found;
            let square = A::LANES * A::LANES;
            // Tokens past the last one hold what was there before, and are not copied.
            let turned = to_columns::<A>(&mut words[..square], &mut other[..square], A::LANES);
            for lane in 0..A::LANES {
                let from = turned[lane * A::LANES..][..count].as_ptr().cast::<f32>();
                // SAFETY: the tile has room for `tokens` scores in each of its rows.
                unsafe {
                    let to = tile.scores.add((first + lane) * tile.stride + token);
                    std::ptr::copy_nonoverlapping(from, to, count);
                }
            }
            token += count;
        }
    }
}

#[inline(always)]
unsafe fn products<A: Words, const T: usize>(queries: *const f32, keys: *const f32, dim: usize, to: *mut f32) {
    // SAFETY: the caller's: `dim` vectors of queries, `T` keys, room for `T` vectors.
    unsafe {
        let mut key = [keys; T];
        each!(t < T, { key[t] = keys.add(t * dim) });
        let mut sums = [A::splat(0.0); T];
        for d in 0..dim {
            let query = A::load_f32(queries.add(d * A::LANES));
            each!(t < T, { sums[t] = A::fma(A::splat(*key[t].add(d)), query, sums[t]) });
        }
        each!(t < T, { A::store(to.add(t * A::LANES), sums[t]) });
    }
}
