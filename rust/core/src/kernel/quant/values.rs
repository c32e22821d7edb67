//! Values: a token's codes over its channels, outlier channels scaled down first.
//!
//! A token of 4 bits has two halves, whose codes share bytes. Where the halves are not whole vectors, tokens are
//! copied to where they are, with repetitions of their first number behind each half.

use super::format::{Bits, Format};
use super::keys::is_finite;
use super::number::{Number, Rows};
use super::outliers::{find, power_of_two};
use super::scales::{Scales, codes};
use crate::kernel::lanes::Words;

/// The longest vector.
const LANES: usize = 16;

/// Room to work in, kept from head to head.
#[derive(Default)]
pub struct Room<N> {
    /// The page, laid out in whole vectors, where it is not.
    page: Vec<N>,
    /// Of the laid out channels: largest magnitudes, then powers of two.
    channels: Vec<f32>,
    magnitudes: Vec<f32>,
    sorted: Vec<f32>,
    exponents: Vec<i8>,
    /// Of the tokens: smallest and largest numbers, lane by lane and then folded; then minimums and factors.
    lows: Vec<f32>,
    highs: Vec<f32>,
    scales: Scales,
}

/// How a token lies in whole vectors.
#[derive(Clone, Copy)]
struct Laid {
    /// Channels of its first half, or all of them.
    first: usize,
    /// Channels of its second half.
    second: usize,
    /// Room for either.
    half: usize,
}

impl Laid {
    #[inline(always)]
    fn new<A: Words>(format: &Format) -> Self {
        let first = format.row();
        Self { first, second: format.width - first, half: first.next_multiple_of(A::LANES) }
    }

    /// Numbers of a token.
    #[inline(always)]
    fn width(self) -> usize {
        if self.second == 0 { self.half } else { 2 * self.half }
    }

    /// True when a token's own numbers lie so.
    #[inline(always)]
    fn is_plain(self) -> bool {
        self.first + self.second == self.width()
    }
}

impl<N> Room<N> {
    /// The page that was made room for.
    fn rows(&mut self, width: usize) -> Rows<N> {
        Rows { start: self.page.as_mut_ptr(), stride: (width * size_of::<N>()) as isize }
    }
}

impl<N: Number> super::Room<N> for Room<N> {
    fn new<A: Words>(format: &Format) -> Self {
        let laid = Laid::new::<A>(format);
        Self {
            page: if laid.is_plain() { Vec::new() } else { vec![N::default(); format.block * laid.width()] },
            channels: vec![0.0; laid.width()],
            magnitudes: vec![0.0; format.width],
            sorted: vec![0.0; format.width],
            exponents: vec![0; format.width],
            lows: vec![0.0; format.block * LANES],
            highs: vec![0.0; format.block * LANES],
            scales: Scales::new(format.block),
        }
    }

    #[inline(always)]
    unsafe fn quantize<A: Words>(&mut self, format: &Format, mut page: Rows<N>, record: &mut [u8]) -> bool {
        let laid = Laid::new::<A>(format);
        if !laid.is_plain() {
            let whole = self.rows(laid.width());
            for token in 0..format.block {
                // SAFETY: the caller's, and a token's place in the room, laid out.
                unsafe { lay_out(page.at(token, 0), whole.at(token, 0), laid) };
            }
            page = whole;
        }
        let mut top = A::bits(A::splat(0.0));
        for (first, channels) in self.channels.chunks_exact_mut(A::LANES).enumerate() {
            let mut found = A::bits(A::splat(0.0));
            for token in 0..format.block {
                // SAFETY: as many rows, of whole vectors.
                found = A::top(found, unsafe { N::load::<A>(page.at(token, first * A::LANES)) });
            }
            top = A::top(top, A::from_bits(found));
            // SAFETY: a chunk of `LANES`.
            unsafe { A::store(channels.as_mut_ptr(), A::from_bits(found)) };
        }
        if !is_finite::<A>(top) {
            return false;
        }
        let (first, second) = self.magnitudes.split_at_mut(laid.first);
        first.copy_from_slice(&self.channels[..laid.first]);
        second.copy_from_slice(&self.channels[laid.half.min(self.channels.len())..][..laid.second]);
        // SAFETY: the caller's.
        let fits = unsafe {
            if find(&self.magnitudes, &mut self.sorted, &mut self.exponents) {
                set_powers(&mut self.channels, &self.exponents, laid, -1);
                encode::<A, N, true>(format, laid, page, record, self)
            } else {
                encode::<A, N, false>(format, laid, page, record, self)
            }
        };
        let (exponents, padding) = record[format.codes() + 4 * format.block..].split_at_mut(format.width);
        for (byte, exponent) in exponents.iter_mut().zip(&self.exponents) {
            *byte = exponent.cast_unsigned();
        }
        padding.fill(0);
        fits
    }

    #[inline(always)]
    unsafe fn dequantize<A: Words>(&mut self, format: &Format, record: &[u8], page: Rows<N>) {
        let laid = Laid::new::<A>(format);
        let target = if laid.is_plain() { page } else { self.rows(laid.width()) };
        let rest = &record[format.codes()..];
        self.scales.read(&rest[..4 * format.block]);
        for (exponent, byte) in self.exponents.iter_mut().zip(&rest[4 * format.block..]) {
            *exponent = byte.cast_signed();
        }
        for chunk in (0..format.block).step_by(A::LANES) {
            let (scale, low) = self.scales.load::<A>(chunk);
            let (scales, lows) = (&mut self.highs[chunk..chunk + A::LANES], &mut self.lows[chunk..chunk + A::LANES]);
            // SAFETY: slices of `LANES`.
            unsafe {
                A::store(scales.as_mut_ptr(), scale);
                A::store(lows.as_mut_ptr(), low);
            }
        }
        // SAFETY: the caller's.
        unsafe {
            if self.exponents.iter().any(|exponent| *exponent != 0) {
                set_powers(&mut self.channels, &self.exponents, laid, 1);
                decode::<A, N, true>(format, laid, record, target, self);
            } else {
                decode::<A, N, false>(format, laid, record, target, self);
            }
            if !laid.is_plain() {
                for token in 0..format.block {
                    let (from, to) = (target.at(token, 0), page.at(token, 0));
                    from.copy_to_nonoverlapping(to, laid.first);
                    if laid.second > 0 {
                        from.add(laid.half).copy_to_nonoverlapping(to.add(laid.first), laid.second);
                    }
                }
            }
        }
    }
}

/// Copy a token to where its halves are whole vectors.
///
/// # Safety
/// The token can be read, and its laid out place be written.
#[inline(always)]
unsafe fn lay_out<N: Number>(from: *const N, to: *mut N, laid: Laid) {
    // SAFETY: the caller's.
    unsafe {
        from.copy_to_nonoverlapping(to, laid.first);
        (laid.first..laid.half).for_each(|i| to.add(i).write(*from));
        if laid.second > 0 {
            from.add(laid.first).copy_to_nonoverlapping(to.add(laid.half), laid.second);
            (laid.second..laid.half).for_each(|i| to.add(laid.half + i).write(*from));
        }
    }
}

/// Set the laid out channels to two to the power of exponents, or to one over that; padding goes with the first.
#[inline(always)]
fn set_powers(channels: &mut [f32], exponents: &[i8], laid: Laid, sign: i32) {
    let (first, second) = exponents.split_at(laid.first);
    channels.fill(power_of_two(sign * i32::from(exponents[0])));
    for (half, exponents) in channels.chunks_exact_mut(laid.half).zip([first, second]) {
        for (power, exponent) in half.iter_mut().zip(exponents) {
            *power = power_of_two(sign * i32::from(*exponent));
        }
    }
}

/// Write codes, scales and minimums; false when float16 cannot hold one of those.
///
/// # Safety
/// As `quantize`.
#[inline(always)]
unsafe fn encode<A: Words, N: Number, const SCALED: bool>(
    format: &Format,
    laid: Laid,
    page: Rows<N>,
    record: &mut [u8],
    room: &mut Room<N>,
) -> bool {
    let powers = room.channels.as_ptr();
    let extremes = room.lows.chunks_exact_mut(A::LANES).zip(room.highs.chunks_exact_mut(A::LANES));
    for (token, (lows, highs)) in extremes.take(format.block).enumerate() {
        // SAFETY: as many rows and channels, of whole vectors; chunks of `LANES`.
        unsafe {
            let mut low = load::<A, N, SCALED>(page, powers, token, 0);
            let mut high = low;
            for channel in (A::LANES..laid.width()).step_by(A::LANES) {
                let x = load::<A, N, SCALED>(page, powers, token, channel);
                (low, high) = (A::min(low, x), A::max(high, x));
            }
            A::store(lows.as_mut_ptr(), low);
            A::store(highs.as_mut_ptr(), high);
        }
    }
    fold::<A>(&mut room.lows, format.block, A::min);
    fold::<A>(&mut room.highs, format.block, A::max);
    let groups = room.lows.chunks_exact_mut(A::LANES).zip(room.highs.chunks_exact_mut(A::LANES));
    for (chunk, (lows, highs)) in groups.take(format.block / A::LANES).enumerate() {
        // SAFETY: chunks of `LANES`.
        unsafe {
            let (low, high) = (A::load_f32(lows.as_ptr()), A::load_f32(highs.as_ptr()));
            let (low, inverse) = room.scales.derive::<A>(chunk * A::LANES, low, high, format.levels());
            A::store(lows.as_mut_ptr(), low);
            A::store(highs.as_mut_ptr(), inverse);
        }
    }
    let row = format.row();
    for (token, (low, inverse)) in room.lows.iter().zip(&room.highs).take(format.block).enumerate() {
        let (low, inverse) = (A::splat(*low), A::splat(*inverse));
        // What a vector writes behind its row is written over: by the next one, and at last by scales.
        let bytes = record[token * row..][..laid.half].as_mut_ptr();
        for channel in (0..laid.half).step_by(A::LANES) {
            // SAFETY: as many rows and channels, of whole vectors; the slice is that, too.
            unsafe {
                let x = load::<A, N, SCALED>(page, powers, token, channel);
                let mut found = codes::<A>(x, low, inverse);
                if laid.second > 0 {
                    let x = load::<A, N, SCALED>(page, powers, token, laid.half + channel);
                    found = A::merge(found, codes::<A>(x, low, inverse), 4);
                }
                A::store_bytes(bytes.add(channel), found);
            }
        }
    }
    let (bytes, rest) = record.split_at_mut(format.codes());
    if format.bits == Bits::Four && laid.first != laid.second {
        bytes.iter_mut().skip(row - 1).step_by(row).for_each(|byte| *byte &= 15);
    }
    room.scales.write(&mut rest[..4 * format.block])
}

/// Channels of a token, outliers scaled down.
///
/// # Safety
/// They can be read, and their powers.
#[inline(always)]
unsafe fn load<A: Words, N: Number, const SCALED: bool>(
    page: Rows<N>,
    powers: *const f32,
    token: usize,
    channel: usize,
) -> A::V {
    // SAFETY: the caller's.
    unsafe {
        let x = N::load::<A>(page.at(token, channel));
        if SCALED { A::mul(x, A::load_f32(powers.add(channel))) } else { x }
    }
}

/// Fold `[block][LANES]` to `[block]`, at the front, neighbours first.
#[inline(always)]
fn fold<A: Words>(lanes: &mut [f32], block: usize, choose: impl Fn(A::V, A::V) -> A::V) {
    let mut length = block * A::LANES;
    assert!(length <= lanes.len() && block.is_multiple_of(A::LANES));
    let words = lanes.as_mut_ptr().cast::<u32>();
    while length > block {
        length /= 2;
        for at in (0..length).step_by(A::LANES) {
            // SAFETY: within the slice: `2 * length` is, and a multiple of two vectors; what is written was read.
            unsafe {
                let pair = (A::load_words(words.add(2 * at)), A::load_words(words.add(2 * at + A::LANES)));
                let (even, odd) = A::unzip(pair.0, pair.1);
                A::store_words(words.add(at), A::bits(choose(A::from_bits(even), A::from_bits(odd))));
            }
        }
    }
}

/// Write laid out tokens.
///
/// # Safety
/// As `dequantize`.
#[inline(always)]
unsafe fn decode<A: Words, N: Number, const SCALED: bool>(
    format: &Format,
    laid: Laid,
    record: &[u8],
    target: Rows<N>,
    room: &Room<N>,
) {
    let powers = room.channels.as_ptr();
    for token in 0..format.block {
        // A vector may read behind its row, and at last from the scales.
        let bytes = record[token * format.row()..][..laid.half].as_ptr();
        let (scale, low) = (A::splat(room.highs[token]), A::splat(room.lows[token]));
        let pairs = laid.half - laid.half % (2 * A::LANES);
        for channel in (0..pairs).step_by(2 * A::LANES) {
            // SAFETY: within the slice, which is whole vectors long; as many rows and channels.
            unsafe {
                let (left, right) = (bytes.add(channel), bytes.add(channel + A::LANES));
                if format.bits == Bits::Eight {
                    let (a, b) = (A::fma(A::load_u8(left), scale, low), A::fma(A::load_u8(right), scale, low));
                    store_two::<A, N, SCALED>(target, powers, token, channel, a, b);
                } else {
                    let (a, b) = (A::load_u4(left), A::load_u4(right));
                    let first = (A::fma(a.0, scale, low), A::fma(b.0, scale, low));
                    store_two::<A, N, SCALED>(target, powers, token, channel, first.0, first.1);
                    if laid.second > 0 {
                        let second = (A::fma(a.1, scale, low), A::fma(b.1, scale, low));
                        store_two::<A, N, SCALED>(target, powers, token, laid.half + channel, second.0, second.1);
                    }
                }
            }
        }
        for channel in (pairs..laid.half).step_by(A::LANES) {
            // SAFETY: likewise.
            unsafe {
                if format.bits == Bits::Eight {
                    let x = A::fma(A::load_u8(bytes.add(channel)), scale, low);
                    store::<A, N, SCALED>(target, powers, token, channel, x);
                } else {
                    let (first, second) = A::load_u4(bytes.add(channel));
                    store::<A, N, SCALED>(target, powers, token, channel, A::fma(first, scale, low));
                    if laid.second > 0 {
                        let x = A::fma(second, scale, low);
                        store::<A, N, SCALED>(target, powers, token, laid.half + channel, x);
                    }
                }
            }
        }
    }
}

/// Write channels of a token, outliers scaled up again.
///
/// # Safety
/// They can be written, and their powers be read.
#[inline(always)]
unsafe fn store<A: Words, N: Number, const SCALED: bool>(
    target: Rows<N>,
    powers: *const f32,
    token: usize,
    channel: usize,
    x: A::V,
) {
    // SAFETY: the caller's.
    unsafe {
        let x = if SCALED { A::mul(x, A::load_f32(powers.add(channel))) } else { x };
        N::store::<A>(target.at(token, channel), x);
    }
}

/// The same of two vectors, side by side.
///
/// # Safety
/// As `store`.
#[inline(always)]
unsafe fn store_two<A: Words, N: Number, const SCALED: bool>(
    target: Rows<N>,
    powers: *const f32,
    token: usize,
    channel: usize,
    a: A::V,
    b: A::V,
) {
    // SAFETY: the caller's.
    unsafe {
        let (mut a, mut b) = (a, b);
        if SCALED {
            a = A::mul(a, A::load_f32(powers.add(channel)));
            b = A::mul(b, A::load_f32(powers.add(channel + A::LANES)));
        }
        N::store_two::<A>(target.at(token, channel), a, b);
    }
}
