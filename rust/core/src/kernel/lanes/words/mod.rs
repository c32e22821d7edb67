//! What codecs do with vectors beside arithmetic: codes in words, halves, and shuffles.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::Arith;

/// `LANES` words of 32 bits beside `LANES` float32.
pub trait Words: Arith {
    /// `LANES` words.
    type W: Copy;

    /// Lane by lane `a - b`.
    fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// Lane by lane `a / b`.
    fn div(a: Self::V, b: Self::V) -> Self::V;
    /// Lane by lane the smaller one.
    fn min(a: Self::V, b: Self::V) -> Self::V;
    /// The nearest integers, of two the even one, of numbers from 0 to 2^22.
    fn round(v: Self::V) -> Self::W;
    /// Lane by lane `low | high << shift`.
    fn merge(low: Self::W, high: Self::W, shift: u32) -> Self::W;
    /// Lane by lane `(word >> shift) & mask`, as a number below 2^23.
    fn field(word: Self::W, shift: u32, mask: u32) -> Self::V;
    /// The same bits.
    fn bits(v: Self::V) -> Self::W;
    /// The same bits.
    fn from_bits(word: Self::W) -> Self::V;
    /// Lane by lane the larger one of `top` and the bits of a number's magnitude: NaN is above infinity, and
    /// that above every number.
    fn top(top: Self::W, v: Self::V) -> Self::W;
    /// Both vectors' lanes in turns: `a0 b0 a1 b1 ...`, in two vectors.
    fn zip(a: Self::W, b: Self::W) -> (Self::W, Self::W);
    /// The even lanes of both vectors, and the odd ones.
    fn unzip(a: Self::W, b: Self::W) -> (Self::W, Self::W);

    /// # Safety
    /// `LANES` words can be read.
    unsafe fn load_words(from: *const u32) -> Self::W;
    /// # Safety
    /// `LANES` words can be written.
    unsafe fn store_words(to: *mut u32, word: Self::W);
    /// Store the lowest byte of each word.
    ///
    /// # Safety
    /// `LANES` bytes can be written.
    unsafe fn store_bytes(to: *mut u8, word: Self::W);
    /// Store the largest binary16 that are not above the numbers.
    ///
    /// # Safety
    /// `LANES` numbers can be written.
    unsafe fn store_f16_down(to: *mut u16, v: Self::V);
    /// Store the nearest binary16; what is finite stays finite.
    ///
    /// # Safety
    /// `LANES` numbers can be written.
    unsafe fn store_f16(to: *mut u16, v: Self::V);
    /// The same of two vectors, side by side.
    ///
    /// # Safety
    /// `2 * LANES` numbers can be written.
    #[inline(always)]
    unsafe fn store_f16_two(to: *mut u16, a: Self::V, b: Self::V) {
        // SAFETY: the caller's.
        unsafe {
            Self::store_f16(to, a);
            Self::store_f16(to.add(Self::LANES), b);
        }
    }
    /// Store the nearest bfloat16 of numbers that are far from overflowing; subnormal ones may become zero.
    ///
    /// # Safety
    /// `LANES` numbers can be written.
    unsafe fn store_bf16(to: *mut u16, v: Self::V);
    /// The same of two vectors, side by side.
    ///
    /// # Safety
    /// `2 * LANES` numbers can be written.
    #[inline(always)]
    unsafe fn store_bf16_two(to: *mut u16, a: Self::V, b: Self::V) {
        // SAFETY: the caller's.
        unsafe {
            Self::store_bf16(to, a);
            Self::store_bf16(to.add(Self::LANES), b);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Words;
    use crate::kernel::half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
    use crate::kernel::isa::{Body, Isa};

    struct Everything;

    #[allow(clippy::many_single_char_names)] // vectors and their numbers
    impl Body for Everything {
        type Out = ();

        #[inline(always)]
        fn run<A: Words>(self) {
            let lanes = A::LANES;
            let words: Vec<u32> = (0..32_u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
            let mut numbers: Vec<f32> = (0..32).map(|i| (i as f32 - 15.5) * 7.77).collect();
            (numbers[1], numbers[2], numbers[3], numbers[4]) = (7e4, -7e4, 3e-8, -3e-8);
            let out = |word: A::W| {
                let mut found = vec![0; lanes];
                // SAFETY: the room is as long as the vector.
                unsafe { A::store_words(found.as_mut_ptr(), word) };
                found
            };
            // SAFETY: the tables hold 32 entries, twice what a vector has.
            let (a, b, x, y) = unsafe {
                (
                    A::load_words(words.as_ptr()),
                    A::load_words(words[lanes..].as_ptr()),
                    A::load_f32(numbers.as_ptr()),
                    A::load_f32(numbers[lanes..].as_ptr()),
                )
            };
            let (left, right) = A::zip(a, b);
            let zipped = [out(left), out(right)].concat();
            let (even, odd) = A::unzip(left, right);
            assert_eq!((out(even), out(odd)), (out(a), out(b)));
            let halves = |store: unsafe fn(*mut u16, A::V), v: A::V| {
                let mut found = vec![0; lanes];
                // SAFETY: the room is as long as the vector.
                unsafe { store(found.as_mut_ptr(), v) };
                found
            };
            let down = halves(A::store_f16_down, x);
            let (near, brain) = (halves(A::store_f16, x), halves(A::store_bf16, x));
            let two = |store: unsafe fn(*mut u16, A::V, A::V)| {
                let mut found = vec![0; 2 * lanes];
                // SAFETY: the room is as long as two vectors.
                unsafe { store(found.as_mut_ptr(), x, y) };
                found
            };
            assert_eq!(two(A::store_bf16_two), [brain.clone(), halves(A::store_bf16, y)].concat());
            assert_eq!(two(A::store_f16_two), [near.clone(), halves(A::store_f16, y)].concat());
            let mut bytes = vec![0_u8; lanes];
            // SAFETY: likewise.
            unsafe { A::store_bytes(bytes.as_mut_ptr(), a) };
            for i in 0..lanes {
                let (p, q) = (numbers[i], numbers[lanes + i]);
                assert_eq!((zipped[2 * i], zipped[2 * i + 1]), (words[i], words[lanes + i]));
                assert_eq!(out(A::bits(A::sub(x, y)))[i], (p - q).to_bits());
                assert_eq!(out(A::bits(A::div(x, y)))[i], (p / q).to_bits());
                assert_eq!(out(A::bits(A::min(x, y)))[i], p.min(q).to_bits());
                let magnitude = A::mul(x, x);
                assert_eq!(
                    out(A::round(A::min(magnitude, A::splat(4e6))))[i],
                    (p * p).min(4e6).round_ties_even() as u32
                );
                assert_eq!(out(A::merge(a, b, 8))[i], words[i] | words[lanes + i] << 8);
                assert_eq!(out(A::bits(A::field(a, 20, 255)))[i], (((words[i] >> 20) & 255) as f32).to_bits());
                assert_eq!(out(A::top(A::bits(A::splat(20.0)), x))[i], p.abs().max(20.0).to_bits());
                assert_eq!(out(A::bits(A::from_bits(a)))[i], words[i]);
                assert_eq!(bytes[i], words[i] as u8);
                assert!(
                    f16_to_f32(down[i]) <= p
                        && (f16_to_f32(down[i].wrapping_add(1)) > p || !(0.0..=65_504.0).contains(&p))
                );
                assert_eq!(near[i], f32_to_f16(p.clamp(-65_504.0, 65_504.0)));
                assert_eq!(bf16_to_f32(brain[i]), bf16_to_f32(f32_to_bf16(p)));
            }
        }
    }

    #[test]
    #[allow(clippy::print_stdout)] // says what is skipped
    fn every_set_of_this_machine_shuffles_and_rounds_the_same() {
        for isa in Isa::ALL {
            if isa.is_available() {
                isa.run(Everything);
            } else {
                println!("skipped: this machine has no {isa:?}");
            }
        }
    }
}
