//! Attention of a few new tokens a row over pages, read where they lie.
//!
//! All query heads of a KV head in one pass, an online softmax, and parts of long rows apart, merged by
//! their sums (flash decoding; Dao et al. 2023). Pages that several rows share are read once for all of
//! them (Hydragen; Juravsky et al. 2024). Quantized pages are never written out: the scales of keys go
//! into the query, those of values into the weights.

mod ahead;
mod append;
mod exp;
mod item;
mod layer;
mod loads;
mod many;
mod mix;
mod rows;
mod scores;
mod soften;
mod unroll;

use std::cell::RefCell;

pub use append::{New, append};
use exp::exp;
use item::{Item, Scratch};
pub use layer::{Answer, Cold, Layer, Query, Records, Scoring};
pub use rows::{Row, Rows};

use crate::kernel::half::{Float, f32_to_bf16, f32_to_f16};
use crate::kernel::isa::Isa;
use crate::kernel::lanes::Portable;
use crate::kernel::team::{Alone, Team};

/// Below this many numbers of K a call is over before a second thread has begun.
const SMALL: usize = 1 << 16;
/// Blocks of a part hold at least this many tokens.
const PART_TOKENS: usize = 512;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// How a call's work is cut: parts a segment, and where each one leaves what must be merged.
struct Cuts {
    /// For each segment: parts, and the first number of its partial results.
    segments: Vec<(usize, usize)>,
    /// Segment and part of every piece, heads innermost.
    parts: Vec<(usize, usize)>,
    numbers: usize,
}

/// Numbers of a partial result: the largest score, the total and the sums.
fn partial_width(layer: &Layer) -> usize {
    2 + layer.value_dim
}

impl Cuts {
    fn new(layer: &Layer, rows: &Rows, group: usize, threads: usize) -> Self {
        let mut it = Self { segments: Vec::new(), parts: Vec::new(), numbers: 0 };
        let all: usize = rows.segments.iter().map(|segment| segment.blocks.len()).sum();
        for (index, segment) in rows.segments.iter().enumerate() {
            // Four pieces a thread, shared out by length, none too short to be worth its start.
            let share = (4 * threads * segment.blocks.len()).div_ceil(all.max(1) * layer.kv_heads);
            let parts = share.min(segment.blocks.len() * layer.block / PART_TOKENS).max(1);
            it.segments.push((parts, it.numbers));
            it.parts.extend((0..parts).map(|part| (index, part)));
            it.numbers += parts * layer.kv_heads * segment.num_queries() * group * partial_width(layer);
        }
        it
    }

    /// True when the row's answer comes from one piece a head.
    fn is_whole(&self, rows: &Rows, row: usize) -> bool {
        matches!(rows.path[row][..], [(segment, _)] if self.segments[segment].0 == 1)
    }
}

/// What pieces write to, each at places of its own.
#[derive(Clone, Copy)]
struct Partials(*mut f32);
// SAFETY: no two pieces write to one place, and nobody reads before all are done.
unsafe impl Sync for Partials {}

/// Attend causally: token `i` of a row sees its past and the new tokens up to itself.
///
/// # Safety
/// Every page of `rows` is the layer's (`Layer::has`) and holds what the row's tokens wrote there; the
/// addresses and strides of `layer`, `query` and `answer` are true for all of `rows`; `answer` overlaps
/// nothing else; nobody writes what is read here meanwhile.
pub unsafe fn attend(
    isa: Isa,
    team: &dyn Team,
    layer: &Layer,
    rows: &Rows,
    query: &Query,
    answer: &Answer,
    scoring: &Scoring<'_>,
) {
    let group = query.heads / layer.kv_heads;
    let read: usize = rows.segments.iter().map(|segment| segment.blocks.len()).sum::<usize>() * layer.block;
    let is_small = read * layer.kv_heads * layer.dim < SMALL;
    let team = if is_small { &Alone as &dyn Team } else { team };
    let cuts = Cuts::new(layer, rows, group, team.size());
    let mut numbers = Vec::new();
    if cuts.segments.iter().any(|(parts, _)| *parts > 1) || rows.path.iter().any(|path| path.len() > 1) {
        numbers.resize(cuts.numbers, 0.0_f32);
    }
    let partials = Partials(numbers.as_mut_ptr());
    let (cuts, partials) = (&cuts, &partials);
    team.run(cuts.parts.len() * layer.kv_heads, &|piece| {
        let (head, (index, part)) = (piece % layer.kv_heads, cuts.parts[piece / layer.kv_heads]);
        let segment = &rows.segments[index];
        let (parts, first) = cuts.segments[index];
        let cut = |part: usize| segment.blocks.start + segment.blocks.len() * part / parts;
        let blocks = cut(part)..cut(part + 1);
        SCRATCH.with_borrow_mut(|scratch| {
            isa.run(Item { layer, query, scoring, rows, segment, head, blocks, scratch: &mut *scratch });
            let count = segment.num_queries() * group;
            let base = first + (part * layer.kv_heads + head) * count * partial_width(layer);
            for (place, row) in segment.members.iter().enumerate() {
                let queries = segment.offsets[place] * group..segment.offsets[place + 1] * group;
                if cuts.is_whole(rows, *row) {
                    for (index, r) in queries.enumerate() {
                        let (token, g) = (index / group, index % group);
                        let sums = &mut scratch.sums[r * scratch.width..][..layer.value_dim];
                        let head = head * group + g;
                        let weight = closing(scratch.largest[r], scratch.total[r], scoring, head);
                        // SAFETY: this row, head and token are this piece's alone.
                        unsafe { write(answer, query.float, rows.spans[*row], head, token, sums, weight) };
                    }
                } else {
                    for r in queries {
                        // SAFETY: so are these numbers.
                        let to = unsafe {
                            let at = partials.0.add(base + r * partial_width(layer));
                            std::slice::from_raw_parts_mut(at, partial_width(layer))
                        };
                        to[0] = scratch.largest[r];
                        to[1] = scratch.total[r];
                        to[2..].copy_from_slice(&scratch.sums[r * scratch.width..][..layer.value_dim]);
                    }
                }
            }
        });
    });
    let split: Vec<usize> = (0..rows.spans.len()).filter(|row| !cuts.is_whole(rows, *row)).collect();
    let numbers = &numbers;
    let merge: &dyn Team = if split.len() * query.heads < 64 { &Alone } else { team };
    merge.run(split.len(), &|index| {
        let row = split[index];
        let mut sums = vec![0.0; layer.value_dim];
        for token in 0..rows.spans[row].count as usize {
            for head in 0..query.heads {
                let (largest, total) = merged(layer, rows, cuts, numbers, group, (row, token, head), &mut sums);
                let weight = closing(largest, total, scoring, head);
                // SAFETY: this row is this part's alone.
                unsafe { write(answer, query.float, rows.spans[row], head, token, &mut sums, weight) };
            }
        }
    });
}

/// What a query's sums are multiplied by in the end: one over its total, a sink's weight included.
fn closing(largest: f32, total: f32, scoring: &Scoring<'_>, head: usize) -> f32 {
    let Some(sink) = scoring.sinks.map(|sinks| sinks[head]) else { return 1.0 / total };
    // Relative to the largest score, as the total is; a sink above it may need more than float32 holds.
    let sink = f64::from(sink - largest).exp();
    (1.0 / (f64::from(total) + sink)) as f32
}

/// Put together what the parts of a query's row found. Returns the largest score and the total.
fn merged(
    layer: &Layer,
    rows: &Rows,
    cuts: &Cuts,
    numbers: &[f32],
    group: usize,
    (row, token, head): (usize, usize, usize),
    sums: &mut [f32],
) -> (f32, f32) {
    let width = partial_width(layer);
    let (kv_head, g) = (head / group, head % group);
    let found = || {
        rows.path[row].iter().flat_map(|(index, place)| {
            let segment = &rows.segments[*index];
            let (parts, first) = cuts.segments[*index];
            let (count, r) = (segment.num_queries() * group, (segment.offsets[*place] + token) * group + g);
            (0..parts)
                .map(move |part| &numbers[first + ((part * layer.kv_heads + kv_head) * count + r) * width..][..width])
        })
    };
    let largest = found().fold(f32::NEG_INFINITY, |largest, it| largest.max(it[0]));
    let mut total = 0.0;
    sums.fill(0.0);
    for part in found().filter(|part| part[0] > f32::NEG_INFINITY || part[0].is_nan()) {
        let share = exp::<Portable>(part[0] - largest);
        total += part[1] * share;
        for (sum, add) in sums.iter_mut().zip(&part[2..]) {
            *sum += add * share;
        }
    }
    (largest, total)
}

/// # Safety
/// The place is the answer's, and nobody else's meanwhile.
unsafe fn write(answer: &Answer, float: Float, row: Row, head: usize, token: usize, sums: &mut [f32], weight: f32) {
    let at = row.row * answer.strides[0] + head * answer.strides[1] + (row.column + token) * answer.strides[2];
    for (index, sum) in sums.iter().enumerate() {
        let found = sum * weight;
        // SAFETY: the caller's.
        unsafe {
            match float {
                Float::F32 => *answer.data.cast::<f32>().add(at + index) = found,
                Float::F16 => *answer.data.cast::<u16>().add(at + index) = f32_to_f16(found),
                Float::Bf16 => *answer.data.cast::<u16>().add(at + index) = f32_to_bf16(found),
            }
        }
    }
}
