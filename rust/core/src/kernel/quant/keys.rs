//! Keys: a channel's codes over the page's tokens.
//!
//! Codes are made row by row, with the channels side by side in a vector; of four tokens they are put into
//! words, and the words are transposed, which is a quarter of the work of transposing bytes.

use super::format::Format;
use super::number::Number;
use super::scale::{Scales, code, read_halves};
use super::transpose::{to_columns, to_rows};
use crate::kernel::attend::Bits;
use crate::kernel::isa::Arith;

/// Tokens whose codes make a word.
const TOKENS: usize = 4;

/// Room to work in, kept from head to head.
#[derive(Default)]
pub struct Room {
    tile: Vec<f32>,
    smallest: Vec<f32>,
    largest: Vec<f32>,
    scales: Scales,
    words: Vec<u32>,
    other: Vec<u32>,
}

impl Room {
    /// Room for pages of that format.
    pub fn new(format: &Format) -> Self {
        let mut room = Self::default();
        room.tile.resize(format.block * format.width, 0.0);
        room.smallest.resize(format.width, 0.0);
        room.largest.resize(format.width, 0.0);
        room.scales.resize(format.width);
        room.words.resize(format.codes() / 4, 0);
        room.other.resize(format.codes() / 4, 0);
        room
    }
}

/// Four neighbouring rows of a matrix.
#[inline(always)]
fn four<T>(rows: &[T], width: usize) -> [&[T]; TOKENS] {
    let (a, rest) = rows.split_at(width);
    let (b, rest) = rest.split_at(width);
    let (c, rest) = rest.split_at(width);
    [a, b, c, &rest[..width]]
}

/// Write a page's record; false when it holds what cannot be quantized. `row(token)`: its numbers.
#[inline(always)]
pub fn quantize<'a, N: Number + 'a>(
    format: &Format,
    row: impl Fn(usize) -> &'a [N],
    record: &mut [u8],
    room: &mut Room,
) -> bool {
    let width = format.width;
    room.smallest.fill(f32::INFINITY);
    room.largest.fill(f32::NEG_INFINITY);
    let mut greatest = 0;
    for (step, tile) in room.tile.chunks_exact_mut(TOKENS * width).enumerate() {
        let rows = std::array::from_fn(|i| &row(TOKENS * step + i)[..width]);
        greatest = greatest.max(widen(rows, tile, &mut room.smallest, &mut room.largest));
    }
    if greatest >= f32::INFINITY.to_bits() || !room.scales.derive(&room.smallest, &room.largest, format.levels()) {
        return false;
    }
    let (low, inverse) = (&room.scales.low[..width], &room.scales.inverse[..width]);
    let (first, second) = room.tile.split_at(room.tile.len() / 2);
    if format.bits == Bits::Eight {
        for (words, tile) in room.words.chunks_exact_mut(width).zip(room.tile.chunks_exact(TOKENS * width)) {
            bytes(four(tile, width), low, inverse, words);
        }
    } else {
        let pairs = first.chunks_exact(TOKENS * width).zip(second.chunks_exact(TOKENS * width));
        for (words, (a, b)) in room.words.chunks_exact_mut(width).zip(pairs) {
            nibbles(four(a, width), four(b, width), low, inverse, words);
        }
    }
    let columns = to_columns(&mut room.words, &mut room.other, format.row() / 4);
    let (codes, rest) = record.split_at_mut(format.codes());
    for (bytes, word) in codes.chunks_exact_mut(4).zip(columns) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let (scales, padding) = rest.split_at_mut(4 * width);
    room.scales.write(scales);
    padding.fill(0);
    true
}

/// Widen four rows and take their numbers into account; returns the largest magnitude's bits.
#[inline(always)]
fn widen<N: Number>(rows: [&[N]; TOKENS], tile: &mut [f32], smallest: &mut [f32], largest: &mut [f32]) -> u32 {
    let width = smallest.len();
    let [a, b, c, d] = rows;
    let (ta, tile) = tile.split_at_mut(width);
    let (tb, tile) = tile.split_at_mut(width);
    let (tc, td) = tile.split_at_mut(width);
    let mut greatest = 0_i32;
    for i in 0..width {
        let x = [a[i].widen(), b[i].widen(), c[i].widen(), d[i].widen()];
        (ta[i], tb[i], tc[i], td[i]) = (x[0], x[1], x[2], x[3]);
        let low = lesser(lesser(x[0], x[1]), lesser(x[2], x[3]));
        let high = greater(greater(x[0], x[1]), greater(x[2], x[3]));
        smallest[i] = lesser(low, smallest[i]);
        largest[i] = greater(high, largest[i]);
        let magnitude = |x: f32| (x.to_bits() & 0x7fff_ffff).cast_signed();
        let both = [magnitude(x[0]).max(magnitude(x[1])), magnitude(x[2]).max(magnitude(x[3]))];
        greatest = greatest.max(both[0].max(both[1]));
    }
    greatest.cast_unsigned()
}

/// The lesser of two numbers: one instruction, where `f32::min` minds NaN.
#[inline(always)]
pub fn lesser(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

/// The greater of two numbers.
#[inline(always)]
pub fn greater(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Put the codes of four tokens into words, a channel a word.
#[inline(always)]
fn bytes([a, b, c, d]: [&[f32]; TOKENS], low: &[f32], inverse: &[f32], words: &mut [u32]) {
    for (i, word) in words.iter_mut().enumerate() {
        let code = |row: &[f32]| code(row[i], low[i], inverse[i]) & 255;
        *word = code(a) | code(b) << 8 | code(c) << 16 | code(d) << 24;
    }
}

/// The same with the codes of four tokens half a page on in the upper halves of the bytes.
#[inline(always)]
fn nibbles(
    [a, b, c, d]: [&[f32]; TOKENS],
    [e, f, g, h]: [&[f32]; TOKENS],
    low: &[f32],
    inverse: &[f32],
    words: &mut [u32],
) {
    for (i, word) in words.iter_mut().enumerate() {
        let code = |row: &[f32]| code(row[i], low[i], inverse[i]) & 15;
        let lower = code(a) | code(b) << 8 | code(c) << 16 | code(d) << 24;
        let upper = code(e) | code(f) << 8 | code(g) << 16 | code(h) << 24;
        *word = lower | upper << 4;
    }
}

/// Write the numbers of a record; `row(token)`: where they go.
#[inline(always)]
pub fn dequantize<'a, A: Arith, N: Number + 'a>(
    format: &Format,
    record: &[u8],
    mut row: impl FnMut(usize) -> &'a mut [N],
    room: &mut Room,
) {
    let width = format.width;
    let (codes, rest) = record.split_at(format.codes());
    for (word, bytes) in room.words.iter_mut().zip(codes.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    let (scale, low) = (&mut room.largest[..width], &mut room.smallest[..width]);
    read_halves(&rest[..2 * width], scale);
    read_halves(&rest[2 * width..4 * width], low);
    let words = to_rows(&mut room.words, &mut room.other, format.row() / 4);
    for (step, words) in words.chunks_exact(width).enumerate() {
        for i in 0..TOKENS {
            let token = TOKENS * step + i;
            let shift = 8 * i as u32;
            if format.bits == Bits::Eight {
                spread::<A, N, 255>(words, shift, scale, low, &mut row(token)[..width]);
            } else {
                spread::<A, N, 15>(words, shift, scale, low, &mut row(token)[..width]);
                spread::<A, N, 15>(words, shift + 4, scale, low, &mut row(token + format.block / 2)[..width]);
            }
        }
    }
}

/// Write the numbers of one token, whose codes lie `shift` bits up in the words.
#[inline(always)]
fn spread<A: Arith, N: Number, const MASK: u32>(words: &[u32], shift: u32, scale: &[f32], low: &[f32], out: &mut [N]) {
    for (((out, word), scale), low) in out.iter_mut().zip(words).zip(scale).zip(low) {
        let code = ((word >> shift) & MASK).cast_signed() as f32;
        *out = N::narrow(A::mul_add(code, *scale, *low));
    }
}
