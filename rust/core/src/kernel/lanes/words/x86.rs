//! Words of AVX2 and AVX-512; when these may run, `lanes::x86` says.

#![allow(clippy::wildcard_imports)] // forty intrinsics by name say nothing that their calls do not
#![allow(clippy::undocumented_unsafe_blocks)] // as in `lanes::x86`

use std::arch::x86_64::*;

use super::super::x86::{Avx2, Wide};
use super::Words;

const DOWN: i32 = _MM_FROUND_TO_NEG_INF;
const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;

#[inline(always)]
fn count(shift: u32) -> __m128i {
    unsafe { _mm_cvtsi32_si128(shift.cast_signed()) }
}

impl Words for Avx2 {
    type W = __m256i;

    #[inline(always)]
    fn sub(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    fn div(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm256_div_ps(a, b) }
    }

    #[inline(always)]
    fn min(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm256_min_ps(a, b) }
    }

    #[inline(always)]
    fn round(v: Self::V) -> Self::W {
        unsafe { _mm256_cvtps_epi32(v) }
    }

    #[inline(always)]
    fn merge(low: Self::W, high: Self::W, shift: u32) -> Self::W {
        unsafe { _mm256_or_si256(low, _mm256_sll_epi32(high, count(shift))) }
    }

    #[inline(always)]
    fn field(word: Self::W, shift: u32, mask: u32) -> Self::V {
        unsafe {
            let found = _mm256_srl_epi32(word, count(shift));
            _mm256_cvtepi32_ps(_mm256_and_si256(found, _mm256_set1_epi32(mask.cast_signed())))
        }
    }

    #[inline(always)]
    fn bits(v: Self::V) -> Self::W {
        unsafe { _mm256_castps_si256(v) }
    }

    #[inline(always)]
    fn from_bits(word: Self::W) -> Self::V {
        unsafe { _mm256_castsi256_ps(word) }
    }

    #[inline(always)]
    fn top(top: Self::W, v: Self::V) -> Self::W {
        unsafe { _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(i32::MAX))) }
    }

    #[inline(always)]
    fn zip(a: Self::W, b: Self::W) -> (Self::W, Self::W) {
        unsafe {
            let (low, high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
            (_mm256_permute2x128_si256::<0x20>(low, high), _mm256_permute2x128_si256::<0x31>(low, high))
        }
    }

    #[inline(always)]
    fn unzip(a: Self::W, b: Self::W) -> (Self::W, Self::W) {
        unsafe {
            let (a, b) = (_mm256_castsi256_ps(a), _mm256_castsi256_ps(b));
            let even = _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(a, b));
            let odd = _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(a, b));
            (_mm256_permute4x64_epi64::<0b11_01_10_00>(even), _mm256_permute4x64_epi64::<0b11_01_10_00>(odd))
        }
    }

    #[inline(always)]
    unsafe fn load_words(from: *const u32) -> Self::W {
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store_words(to: *mut u32, word: Self::W) {
        unsafe { _mm256_storeu_si256(to.cast(), word) }
    }

    #[inline(always)]
    unsafe fn store_bytes(to: *mut u8, word: Self::W) {
        unsafe {
            let first = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
            let bytes = _mm256_shuffle_epi8(word, _mm256_broadcastsi128_si256(first));
            let (low, high) = (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes));
            _mm_storel_epi64(to.cast(), _mm_unpacklo_epi32(low, high));
        }
    }

    #[inline(always)]
    unsafe fn store_f16_down(to: *mut u16, v: Self::V) {
        unsafe { _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<DOWN>(v)) }
    }

    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, v: Self::V) {
        unsafe {
            let low = _mm256_max_ps(v, _mm256_set1_ps(-65_504.0));
            let held = _mm256_min_ps(low, _mm256_set1_ps(65_504.0));
            _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<NEAREST>(held));
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(to: *mut u16, v: Self::V) {
        unsafe {
            let words = _mm256_srli_epi32::<16>(rounded_to_bf16(v));
            let halves = _mm256_packus_epi32(words, words);
            let joined = _mm256_permute4x64_epi64::<0b11_01_10_00>(halves);
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(joined));
        }
    }

    #[inline(always)]
    unsafe fn store_bf16_two(to: *mut u16, a: Self::V, b: Self::V) {
        unsafe {
            let words = (_mm256_srli_epi32::<16>(rounded_to_bf16(a)), _mm256_srli_epi32::<16>(rounded_to_bf16(b)));
            let halves = _mm256_packus_epi32(words.0, words.1);
            _mm256_storeu_si256(to.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(halves));
        }
    }
}

/// The nearest binary16, finite ones of what is finite.
#[inline(always)]
fn halves(v: __m512) -> __m256i {
    unsafe {
        let low = _mm512_max_ps(v, _mm512_set1_ps(-65_504.0));
        let held = _mm512_min_ps(low, _mm512_set1_ps(65_504.0));
        _mm512_cvtps_ph::<NEAREST>(held)
    }
}

/// The nearest bfloat16 in the upper half of each word.
#[inline(always)]
fn rounded_to_bf16(v: __m256) -> __m256i {
    unsafe {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)))
    }
}

/// The same in 512 bits.
#[inline(always)]
fn rounded_to_bf16_wide(v: __m512) -> __m512i {
    unsafe {
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)))
    }
}

impl<const DOTS: bool> Words for Wide<DOTS> {
    type W = __m512i;

    #[inline(always)]
    fn sub(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn div(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn min(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn round(v: Self::V) -> Self::W {
        unsafe { _mm512_cvtps_epi32(v) }
    }

    #[inline(always)]
    fn merge(low: Self::W, high: Self::W, shift: u32) -> Self::W {
        unsafe { _mm512_or_si512(low, _mm512_sll_epi32(high, count(shift))) }
    }

    #[inline(always)]
    fn field(word: Self::W, shift: u32, mask: u32) -> Self::V {
        unsafe {
            let found = _mm512_srl_epi32(word, count(shift));
            _mm512_cvtepi32_ps(_mm512_and_si512(found, _mm512_set1_epi32(mask.cast_signed())))
        }
    }

    #[inline(always)]
    fn bits(v: Self::V) -> Self::W {
        unsafe { _mm512_castps_si512(v) }
    }

    #[inline(always)]
    fn from_bits(word: Self::W) -> Self::V {
        unsafe { _mm512_castsi512_ps(word) }
    }

    #[inline(always)]
    fn top(top: Self::W, v: Self::V) -> Self::W {
        unsafe { _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(i32::MAX))) }
    }

    #[inline(always)]
    fn zip(a: Self::W, b: Self::W) -> (Self::W, Self::W) {
        unsafe {
            let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
            (_mm512_permutex2var_epi32(a, low, b), _mm512_permutex2var_epi32(a, high, b))
        }
    }

    #[inline(always)]
    fn unzip(a: Self::W, b: Self::W) -> (Self::W, Self::W) {
        unsafe {
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            (_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b))
        }
    }

    #[inline(always)]
    unsafe fn load_words(from: *const u32) -> Self::W {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store_words(to: *mut u32, word: Self::W) {
        unsafe { _mm512_storeu_si512(to.cast(), word) }
    }

    #[inline(always)]
    unsafe fn store_bytes(to: *mut u8, word: Self::W) {
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(word)) }
    }

    #[inline(always)]
    unsafe fn store_f16_down(to: *mut u16, v: Self::V) {
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<DOWN>(v)) }
    }

    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, v: Self::V) {
        unsafe {
            _mm256_storeu_si256(to.cast(), halves(v));
        }
    }

    #[inline(always)]
    unsafe fn store_f16_two(to: *mut u16, a: Self::V, b: Self::V) {
        unsafe {
            let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(halves(a)), halves(b));
            _mm512_storeu_si512(to.cast(), both);
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(to: *mut u16, v: Self::V) {
        unsafe {
            if DOTS {
                let halves = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v));
                return _mm256_storeu_si256(to.cast(), halves);
            }
            let words = _mm512_srli_epi32::<16>(rounded_to_bf16_wide(v));
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(words));
        }
    }

    #[inline(always)]
    unsafe fn store_bf16_two(to: *mut u16, a: Self::V, b: Self::V) {
        unsafe {
            if DOTS {
                let halves = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a));
                return _mm512_storeu_si512(to.cast(), halves);
            }
            // A shuffle that takes the upper half of every word of both.
            let first = _mm512_set1_epi32(0x0002_0000);
            let steps = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
            let both = _mm512_or_si512(steps, _mm512_slli_epi32::<16>(steps));
            let upper = _mm512_add_epi32(_mm512_add_epi32(both, first), _mm512_set1_epi32(0x0001_0001));
            let (a, b) = (rounded_to_bf16_wide(a), rounded_to_bf16_wide(b));
            _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi16(a, upper, b));
        }
    }
}
