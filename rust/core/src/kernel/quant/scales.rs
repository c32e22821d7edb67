//! Scales and minimums of groups: computed in float32, stored in float16 rounded outwards, so that no code clips.

use crate::kernel::lanes::Words;

/// The smallest scale there is.
const TINY: f32 = 1.0 / 16_777_216.0;
/// Bits of a binary16's infinity.
const INFINITE: u16 = 0x7c00;

/// Scales and minimums as a record has them, room for whole vectors behind them.
#[derive(Default)]
pub struct Scales {
    scale: Vec<u16>,
    minimum: Vec<u16>,
}

impl Scales {
    /// Room for so many groups.
    pub fn new(groups: usize) -> Self {
        let room = groups.next_multiple_of(16);
        Self { scale: vec![0; room], minimum: vec![0; room] }
    }

    /// Derive those of `LANES` groups, from the `first` one on, from their smallest and largest numbers.
    ///
    /// Returns the stored minimums, and what numbers above them are multiplied by to become codes.
    #[inline(always)]
    pub fn derive<A: Words>(&mut self, first: usize, smallest: A::V, largest: A::V, levels: f32) -> (A::V, A::V) {
        let scale: *mut u16 = self.scale[first..first + A::LANES].as_mut_ptr();
        let minimum: *mut u16 = self.minimum[first..first + A::LANES].as_mut_ptr();
        // SAFETY: slices of `LANES`.
        unsafe {
            A::store_f16_down(minimum, smallest);
            let low = A::load_f16(minimum);
            // Rounding up is rounding the negative down.
            let range = A::sub(largest, low);
            // A range so small that a part of it is nothing to float32 has the smallest scale, too.
            let part = A::max(A::mul(range, A::splat(1.0 / levels)), A::min(range, A::splat(TINY)));
            A::store_f16_down(scale, A::mul(part, A::splat(-1.0)));
            let step = A::max(A::mul(A::load_f16(scale), A::splat(-1.0)), A::splat(TINY));
            (low, A::div(A::splat(1.0), step))
        }
    }

    /// Write them, scales first; false when float16 could not hold one.
    #[inline(always)]
    pub fn write(&self, to: &mut [u8]) -> bool {
        let groups = to.len() / 4;
        let (scales, minimums) = to.split_at_mut(2 * groups);
        let mut worst = 0;
        for (bytes, half) in scales.chunks_exact_mut(2).zip(&self.scale) {
            worst = worst.max(half & 0x7fff);
            bytes.copy_from_slice(&(half & 0x7fff).to_le_bytes());
        }
        for (bytes, half) in minimums.chunks_exact_mut(2).zip(&self.minimum) {
            worst = worst.max(half & 0x7fff);
            bytes.copy_from_slice(&half.to_le_bytes());
        }
        worst < INFINITE
    }

    /// Read them.
    #[inline(always)]
    pub fn read(&mut self, from: &[u8]) {
        let (scales, minimums) = from.split_at(from.len() / 2);
        for (half, bytes) in self.scale.iter_mut().zip(scales.as_chunks::<2>().0) {
            *half = u16::from_le_bytes(*bytes);
        }
        for (half, bytes) in self.minimum.iter_mut().zip(minimums.as_chunks::<2>().0) {
            *half = u16::from_le_bytes(*bytes);
        }
    }

    /// Scales and minimums of `LANES` groups, from the `first` one on.
    #[inline(always)]
    pub fn load<A: Words>(&self, first: usize) -> (A::V, A::V) {
        let scale = self.scale[first..first + A::LANES].as_ptr();
        let minimum = self.minimum[first..first + A::LANES].as_ptr();
        // SAFETY: slices of `LANES`.
        unsafe { (A::load_f16(scale), A::load_f16(minimum)) }
    }
}

/// The codes of `LANES` numbers.
#[inline(always)]
pub fn codes<A: Words>(x: A::V, low: A::V, inverse: A::V) -> A::W {
    A::round(A::mul(A::sub(x, low), inverse))
}
