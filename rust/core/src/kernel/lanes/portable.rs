//! Vectors as arrays: what the compiler makes of them, NEON on aarch64.

use super::Arith;
use crate::kernel::half::{bf16_to_f32, f16_to_f32};

const LANES: usize = 8;

/// Any CPU.
#[derive(Clone, Copy)]
pub struct Portable;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

impl Arith for Portable {
    type V = [f32; LANES];
    const LANES: usize = LANES;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        // Without the instruction, a fused one is a call of some hundred nanoseconds.
        if cfg!(target_arch = "aarch64") { a.mul_add(b, c) } else { a * b + c }
    }

    #[inline(always)]
    fn splat(value: f32) -> Self::V {
        [value; LANES]
    }

    #[inline(always)]
    fn add(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn mul(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn max(a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each(|i| Self::mul_add(a[i], b[i], c[i]))
    }

    #[inline(always)]
    fn sum(v: Self::V) -> f32 {
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }

    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> Self::V {
        // SAFETY: the caller's.
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::V {
        // SAFETY: the caller's.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        each(|i| f16_to_f32(bits[i]))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::V {
        // SAFETY: the caller's.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        each(|i| bf16_to_f32(bits[i]))
    }

    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::V {
        // SAFETY: the caller's.
        let bytes = unsafe { from.cast::<[u8; LANES]>().read_unaligned() };
        each(|i| f32::from(bytes[i]))
    }

    #[inline(always)]
    unsafe fn load_u4(from: *const u8) -> (Self::V, Self::V) {
        // SAFETY: the caller's.
        let bytes = unsafe { from.cast::<[u8; LANES]>().read_unaligned() };
        (each(|i| f32::from(bytes[i] & 15)), each(|i| f32::from(bytes[i] >> 4)))
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        // SAFETY: the caller's.
        unsafe { to.cast::<Self::V>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn dot_bf16(sums: Self::V, a: *const u16, b: *const u16) -> Self::V {
        // SAFETY: the caller's.
        unsafe {
            let first = Self::fma(Self::load_bf16(a), Self::load_bf16(b), sums);
            Self::fma(Self::load_bf16(a.add(LANES)), Self::load_bf16(b.add(LANES)), first)
        }
    }
}
