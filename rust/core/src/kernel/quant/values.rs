//! Values: a token's codes over its channels, outlier channels scaled down first.

use super::format::Format;
use super::keys::{greater, lesser};
use super::number::Number;
use super::scale::{Scales, code, read_halves};
use crate::kernel::attend::Bits;
use crate::kernel::isa::Arith;

/// A channel this far above the median channel is an outlier.
const OUTLIER_RATIO: f32 = 4.0;
/// Far beyond any model, and small enough that nothing a record can say overflows float32.
const MOST_EXPONENT: i32 = 60;
/// Channels whose extremes are found side by side.
const LANES: usize = 16;

/// Room to work in, kept from head to head.
#[derive(Default)]
pub struct Room {
    tile: Vec<f32>,
    magnitudes: Vec<i32>,
    sorted: Vec<i32>,
    exponents: Vec<i8>,
    powers: Vec<f32>,
    lows: Vec<f32>,
    highs: Vec<f32>,
    other: Vec<f32>,
    scales: Scales,
}

impl Room {
    /// Room for pages of that format.
    pub fn new(format: &Format) -> Self {
        let mut room = Self::default();
        room.tile.resize(format.block * format.width, 0.0);
        room.magnitudes.resize(format.width, 0);
        room.exponents.resize(format.width, 0);
        room.powers.resize(format.width, 1.0);
        room.lows.resize(format.block * LANES, 0.0);
        room.highs.resize(format.block * LANES, 0.0);
        room.other.resize(format.block * LANES, 0.0);
        room.scales.resize(format.block);
        room
    }
}

/// Write a page's record; false when it holds what cannot be quantized. `row(token)`: its numbers.
#[inline(always)]
pub fn quantize<'a, N: Number + 'a>(
    format: &Format,
    row: impl Fn(usize) -> &'a [N],
    record: &mut [u8],
    room: &mut Room,
) -> bool {
    let (width, block) = (format.width, format.block);
    room.magnitudes.fill(0);
    for (token, tile) in room.tile.chunks_exact_mut(width).enumerate() {
        widen(&row(token)[..width], tile, &mut room.magnitudes);
    }
    let greatest = room.magnitudes.iter().copied().max().unwrap_or(0);
    if greatest >= f32::INFINITY.to_bits().cast_signed() {
        return false;
    }
    if find_outliers(greatest, &room.magnitudes, &mut room.sorted, &mut room.exponents) {
        for (power, exponent) in room.powers.iter_mut().zip(&room.exponents) {
            *power = power_of_two(-i32::from(*exponent));
        }
        for tile in room.tile.chunks_exact_mut(width) {
            for (x, power) in tile.iter_mut().zip(&room.powers) {
                *x *= power;
            }
        }
    }
    for ((tile, low), high) in
        room.tile.chunks_exact(width).zip(room.lows.chunks_exact_mut(LANES)).zip(room.highs.chunks_exact_mut(LANES))
    {
        extremes(tile, low, high);
    }
    fold(&mut room.lows, &mut room.other, lesser);
    fold(&mut room.highs, &mut room.other, greater);
    if !room.scales.derive(&room.lows[..block], &room.highs[..block], format.levels()) {
        return false;
    }
    let (codes, rest) = record.split_at_mut(format.codes());
    let groups = room.scales.low.iter().zip(&room.scales.inverse);
    for ((tile, codes), (low, inverse)) in
        room.tile.chunks_exact(width).zip(codes.chunks_exact_mut(format.row())).zip(groups)
    {
        if format.bits == Bits::Eight {
            for (code_byte, x) in codes.iter_mut().zip(tile) {
                *code_byte = code(*x, *low, *inverse) as u8;
            }
        } else {
            nibbles(tile, codes, *low, *inverse);
        }
    }
    let (scales, rest) = rest.split_at_mut(4 * block);
    room.scales.write(scales);
    let (exponents, padding) = rest.split_at_mut(width);
    for (byte, exponent) in exponents.iter_mut().zip(&room.exponents) {
        *byte = exponent.cast_unsigned();
    }
    padding.fill(0);
    true
}

/// Widen a row and raise the channels' largest magnitudes, as bits: NaN is above infinity, and that above all.
#[inline(always)]
fn widen<N: Number>(row: &[N], tile: &mut [f32], magnitudes: &mut [i32]) {
    for ((x, wide), magnitude) in row.iter().zip(tile).zip(magnitudes) {
        *wide = x.widen();
        *magnitude = (*magnitude).max((wide.to_bits() & 0x7fff_ffff).cast_signed());
    }
}

/// Find the channels' exponents; false when all are zero.
#[inline(always)]
fn find_outliers(greatest: i32, magnitudes: &[i32], sorted: &mut Vec<i32>, exponents: &mut [i8]) -> bool {
    exponents.fill(0);
    // The order of positive numbers is that of their bits. Most pages have no outlier, and counting says so:
    // the median is at least a quarter of the greatest when so many channels are.
    let quarter = (f32::from_bits(greatest.cast_unsigned()) / OUTLIER_RATIO).to_bits().cast_signed();
    let middle = (magnitudes.len() - 1) / 2;
    let above = magnitudes.iter().map(|magnitude| i32::from(*magnitude >= quarter)).sum::<i32>();
    if above as usize >= magnitudes.len() - middle {
        return false;
    }
    sorted.clear();
    sorted.extend_from_slice(magnitudes);
    let median = f32::from_bits(sorted.select_nth_unstable(middle).1.cast_unsigned());
    let mut found = false;
    for (exponent, magnitude) in exponents.iter_mut().zip(magnitudes) {
        let ratio = f32::from_bits(magnitude.cast_unsigned()) / median;
        if median > 0.0 && ratio > OUTLIER_RATIO {
            *exponent = ratio.log2().round_ties_even().min(MOST_EXPONENT as f32) as i8;
            found = true;
        }
    }
    found
}

/// Two to a power between -126 and 127.
#[inline(always)]
fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// The smallest and the largest numbers of a row, in lanes.
#[inline(always)]
fn extremes(row: &[f32], low: &mut [f32], high: &mut [f32]) {
    let mut lows = [f32::INFINITY; LANES];
    let mut highs = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lows[i] = lesser(chunk[i], lows[i]);
            highs[i] = greater(chunk[i], highs[i]);
        }
    }
    for (i, x) in tail.iter().enumerate() {
        lows[i] = lesser(*x, lows[i]);
        highs[i] = greater(*x, highs[i]);
    }
    low.copy_from_slice(&lows);
    high.copy_from_slice(&highs);
}

/// Fold `[block][LANES]` to `[block]`, at the front, neighbours first.
#[inline(always)]
fn fold<'a>(mut lanes: &'a mut [f32], mut other: &'a mut [f32], choose: impl Fn(f32, f32) -> f32) {
    const { assert!(LANES == 16, "an even number of rounds ends where it began") };
    let mut length = lanes.len();
    for _ in 0..LANES.trailing_zeros() {
        let pairs = lanes[..length].as_chunks::<2>().0;
        for (one, [a, b]) in other.iter_mut().zip(pairs) {
            *one = choose(*a, *b);
        }
        (lanes, other, length) = (other, lanes, length / 2);
    }
}

/// Put the codes of a row into bytes, those of its second half above those of the first.
#[inline(always)]
fn nibbles(row: &[f32], codes: &mut [u8], low: f32, inverse: f32) {
    let (first, second) = row.split_at(codes.len());
    let (paired, alone) = codes.split_at_mut(second.len());
    for ((byte, a), b) in paired.iter_mut().zip(first).zip(second) {
        *byte = ((code(*a, low, inverse) & 15) | (code(*b, low, inverse) << 4)) as u8;
    }
    for (byte, a) in alone.iter_mut().zip(&first[second.len()..]) {
        *byte = (code(*a, low, inverse) & 15) as u8;
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
    let (width, block) = (format.width, format.block);
    let (codes, rest) = record.split_at(format.codes());
    let (scale, low) = (&mut room.highs[..block], &mut room.lows[..block]);
    read_halves(&rest[..2 * block], scale);
    read_halves(&rest[2 * block..4 * block], low);
    for (power, exponent) in room.powers.iter_mut().zip(&rest[4 * block..4 * block + width]) {
        *power = power_of_two(i32::from(exponent.cast_signed()));
    }
    for (token, codes) in codes.chunks_exact(format.row()).enumerate() {
        let (scale, low, out) = (scale[token], low[token], &mut row(token)[..width]);
        if format.bits == Bits::Eight {
            spread::<A, N>(codes, |code| code, scale, low, &room.powers, out);
        } else {
            let (first, second) = out.split_at_mut(codes.len());
            let (powers, others) = room.powers.split_at(codes.len());
            spread::<A, N>(codes, |code| code & 15, scale, low, powers, first);
            spread::<A, N>(codes, |code| code >> 4, scale, low, others, second);
        }
    }
}

/// Write one number a byte.
#[inline(always)]
fn spread<A: Arith, N: Number>(
    codes: &[u8],
    part: impl Fn(u8) -> u8,
    scale: f32,
    low: f32,
    powers: &[f32],
    out: &mut [N],
) {
    for ((out, byte), power) in out.iter_mut().zip(codes).zip(powers) {
        let code = i32::from(part(*byte)) as f32;
        *out = N::narrow(A::mul_add(code, scale, low) * power);
    }
}
