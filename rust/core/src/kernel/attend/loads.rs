//! How numbers of a format become float32 in a vector.

use crate::kernel::half::{bf16_to_f32, f16_to_f32};
use crate::kernel::lanes::{Arith, Words};

/// A number format, as a type.
pub(super) trait Load {
    /// What lies in memory.
    type Raw: Copy;
    /// True when `two` takes numbers in turns.
    const IN_TURNS: bool = false;

    /// # Safety
    /// `A::LANES` numbers can be read.
    unsafe fn vector<A: Arith>(from: *const Self::Raw) -> A::V;

    /// Two vectors side by side; where `IN_TURNS`, the even numbers of both in one and the odd ones in the other,
    /// which are half as much work.
    ///
    /// # Safety
    /// `2 * A::LANES` numbers can be read.
    #[inline(always)]
    unsafe fn two<A: Words>(from: *const Self::Raw) -> (A::V, A::V) {
        // SAFETY: the caller's.
        unsafe { (Self::vector::<A>(from), Self::vector::<A>(from.add(A::LANES))) }
    }

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
    const IN_TURNS: bool = true;

    #[inline(always)]
    unsafe fn two<A: Words>(from: *const u16) -> (A::V, A::V) {
        // SAFETY: the caller's.
        unsafe { A::brains(A::load_words(from.cast())) }
    }

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
