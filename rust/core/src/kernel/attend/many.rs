//! Queries times keys where a vector's worth of queries reads one page: lanes are queries.
//!
//! A key's number is multiplied with that of all queries at once, so that nothing is summed across lanes; with
//! few queries that sum costs half as much as the products (`scores`), with many it is all there is to save.

use super::ahead::ask_for;
use super::loads::Load;
use super::scores::Tile;
use super::unroll::each;
use crate::kernel::lanes::Words;
use crate::kernel::transpose::to_columns;

/// Tokens whose sums are in registers at once.
const TOKENS: usize = 8;

/// Room for `score`.
#[derive(Default)]
pub(super) struct Room {
    /// Queries `[groups of LANES][dim][LANES]`; of bfloat16 two in the place of one, `[dim / 2]`.
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

/// The same for queries in bfloat16, two numbers of one query a lane. `dim` is even.
#[inline(always)]
pub(super) fn turn_pairs<A: Words>(room: &mut Room, queries: &[u16], rows: usize, width: usize, dim: usize) {
    let needed = rows * dim / 2;
    if room.queries.len() < needed {
        room.queries.resize(needed, 0.0);
    }
    for (group, to) in room.queries[..needed].chunks_exact_mut(A::LANES * dim / 2).enumerate() {
        for (pair, lanes) in to.chunks_exact_mut(A::LANES).enumerate() {
            for (lane, both) in lanes.iter_mut().enumerate() {
                let from = &queries[(group * A::LANES + lane) * width + 2 * pair..][..2];
                *both = f32::from_bits(u32::from(from[0]) | u32::from(from[1]) << 16);
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
    // SAFETY: the room holds `tokens` keys and the queries that were turned; the tile is the caller's.
    unsafe { squares::<A, Numbers, L::Raw>(&room.queries, tile, rows, room.keys.as_ptr(), tokens, dim) }
}

/// The same where keys and queries are bfloat16, for `A::DOTS_BF16`: keys are read where they lie.
///
/// # Safety
/// As `score`; the rows were turned by `turn_pairs`.
#[inline(always)]
pub(super) unsafe fn score_bf16<A: Words>(
    room: &Room,
    tile: Tile,
    rows: usize,
    keys: *const u16,
    tokens: usize,
    dim: usize,
) {
    // SAFETY: the caller's.
    unsafe { squares::<A, Pairs, u16>(&room.queries, tile, rows, keys, tokens, dim) }
}

/// How a key's numbers are multiplied with those of all queries.
trait Times {
    /// Numbers of a key.
    type Number;
    /// How many of them meet one vector of queries.
    const AT_ONCE: usize;

    /// # Safety
    /// `dim / AT_ONCE` vectors of queries and `T` keys can be read, `T` vectors written.
    unsafe fn products<A: Words, const T: usize>(
        queries: *const f32,
        keys: *const Self::Number,
        dim: usize,
        to: *mut f32,
    );
}

/// Square after square of a vector's queries by as many tokens, turned into the tile's rows. `R`: what keys are in
/// pages, which the next one's are asked for as.
#[inline(always)]
unsafe fn squares<A: Words, K: Times, R>(
    turned: &[f32],
    tile: Tile,
    rows: usize,
    keys: *const K::Number,
    tokens: usize,
    dim: usize,
) {
    let mut found = [[0_u32; 16 * 16]; 2];
    for first in (0..rows).step_by(A::LANES) {
        let queries = turned[first * dim / K::AT_ONCE..][..A::LANES * dim / K::AT_ONCE].as_ptr();
        let mut token = 0;
        while token < tokens {
            let count = (tokens - token).min(A::LANES);
            let mut at = 0;
            while at < count {
                if first == 0 && !tile.ahead.next.is_null() {
                    let ahead = tile.ahead.next.cast::<R>();
                    ask_for::<A, _>(ahead, (token + at) * dim, TOKENS.min(count - at) * dim);
                }
                // SAFETY: at most `tokens` keys are read; the table holds a square of the most lanes.
                unsafe {
                    let key = keys.add((token + at) * dim);
                    let to = found[0].as_mut_ptr().cast::<f32>().add(at * A::LANES);
                    if count - at >= TOKENS {
                        K::products::<A, TOKENS>(queries, key, dim, to);
                        at += TOKENS;
                    } else {
                        K::products::<A, 1>(queries, key, dim, to);
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
                    if count == A::LANES {
                        A::store(to, A::load_f32(from)); // a call that copies takes longer than a token's products
                    } else {
                        std::ptr::copy_nonoverlapping(from, to, count);
                    }
                }
            }
            token += count;
        }
    }
}

/// One number after another, in float32.
struct Numbers;

impl Times for Numbers {
    type Number = f32;
    const AT_ONCE: usize = 1;

    #[inline(always)]
    unsafe fn products<A: Words, const T: usize>(queries: *const f32, keys: *const f32, dim: usize, to: *mut f32) {
        // SAFETY: the caller's.
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
}

/// Two numbers of bfloat16 at once.
struct Pairs;

impl Times for Pairs {
    type Number = u16;
    const AT_ONCE: usize = 2;

    #[inline(always)]
    unsafe fn products<A: Words, const T: usize>(queries: *const f32, keys: *const u16, dim: usize, to: *mut f32) {
        // SAFETY: the caller's; `dim` is even.
        unsafe {
            let mut key = [keys; T];
            each!(t < T, { key[t] = keys.add(t * dim) });
            let mut sums = [A::splat(0.0); T];
            let mut d = 0;
            while d < dim {
                let query = queries.add(d / 2 * A::LANES).cast();
                each!(t < T, { sums[t] = A::dot_bf16_pair(sums[t], key[t].add(d), query) });
                d += 2;
            }
            each!(t < T, { A::store(to.add(t * A::LANES), sums[t]) });
        }
    }
}
