//! Scales and minimums of groups: computed in float32, stored in float16 rounded outwards, so that no code clips.

use crate::kernel::half::{f16_to_f32, f32_to_f16};

/// Added to a number from 0 to 2^22, leaves it rounded to the nearest in the low bits.
const ROUNDS: f32 = 8_388_608.0;

/// What groups are encoded with, one entry a group.
#[derive(Default)]
pub struct Scales {
    /// Stored minimums, widened.
    pub low: Vec<f32>,
    /// One over the stored scales; 0 for a group of one number.
    pub inverse: Vec<f32>,
    /// Stored scales.
    scale: Vec<u16>,
    /// Stored minimums.
    minimum: Vec<u16>,
}

/// The largest binary16 that is not above a finite number; infinity where there is none.
#[inline(always)]
fn rounded_down(value: f32) -> u16 {
    let nearest = f32_to_f16(value);
    let negative = nearest & 0x8000 != 0;
    let below = if negative { nearest.wrapping_add(1) } else { nearest.wrapping_sub(1) };
    let below = if nearest & 0x7fff == 0 { 0x8001 } else { below };
    if f16_to_f32(nearest) > value { below } else { nearest }
}

impl Scales {
    /// Make room for so many groups.
    pub fn resize(&mut self, groups: usize) {
        self.low.resize(groups, 0.0);
        self.inverse.resize(groups, 0.0);
        self.scale.resize(groups, 0);
        self.minimum.resize(groups, 0);
    }

    /// Derive them from the groups' smallest and largest numbers; false when float16 cannot hold one.
    #[inline(always)]
    pub fn derive(&mut self, smallest: &[f32], largest: &[f32], levels: f32) -> bool {
        let mut worst = 0;
        let outputs = self.low.iter_mut().zip(&mut self.inverse).zip(self.scale.iter_mut().zip(&mut self.minimum));
        for (((low, inverse), (scale, minimum)), (a, b)) in outputs.zip(smallest.iter().zip(largest)) {
            *minimum = rounded_down(*a);
            *low = f16_to_f32(*minimum);
            *scale = rounded_down((*low - *b) / levels) & 0x7fff;
            let step = f16_to_f32(*scale);
            *inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
            worst = worst.max((*scale).max(*minimum & 0x7fff));
        }
        worst < 0x7c00
    }

    /// Write scales and minimums behind one another.
    #[inline(always)]
    pub fn write(&self, to: &mut [u8]) {
        for (bytes, half) in to.chunks_exact_mut(2).zip(self.scale.iter().chain(&self.minimum)) {
            bytes.copy_from_slice(&half.to_le_bytes());
        }
    }
}

/// The code of a number, which lies above `low` and at most all levels above it.
#[inline(always)]
pub fn code(value: f32, low: f32, inverse: f32) -> u32 {
    ((value - low) * inverse + ROUNDS).to_bits()
}

/// Read float16 numbers.
#[inline(always)]
pub fn read_halves(from: &[u8], to: &mut [f32]) {
    for (bytes, number) in from.chunks_exact(2).zip(to) {
        *number = f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_down_takes_the_nearest_binary16_below() {
        for bits in 1..0x7bff_u16 {
            let (low, high) = (f16_to_f32(bits), f16_to_f32(bits + 1));
            assert_eq!(rounded_down(low), bits);
            assert_eq!(rounded_down(low.next_up()), bits);
            assert_eq!(rounded_down(high.next_down()), bits);
            assert_eq!(rounded_down(-low), bits | 0x8000);
            assert_eq!(rounded_down(-low.next_up()), (bits + 1) | 0x8000);
            assert_eq!(rounded_down(-high.next_down()), (bits + 1) | 0x8000);
        }
        assert_eq!(rounded_down(1e-30), 0);
        assert_eq!(rounded_down(-1e-30), 0x8001);
        assert_eq!(rounded_down(1e30), 0x7bff);
        assert_eq!(rounded_down(-65_505.0), 0xfc00);
    }
}
