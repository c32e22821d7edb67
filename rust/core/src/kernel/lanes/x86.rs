//! AVX2 and AVX-512.
//!
//! Each operation is an intrinsic or two. They are unsafe to call because the instructions may be missing;
//! `Isa::run` has looked, and nothing else makes these types run. No closures here: one is a function of its own,
//! compiled without the set's instructions, and every operation in it a call.

#![allow(clippy::wildcard_imports)] // forty intrinsics by name say nothing that their calls do not
#![allow(clippy::undocumented_unsafe_blocks)] // the module's words hold for every block of it

use std::arch::x86_64::*;

use super::Arith;

/// AVX2 with FMA and F16C: 8 lanes.
#[derive(Clone, Copy)]
pub struct Avx2;

impl Arith for Avx2 {
    type V = __m256;
    const LANES: usize = 8;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    #[inline(always)]
    fn splat(value: f32) -> Self::V {
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    fn add(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn max(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm256_max_ps(a, b) }
    }

    #[inline(always)]
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn sum(v: Self::V) -> f32 {
        unsafe {
            let half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
        }
    }

    #[inline(always)]
    fn sums(v: [Self::V; 4]) -> [f32; 4] {
        let mut out = [0.0; 4];
        unsafe {
            let both = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
            let all = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps::<1>(both));
            _mm_storeu_ps(out.as_mut_ptr(), all);
        }
        out
    }

    #[inline(always)]
    fn prefetch(line: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }

    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> Self::V {
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::V {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::V {
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::V {
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_u4(from: *const u8) -> (Self::V, Self::V) {
        unsafe {
            let wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
            let low = _mm256_and_si256(wide, _mm256_set1_epi32(15));
            (_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(wide)))
        }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        unsafe { _mm256_storeu_ps(to, v) }
    }

    #[inline(always)]
    unsafe fn dot_bf16(sums: Self::V, a: *const u16, b: *const u16) -> Self::V {
        unsafe {
            let first = Self::fma(Self::load_bf16(a), Self::load_bf16(b), sums);
            Self::fma(Self::load_bf16(a.add(8)), Self::load_bf16(b.add(8)), first)
        }
    }
}

#[inline(always)]
fn halves_added(v: __m512) -> __m256 {
    unsafe { _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)) }
}

/// AVX-512 F, BW, DQ and VL: 16 lanes; `DOTS`: with dot products of bfloat16.
#[derive(Clone, Copy)]
pub struct Wide<const DOTS: bool>;

/// Without dot products of bfloat16.
pub type Avx512 = Wide<false>;
/// With them.
pub type Avx512Bf16 = Wide<true>;

impl<const DOTS: bool> Arith for Wide<DOTS> {
    type V = __m512;
    const LANES: usize = 16;
    const DOTS_BF16: bool = DOTS;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    #[inline(always)]
    fn splat(value: f32) -> Self::V {
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn add(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn max(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn sum(v: Self::V) -> f32 {
        Avx2::sum(halves_added(v))
    }

    #[inline(always)]
    fn sums(v: [Self::V; 4]) -> [f32; 4] {
        Avx2::sums([halves_added(v[0]), halves_added(v[1]), halves_added(v[2]), halves_added(v[3])])
    }

    #[inline(always)]
    fn prefetch(line: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }

    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> Self::V {
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::V {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::V {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::V {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_u4(from: *const u8) -> (Self::V, Self::V) {
        unsafe {
            let wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            let low = _mm512_and_si512(wide, _mm512_set1_epi32(15));
            (_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(wide)))
        }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        unsafe { _mm512_storeu_ps(to, v) }
    }

    #[inline(always)]
    unsafe fn dot_bf16(sums: Self::V, a: *const u16, b: *const u16) -> Self::V {
        unsafe {
            if DOTS {
                let (a, b) = (_mm512_loadu_si512(a.cast()), _mm512_loadu_si512(b.cast()));
                let pairs = (std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b));
                return _mm512_dpbf16_ps(sums, pairs.0, pairs.1);
            }
            let first = Self::fma(Self::load_bf16(a), Self::load_bf16(b), sums);
            Self::fma(Self::load_bf16(a.add(16)), Self::load_bf16(b.add(16)), first)
        }
    }

    #[inline(always)]
    unsafe fn dot_bf16_pair(sums: Self::V, pair: *const u16, b: *const u16) -> Self::V {
        unsafe {
            let (a, b) = (_mm512_set1_epi32(pair.cast::<i32>().read_unaligned()), _mm512_loadu_si512(b.cast()));
            if DOTS {
                let pairs = (std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b));
                return _mm512_dpbf16_ps(sums, pairs.0, pairs.1);
            }
            let upper = _mm512_set1_epi32(-65_536);
            let [first, second] = [_mm512_slli_epi32::<16>(a), _mm512_and_si512(a, upper)];
            let [low, high] = [_mm512_slli_epi32::<16>(b), _mm512_and_si512(b, upper)];
            let sums = Self::fma(_mm512_castsi512_ps(first), _mm512_castsi512_ps(low), sums);
            Self::fma(_mm512_castsi512_ps(second), _mm512_castsi512_ps(high), sums)
        }
    }
}
