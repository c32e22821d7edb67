//! Instruction sets: one body, compiled for each of them, and the best one chosen at run time.
//!
//! A kernel is a `Body`, generic over `Arith`: a handful of operations on a vector of float32, small enough
//! to be written once a set (`lanes`). Plain loops inside a body are compiled for the set, too.

use std::sync::OnceLock;

pub use super::lanes::Arith;
use super::lanes::Portable;
pub use super::lanes::Words;
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512, Avx512Bf16};

/// What a kernel does, for any instruction set. Mark `run`, and all that it calls, `#[inline(always)]`: what is
/// not inlined is compiled for the portable set.
pub trait Body {
    /// What it returns.
    type Out;

    /// Do it.
    fn run<A: Words>(self) -> Self::Out;
}

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What every CPU of the architecture has; NEON on aarch64.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// That with dot products of bfloat16.
    Avx512Bf16,
}

impl Isa {
    /// Every set that there is a body for.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    /// True when this machine runs it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => Self::Avx512.is_available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The sets that this machine runs, the best one last.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// The best set that this machine runs.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().last().unwrap_or(Self::Portable))
    }

    /// Run a body, compiled for this set; for the portable one where this machine does not have it.
    pub fn run<B: Body>(self, body: B) -> B::Out {
        #[cfg(target_arch = "x86_64")]
        match self {
            // SAFETY: this machine has the instructions.
            Self::Avx512Bf16 if self.is_available() => return unsafe { run_avx512_bf16(body) },
            // SAFETY: likewise.
            Self::Avx512 if self.is_available() => return unsafe { run_avx512(body) },
            // SAFETY: likewise.
            Self::Avx2 if self.is_available() => return unsafe { run_avx2(body) },
            _ => {}
        }
        body.run::<Portable>()
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn run_avx2<B: Body>(body: B) -> B::Out {
    body.run::<Avx2>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl")]
fn run_avx512<B: Body>(body: B) -> B::Out {
    body.run::<Avx512>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn run_avx512_bf16<B: Body>(body: B) -> B::Out {
    body.run::<Avx512Bf16>()
}
