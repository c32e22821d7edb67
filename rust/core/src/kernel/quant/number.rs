//! A number of a full page: widened to compute with, narrowed to be stored.

use crate::kernel::lanes::Words;

/// float32, float16 or bfloat16.
pub trait Number: Copy + Default {
    /// Widen `LANES` numbers; exact.
    ///
    /// # Safety
    /// They can be read.
    unsafe fn load<A: Words>(from: *const Self) -> A::V;

    /// Store the nearest of `LANES` finite numbers; what lies beyond the format becomes its largest.
    ///
    /// # Safety
    /// There is room for them.
    unsafe fn store<A: Words>(to: *mut Self, v: A::V);

    /// The same of two vectors, side by side.
    ///
    /// # Safety
    /// There is room for them.
    #[inline(always)]
    unsafe fn store_two<A: Words>(to: *mut Self, a: A::V, b: A::V) {
        // SAFETY: the caller's.
        unsafe {
            Self::store::<A>(to, a);
            Self::store::<A>(to.add(A::LANES), b);
        }
    }
}

impl Number for f32 {
    #[inline(always)]
    unsafe fn load<A: Words>(from: *const Self) -> A::V {
        // SAFETY: the caller's.
        unsafe { A::load_f32(from) }
    }

    #[inline(always)]
    unsafe fn store<A: Words>(to: *mut Self, v: A::V) {
        // SAFETY: the caller's.
        unsafe { A::store(to, v) }
    }
}

/// A binary16.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub struct Half(u16);

impl Number for Half {
    #[inline(always)]
    unsafe fn load<A: Words>(from: *const Self) -> A::V {
        // SAFETY: the caller's.
        unsafe { A::load_f16(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store<A: Words>(to: *mut Self, v: A::V) {
        // SAFETY: the caller's.
        unsafe { A::store_f16(to.cast(), v) }
    }

    #[inline(always)]
    unsafe fn store_two<A: Words>(to: *mut Self, a: A::V, b: A::V) {
        // SAFETY: the caller's.
        unsafe { A::store_f16_two(to.cast(), a, b) }
    }
}

/// The upper half of a binary32.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub struct Brain(u16);

impl Number for Brain {
    #[inline(always)]
    unsafe fn load<A: Words>(from: *const Self) -> A::V {
        // SAFETY: the caller's.
        unsafe { A::load_bf16(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store<A: Words>(to: *mut Self, v: A::V) {
        // SAFETY: the caller's.
        unsafe { A::store_bf16(to.cast(), v) }
    }

    #[inline(always)]
    unsafe fn store_two<A: Words>(to: *mut Self, a: A::V, b: A::V) {
        // SAFETY: the caller's.
        unsafe { A::store_bf16_two(to.cast(), a, b) }
    }
}

/// The rows of one head's page: a token's numbers are neighbours.
#[derive(Clone, Copy)]
pub struct Rows<N> {
    /// The first number.
    pub start: *mut N,
    /// Bytes from token to token.
    pub stride: isize,
}

impl<N> Rows<N> {
    /// The address of a token's channel.
    ///
    /// # Safety
    /// It is one of the page's.
    #[inline(always)]
    pub unsafe fn at(&self, token: usize, channel: usize) -> *mut N {
        // SAFETY: the caller's.
        unsafe { self.start.byte_offset(token as isize * self.stride).add(channel) }
    }
}
