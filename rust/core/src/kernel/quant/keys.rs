//! Keys: a channel's codes over the page's tokens.
//!
//! Codes are made with the channels side by side in a vector. Those of four tokens are put into words, and
//! the words are transposed, which is a quarter of the work of transposing bytes.

use super::format::{Bits, Format};
use super::number::{Number, Rows};
use super::scales::{Scales, codes};
use crate::kernel::lanes::Words;
use crate::kernel::transpose::{to_columns, to_rows};

/// Tokens whose codes make a word; of 4 bits, as many more half a page on.
const TOKENS: usize = 4;

/// Room to work in, kept from head to head.
#[derive(Default)]
pub struct Room<N> {
    /// The page, widened to whole vectors, where it is not.
    page: Vec<N>,
    scales: Scales,
    words: Vec<u32>,
    other: Vec<u32>,
}

impl<N> Room<N> {
    /// The page that was made room for.
    fn rows(&mut self, width: usize) -> Rows<N> {
        Rows { start: self.page.as_mut_ptr(), stride: (width * size_of::<N>()) as isize }
    }
}

impl<N: Number> super::Room<N> for Room<N> {
    fn new<A: Words>(format: &Format) -> Self {
        let width = format.width.next_multiple_of(A::LANES);
        let words = width * format.row() / TOKENS;
        Self {
            page: if width == format.width { Vec::new() } else { vec![N::default(); format.block * width] },
            scales: Scales::new(format.width),
            words: vec![0; words],
            other: vec![0; words],
        }
    }

    #[inline(always)]
    unsafe fn quantize<A: Words>(&mut self, format: &Format, mut page: Rows<N>, record: &mut [u8]) -> bool {
        let width = format.width.next_multiple_of(A::LANES);
        if width != format.width {
            let whole = self.rows(width);
            for token in 0..format.block {
                // SAFETY: the caller's, and a token's place in the room.
                unsafe { page.at(token, 0).copy_to_nonoverlapping(whole.at(token, 0), format.width) };
            }
            page = whole;
        }
        let mut top = A::bits(A::splat(0.0));
        for first in (0..width).step_by(A::LANES) {
            let (mut low, mut high) = (A::splat(f32::INFINITY), A::splat(f32::NEG_INFINITY));
            for token in (0..format.block).step_by(TOKENS) {
                // SAFETY: as many rows, of whole vectors.
                let [a, b, c, d] = unsafe { four::<A, N>(page, token, first) };
                low = A::min(low, A::min(A::min(a, b), A::min(c, d)));
                high = A::max(high, A::max(A::max(a, b), A::max(c, d)));
                top = A::top(A::top(A::top(A::top(top, a), b), c), d);
            }
            let (low, inverse) = self.scales.derive::<A>(first, low, high, format.levels());
            for (row, words) in self.words.chunks_exact_mut(width).enumerate() {
                // SAFETY: as many rows, of whole vectors; a slice of `LANES`.
                unsafe {
                    let mut found = word::<A, N>(page, TOKENS * row, first, low, inverse);
                    if format.bits == Bits::Four {
                        let token = TOKENS * row + format.block / 2;
                        found = A::merge(found, word::<A, N>(page, token, first, low, inverse), 4);
                    }
                    A::store_words(words[first..first + A::LANES].as_mut_ptr(), found);
                }
            }
        }
        let columns = to_columns::<A>(&mut self.words, &mut self.other, format.row() / TOKENS);
        let (bytes, rest) = record.split_at_mut(format.codes());
        for (bytes, word) in bytes.chunks_exact_mut(4).zip(columns) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let (scales, padding) = rest.split_at_mut(4 * format.width);
        padding.fill(0);
        self.scales.write(scales) && is_finite::<A>(top)
    }

    #[inline(always)]
    unsafe fn dequantize<A: Words>(&mut self, format: &Format, record: &[u8], page: Rows<N>) {
        let width = format.width.next_multiple_of(A::LANES);
        let target = if width == format.width { page } else { self.rows(width) };
        let (bytes, rest) = record.split_at(format.codes());
        for (word, bytes) in self.words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        self.scales.read(&rest[..4 * format.width]);
        let words = to_rows::<A>(&mut self.words, &mut self.other, format.row() / TOKENS);
        for (row, words) in words.chunks_exact(width).enumerate() {
            for first in (0..width).step_by(2 * A::LANES) {
                // The last of an odd count of vectors stands for its own neighbour.
                let is_pair = first + A::LANES < width;
                let second = if is_pair { first + A::LANES } else { first };
                let (a, b) = (self.scales.load::<A>(first), self.scales.load::<A>(second));
                // SAFETY: slices of `LANES`; as many rows, of whole vectors.
                unsafe {
                    let left = A::load_words(words[first..first + A::LANES].as_ptr());
                    let right = A::load_words(words[second..second + A::LANES].as_ptr());
                    for i in 0..TOKENS {
                        let (token, shift) = (TOKENS * row + i, 8 * i as u32);
                        let (rows, mask) = if format.bits == Bits::Eight { (1, 255) } else { (2, 15) };
                        for half in 0..rows {
                            let shift = shift + 4 * half as u32;
                            let to = target.at(token + half * (format.block / 2), first);
                            let x = A::fma(A::field(left, shift, mask), a.0, a.1);
                            if is_pair {
                                N::store_two::<A>(to, x, A::fma(A::field(right, shift, mask), b.0, b.1));
                            } else {
                                N::store::<A>(to, x);
                            }
                        }
                    }
                }
            }
        }
        if width != format.width {
            for token in 0..format.block {
                // SAFETY: the caller's, and a token's place in the room.
                unsafe { target.at(token, 0).copy_to_nonoverlapping(page.at(token, 0), format.width) };
            }
        }
    }
}

/// The same channels of four neighbouring tokens.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn four<A: Words, N: Number>(page: Rows<N>, token: usize, first: usize) -> [A::V; TOKENS] {
    // SAFETY: the caller's.
    unsafe {
        [
            N::load::<A>(page.at(token, first)),
            N::load::<A>(page.at(token + 1, first)),
            N::load::<A>(page.at(token + 2, first)),
            N::load::<A>(page.at(token + 3, first)),
        ]
    }
}

/// The codes of four neighbouring tokens, a channel a word.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn word<A: Words, N: Number>(page: Rows<N>, token: usize, first: usize, low: A::V, inverse: A::V) -> A::W {
    // SAFETY: the caller's.
    let [a, b, c, d] = unsafe { four::<A, N>(page, token, first) };
    let left = A::merge(codes::<A>(a, low, inverse), codes::<A>(b, low, inverse), 8);
    let right = A::merge(codes::<A>(c, low, inverse), codes::<A>(d, low, inverse), 8);
    A::merge(left, right, 16)
}

/// True when no magnitude is an infinity or NaN.
#[inline(always)]
pub fn is_finite<A: Words>(top: A::W) -> bool {
    let mut magnitudes = [0; 16];
    // SAFETY: no vector is longer.
    unsafe { A::store_words(magnitudes.as_mut_ptr(), top) };
    magnitudes.iter().all(|magnitude| *magnitude < f32::INFINITY.to_bits())
}
