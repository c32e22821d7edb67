//! Halves: float16 and bfloat16 as bits, without branches, so that loops over them vectorise.

/// The number formats of full-precision pages and of queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

impl Float {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// Two to the 112: what separates the exponents of binary16 and binary32.
const SCALE: f32 = f32::from_bits((127 + 112) << 23);

/// Widen a binary16; exact, subnormals, infinities and NaN included.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff);
    let finite = (f32::from_bits(magnitude << 13) * SCALE).to_bits();
    let special = (magnitude << 13) | 0x7f80_0000;
    let found = if magnitude >= 0x7c00 { special } else { finite };
    f32::from_bits(found | (u32::from(bits & 0x8000) << 16))
}

/// Narrow to a binary16, to the nearest and of two to the even one; beyond 65,504 it is an infinity.
#[inline(always)]
pub fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let (sign, magnitude) = ((bits >> 16) & 0x8000, bits & 0x7fff_ffff);
    // Normal numbers: rebias, then round by carrying into the exponent.
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_add((15_u32.wrapping_sub(127)) << 23).wrapping_add(0xfff + odd) >> 13;
    // Subnormals: the addition of a number whose last place is theirs rounds.
    let magic = f32::from_bits((127 - 15 + 23 - 10 + 1) << 23);
    let small = (f32::from_bits(magnitude) + magic).to_bits().wrapping_sub(magic.to_bits());
    let special = if magnitude > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
    let finite = if magnitude < (127 - 14) << 23 { small } else { normal };
    let found = if magnitude >= (127 + 16) << 23 { special } else { finite };
    (sign | found) as u16
}

/// Widen a bfloat16; exact.
#[inline(always)]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Narrow to a bfloat16, to the nearest and of two to the even one.
#[inline(always)]
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    (if value.is_nan() { (bits >> 16) | 0x40 } else { rounded }) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Read a binary16 by its definition.
    fn defined(bits: u16) -> f64 {
        let (sign, exponent, fraction) = (bits >> 15, (bits >> 10) & 31, f64::from(bits & 1023));
        let magnitude = match exponent {
            0 => fraction * 2_f64.powi(-24),
            31 if fraction == 0.0 => f64::INFINITY,
            31 => f64::NAN,
            _ => (1.0 + fraction / 1024.0) * 2_f64.powi(i32::from(exponent) - 15),
        };
        if sign == 1 { -magnitude } else { magnitude }
    }

    #[test]
    fn every_binary16_widens_exactly_and_comes_back() {
        for bits in 0..=u16::MAX {
            let (wide, truth) = (f16_to_f32(bits), defined(bits));
            if truth.is_nan() {
                assert!(wide.is_nan() && f16_to_f32(f32_to_f16(wide)).is_nan());
            } else {
                assert!(f64::from(wide) == truth && wide.is_sign_negative() == truth.is_sign_negative());
                assert_eq!(f32_to_f16(wide), bits);
            }
        }
    }

    #[test]
    fn what_lies_between_two_binary16_goes_to_the_nearest_and_of_two_to_the_even() {
        for bits in 0..0x7bff_u16 {
            let (low, high) = (defined(bits), defined(bits + 1));
            let middle = f64::midpoint(low, high) as f32;
            let even = bits + (bits & 1);
            assert_eq!(f32_to_f16(middle), even);
            assert_eq!(f32_to_f16(middle.next_down()), bits);
            assert_eq!(f32_to_f16(middle.next_up()), bits + 1);
            assert_eq!(f32_to_f16(-middle), even | 0x8000);
        }
        assert_eq!(f32_to_f16(65_519.0), 0x7bff);
        assert_eq!(f32_to_f16(65_520.0), 0x7c00);
        assert_eq!(f32_to_f16(f32::MAX), 0x7c00);
    }

    #[test]
    fn bfloat16_rounds_to_nearest_even_and_keeps_nan() {
        for bits in 0..0x7f7f_u16 {
            let (low, high) = (bf16_to_f32(bits), bf16_to_f32(bits + 1));
            let middle = f64::midpoint(f64::from(low), f64::from(high)) as f32;
            assert_eq!(f32_to_bf16(low), bits);
            assert_eq!(f32_to_bf16(middle), bits + (bits & 1));
            assert_eq!(f32_to_bf16(middle.next_down()), bits);
            assert_eq!(f32_to_bf16(middle.next_up()), bits + 1);
        }
        assert!(bf16_to_f32(f32_to_bf16(f32::from_bits(0x7f80_0001))).is_nan());
        assert!(bf16_to_f32(f32_to_bf16(f32::INFINITY)).is_infinite());
    }
}
