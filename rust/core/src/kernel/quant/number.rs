//! A number of a full page: widened to compute with, narrowed to be stored.

use crate::kernel::half::{bf16_to_f32, f16_to_f32, f32_to_f16};

/// float32, float16 or bfloat16.
pub trait Number: Copy {
    /// Exact.
    fn widen(self) -> f32;

    /// To the nearest; the number is finite, and what lies beyond the format becomes its largest.
    fn narrow(value: f32) -> Self;
}

impl Number for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

/// A binary16.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Half(pub u16);

impl Number for Half {
    #[inline(always)]
    fn widen(self) -> f32 {
        f16_to_f32(self.0)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let low = if value < -65_504.0 { -65_504.0 } else { value };
        Self(f32_to_f16(if low > 65_504.0 { 65_504.0 } else { low }))
    }
}

/// The upper half of a binary32.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Brain(pub u16);

impl Number for Brain {
    #[inline(always)]
    fn widen(self) -> f32 {
        bf16_to_f32(self.0)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        // What a record says is far from overflowing and never NaN.
        let bits = value.to_bits();
        Self((bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16)
    }
}
