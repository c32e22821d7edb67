//! A vector of float32, once a set of instructions: the only code that is written more than once.

mod portable;
mod words;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use portable::Portable;
pub use words::Words;
#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512, Avx512Bf16};

use crate::kernel::half::bf16_to_f32;

/// Vectors of `LANES` float32 and what the kernels do with them.
///
/// The loads are unsafe because they read memory; the rest is only to be called where the set's
/// instructions exist, which `Isa::run` sees to.
pub trait Arith: Copy + 'static {
    /// `LANES` float32.
    type V: Copy;
    /// How many; 4, 8 or 16.
    const LANES: usize;
    /// True when `dot_bf16` is one instruction.
    const DOTS_BF16: bool = false;

    /// `a * b + c`, rounded once where the set can.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;

    /// The same number in every lane.
    fn splat(value: f32) -> Self::V;
    /// Lane by lane `a + b`.
    fn add(a: Self::V, b: Self::V) -> Self::V;
    /// Lane by lane `a * b`.
    fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// Lane by lane the larger one.
    fn max(a: Self::V, b: Self::V) -> Self::V;
    /// Lane by lane `a * b + c`.
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The sum of all lanes.
    fn sum(v: Self::V) -> f32;
    /// The sums of four vectors.
    #[inline(always)]
    fn sums(v: [Self::V; 4]) -> [f32; 4] {
        v.map(Self::sum)
    }

    /// Ask for a line of memory that will be read soon; any address will do.
    #[inline(always)]
    fn prefetch(_: *const u8) {}

    /// # Safety
    /// `LANES` numbers can be read.
    unsafe fn load_f32(from: *const f32) -> Self::V;
    /// # Safety
    /// `LANES` numbers can be read.
    unsafe fn load_f16(from: *const u16) -> Self::V;
    /// # Safety
    /// `LANES` numbers can be read.
    unsafe fn load_bf16(from: *const u16) -> Self::V;
    /// # Safety
    /// `LANES` bytes can be read.
    unsafe fn load_u8(from: *const u8) -> Self::V;
    /// The lower and the upper halves of bytes.
    ///
    /// # Safety
    /// `LANES` bytes can be read.
    unsafe fn load_u4(from: *const u8) -> (Self::V, Self::V);
    /// # Safety
    /// `LANES` numbers can be written.
    unsafe fn store(to: *mut f32, v: Self::V);
    /// Add the products of `2 * LANES` bfloat16 to `sums`, two a lane.
    ///
    /// # Safety
    /// `2 * LANES` numbers can be read from both.
    unsafe fn dot_bf16(sums: Self::V, a: *const u16, b: *const u16) -> Self::V;
    /// Add to lane `i` of `sums` the products of the two bfloat16 at `pair` with the two at `b + 2 * i`. Worth calling
    /// where `DOTS_BF16`.
    ///
    /// # Safety
    /// Two numbers can be read from `pair`, `2 * LANES` from `b`.
    #[inline(always)]
    unsafe fn dot_bf16_pair(sums: Self::V, pair: *const u16, b: *const u16) -> Self::V {
        // SAFETY: the caller's; no vector has more than 16 lanes.
        unsafe {
            let (first, second) = (bf16_to_f32(*pair), bf16_to_f32(*pair.add(1)));
            let mut lanes = [0.0; 16];
            Self::store(lanes.as_mut_ptr(), sums);
            for (lane, sum) in lanes[..Self::LANES].iter_mut().enumerate() {
                let (low, high) = (bf16_to_f32(*b.add(2 * lane)), bf16_to_f32(*b.add(2 * lane + 1)));
                *sum = Self::mul_add(second, high, Self::mul_add(first, low, *sum));
            }
            Self::load_f32(lanes.as_ptr())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Arith;
    use crate::kernel::half::{bf16_to_f32, f16_to_f32};
    use crate::kernel::isa::{Body, Isa};

    struct Everything;

    impl Body for Everything {
        type Out = ();

        #[inline(always)]
        fn run<A: Arith>(self) {
            let numbers: Vec<f32> = (0..64).map(|i| (i as f32 - 20.0) * 0.375).collect();
            let halves: Vec<u16> = (0..64_u16).map(|i| 0x3c00 + i * 97).collect();
            let bytes: Vec<u8> = (0..64_u8).map(|i| i.wrapping_mul(37)).collect();
            let out = |v: A::V| {
                let mut lanes = vec![0.0; A::LANES];
                // SAFETY: the room is as long as the vector.
                unsafe { A::store(lanes.as_mut_ptr(), v) };
                lanes
            };
            // SAFETY: every table holds 64 entries, and no vector more than 16.
            let (a, b, half, brain, byte, (low, high), dot, paired) = unsafe {
                (
                    A::load_f32(numbers.as_ptr()),
                    A::load_f32(numbers[16..].as_ptr()),
                    A::load_f16(halves.as_ptr()),
                    A::load_bf16(halves.as_ptr()),
                    A::load_u8(bytes.as_ptr()),
                    A::load_u4(bytes.as_ptr()),
                    A::dot_bf16(A::splat(0.5), halves.as_ptr(), halves[32..].as_ptr()),
                    A::dot_bf16_pair(A::splat(0.5), halves[7..].as_ptr(), halves.as_ptr()),
                )
            };
            for lane in 0..A::LANES {
                let (x, y) = (numbers[lane], numbers[16 + lane]);
                assert_eq!(out(a)[lane], x);
                assert_eq!(out(A::add(a, b))[lane], x + y);
                assert_eq!(out(A::mul(a, b))[lane], x * y);
                assert_eq!(out(A::max(a, b))[lane], x.max(y));
                assert_eq!(out(A::fma(a, b, a))[lane], x * y + x);
                assert_eq!(out(half)[lane], f16_to_f32(halves[lane]));
                assert_eq!(out(brain)[lane], bf16_to_f32(halves[lane]));
                assert_eq!(out(byte)[lane], f32::from(bytes[lane]));
                assert_eq!(out(low)[lane], f32::from(bytes[lane] & 15));
                assert_eq!(out(high)[lane], f32::from(bytes[lane] >> 4));
                let product = |i: usize| bf16_to_f32(halves[7 + i]) * bf16_to_f32(halves[2 * lane + i]);
                let expected = product(0) + product(1) + 0.5;
                assert!((out(paired)[lane] / expected - 1.0).abs() < 1e-5, "{} is not {expected}", out(paired)[lane]);
            }
            let total: f32 = numbers[..A::LANES].iter().sum();
            assert_eq!(A::sum(a), total);
            assert_eq!(A::sums([a, b, A::splat(1.0), a]), [total, A::sum(b), A::LANES as f32, total]);
            let products = |i: usize| bf16_to_f32(halves[i]) * bf16_to_f32(halves[32 + i]);
            let expected: f32 = (0..2 * A::LANES).map(products).sum::<f32>() + 0.5 * A::LANES as f32;
            assert!((A::sum(dot) / expected - 1.0).abs() < 1e-5, "{} is not {expected}", A::sum(dot));
        }
    }

    #[test]
    #[allow(clippy::print_stdout)] // says what is skipped
    fn every_set_of_this_machine_computes_the_same() {
        for isa in Isa::ALL {
            if isa.is_available() {
                isa.run(Everything);
            } else {
                println!("skipped: this machine has no {isa:?}");
            }
        }
    }
}
