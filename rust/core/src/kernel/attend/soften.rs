//! Scores into weights.

use super::exp::{exp, soft_cap};
use super::item::Scratch;
use super::layer::Scoring;
use crate::kernel::lanes::Arith;

/// Turn a chunk's scores into weights, relative to the largest score so far (the online softmax of Milakov and
/// Gimelshein), and what was summed before to the same measure.
#[inline(always)]
pub(super) fn soften<A: Arith>(
    scratch: &mut Scratch,
    scoring: &Scoring<'_>,
    queries: usize,
    group: usize,
    first: usize,
    tokens: usize,
    stride: usize,
) {
    let padded = tokens.next_multiple_of(A::LANES);
    for query in 0..queries {
        let (low, high) = scratch.limits[query];
        let low = (low as usize).saturating_sub(first).min(tokens);
        let high = (high as usize).saturating_sub(first).min(tokens);
        for r in query * group..(query + 1) * group {
            let scores = &mut scratch.scores[r * stride..][..padded];
            if let Some(cap) = scoring.soft_cap {
                for score in &mut scores[..tokens] {
                    *score = soft_cap::<A>(*score, cap);
                }
            }
            scores[..low.min(high)].fill(f32::NEG_INFINITY);
            scores[high..].fill(f32::NEG_INFINITY);
            let before = scratch.largest[r];
            let largest = largest::<A>(scores).max(before);
            if largest == f32::NEG_INFINITY {
                scores.fill(0.0); // nothing seen yet, and infinity less infinity is no number
                continue;
            }
            for score in scores.iter_mut() {
                *score = exp::<A>(*score - largest);
            }
            let kept = exp::<A>(before - largest);
            scratch.total[r] = A::mul_add(scratch.total[r], kept, total::<A>(scores));
            if before < largest {
                scratch.largest[r] = largest;
                for sum in &mut scratch.sums[r * scratch.width..][..scratch.width] {
                    *sum *= kept;
                }
            }
        }
    }
}

#[inline(always)]
fn largest<A: Arith>(scores: &[f32]) -> f32 {
    let mut lanes = A::splat(f32::NEG_INFINITY);
    for part in scores.chunks_exact(A::LANES) {
        // SAFETY: a whole vector.
        lanes = A::max(lanes, unsafe { A::load_f32(part.as_ptr()) });
    }
    let mut out = [f32::NEG_INFINITY; 16];
    // SAFETY: no vector has more lanes.
    unsafe { A::store(out.as_mut_ptr(), lanes) };
    out.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

#[inline(always)]
fn total<A: Arith>(weights: &[f32]) -> f32 {
    let mut lanes = A::splat(0.0);
    for part in weights.chunks_exact(A::LANES) {
        // SAFETY: a whole vector.
        lanes = A::add(lanes, unsafe { A::load_f32(part.as_ptr()) });
    }
    A::sum(lanes)
}
