//! How numbers of a format become float32 in a vector.

use crate::kernel::half::{bf16_to_f32, f16_to_f32};
use crate::kernel::lanes::Arith;

/// A number format, as a type.
pub(super) trait Load {
    /// What lies in memory.
    type Raw: Copy;

    /// # Safety
    /// `A::LANES` numbers can be read.
    unsafe fn vector<A: Arith>(from: *const Self::Raw) -> A::V;

    /// One number.
    fn one(raw: Self::Raw) -> f32;
}

pub(super) struct AsF32;
pub(super) struct AsF16;
pub(super) struct AsBf16;
pub(super) struct AsU8;

impl Load for AsF32 {
    type Raw = f32;

    #[inline(always)]
    unsafe fn vector<A: Arith>(from: *const f32) -> A::V {
        // SAFETY: the caller's.
        unsafe { A::load_f32(from) }
    }

    #[inline(always)]
    fn one(raw: f32) -> f32 {
        raw
    }
}

impl Load for AsF16 {
    type Raw = u16;

    #[inline(always)]
    unsafe fn vector<A: Arith>(from: *const u16) -> A::V {
        // SAFETY: the caller's.
        unsafe { A::load_f16(from) }
    }

    #[inline(always)]
    fn one(raw: u16) -> f32 {
        f16_to_f32(raw)
    }
}

impl Load for AsBf16 {
    type Raw = u16;

    #[inline(always)]
    unsafe fn vector<A: Arith>(from: *const u16) -> A::V {
        // SAFETY: the caller's.
        unsafe { A::load_bf16(from) }
    }

    #[inline(always)]
    fn one(raw: u16) -> f32 {
        bf16_to_f32(raw)
    }
}

impl Load for AsU8 {
    type Raw = u8;

    #[inline(always)]
    unsafe fn vector<A: Arith>(from: *const u8) -> A::V {
        // SAFETY: the caller's.
        unsafe { A::load_u8(from) }
    }

    #[inline(always)]
    fn one(raw: u8) -> f32 {
        f32::from(raw)
    }
}
