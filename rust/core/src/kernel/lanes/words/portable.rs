//! Words as arrays.

use super::super::{Arith, Portable};
use super::Words;
use crate::kernel::half::{f16_to_f32, f32_to_f16};

const LANES: usize = Portable::LANES;

/// Two to the 23: added to a smaller number, leaves it rounded in the low bits.
const ROUNDS: f32 = 8_388_608.0;

#[inline(always)]
fn each<T>(f: impl Fn(usize) -> T) -> [T; LANES] {
    std::array::from_fn(f)
}

/// The largest binary16 that is not above a number; infinity where there is none.
#[inline(always)]
fn f16_below(value: f32) -> u16 {
    let nearest = f32_to_f16(value);
    let below = if nearest & 0x8000 == 0 { nearest.wrapping_sub(1) } else { nearest.wrapping_add(1) };
    let below = if nearest << 1 == 0 { 0x8001 } else { below };
    if f16_to_f32(nearest) > value { below } else { nearest }
}

impl Words for Portable {
    type W = [u32; LANES];

    #[inline(always)]
    fn sub(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn div(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn min(a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn round(v: Self::V) -> Self::W {
        each(|i| (v[i] + ROUNDS).to_bits() & 0x7f_ffff)
    }

    #[inline(always)]
    fn merge(low: Self::W, high: Self::W, shift: u32) -> Self::W {
        each(|i| low[i] | high[i].wrapping_shl(shift))
    }

    #[inline(always)]
    fn field(word: Self::W, shift: u32, mask: u32) -> Self::V {
        // Signed, for which there is an instruction everywhere.
        #[allow(clippy::cast_precision_loss)] // below 2^23
        each(|i| (word[i].wrapping_shr(shift) & mask).cast_signed() as f32)
    }

    #[inline(always)]
    fn bits(v: Self::V) -> Self::W {
        each(|i| v[i].to_bits())
    }

    #[inline(always)]
    fn from_bits(word: Self::W) -> Self::V {
        each(|i| f32::from_bits(word[i]))
    }

    #[inline(always)]
    fn top(top: Self::W, v: Self::V) -> Self::W {
        each(|i| top[i].cast_signed().max((v[i].to_bits() & 0x7fff_ffff).cast_signed()).cast_unsigned())
    }

    #[inline(always)]
    fn zip(a: Self::W, b: Self::W) -> (Self::W, Self::W) {
        let turn = |i: usize| if i.is_multiple_of(2) { a[i / 2] } else { b[i / 2] };
        (each(turn), each(|i| turn(LANES + i)))
    }

    #[inline(always)]
    fn unzip(a: Self::W, b: Self::W) -> (Self::W, Self::W) {
        let lane = |i: usize| if i < LANES { a[i] } else { b[i - LANES] };
        (each(|i| lane(2 * i)), each(|i| lane(2 * i + 1)))
    }

    #[inline(always)]
    unsafe fn load_words(from: *const u32) -> Self::W {
        // SAFETY: the caller's.
        unsafe { from.cast::<Self::W>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store_words(to: *mut u32, word: Self::W) {
        // SAFETY: the caller's.
        unsafe { to.cast::<Self::W>().write_unaligned(word) }
    }

    #[inline(always)]
    unsafe fn store_bytes(to: *mut u8, word: Self::W) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[u8; LANES]>().write_unaligned(each(|i| word[i] as u8)) }
    }

    #[inline(always)]
    unsafe fn store_f16_down(to: *mut u16, v: Self::V) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(each(|i| f16_below(v[i]))) }
    }

    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, v: Self::V) {
        let low = Self::max(v, [-65_504.0; LANES]);
        let held = Self::min(low, [65_504.0; LANES]);
        // SAFETY: the caller's.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(each(|i| f32_to_f16(held[i]))) }
    }

    #[inline(always)]
    unsafe fn store_bf16(to: *mut u16, v: Self::V) {
        let narrow = |x: f32| (x.to_bits().wrapping_add(0x7fff + ((x.to_bits() >> 16) & 1)) >> 16) as u16;
        // SAFETY: the caller's.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(each(|i| narrow(v[i]))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_down_takes_the_nearest_binary16_below() {
        for bits in 1..0x7bff_u16 {
            let (low, high) = (f16_to_f32(bits), f16_to_f32(bits + 1));
            assert_eq!(f16_below(low), bits);
            assert_eq!(f16_below(low.next_up()), bits);
            assert_eq!(f16_below(high.next_down()), bits);
            assert_eq!(f16_below(-low), bits | 0x8000);
            assert_eq!(f16_below(-low.next_up()), (bits + 1) | 0x8000);
            assert_eq!(f16_below(-high.next_down()), (bits + 1) | 0x8000);
        }
        assert_eq!(f16_below(1e-30), 0);
        assert_eq!(f16_below(-1e-30), 0x8001);
        assert_eq!(f16_below(1e30), 0x7bff);
        assert_eq!(f16_below(-65_505.0), 0xfc00);
    }
}
