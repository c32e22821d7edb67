//! One piece of the work: some blocks of one segment, for one KV head and all queries that share it.

use std::ops::Range;

use super::ahead::Ahead;
use super::layer::{Cold, Layer, Query, Records, Scoring};
use super::loads::{AsBf16, AsF16, AsF32, AsU8, Load};
use super::many;
use super::mix::{self, Mix};
use super::rows::{Rows, Segment};
use super::scores::{self, Tile};
use super::soften::soften;
use crate::kernel::half::{Float, f16_to_f32, f32_to_bf16};
use crate::kernel::isa::Body;
use crate::kernel::lanes::Words;
use crate::kernel::quant::Bits;

/// Tokens whose weights are taken at once.
const CHUNK: usize = 128;

/// Room that a thread keeps between pieces. Vectors only grow.
#[derive(Default)]
pub(super) struct Scratch {
    queries: Vec<f32>,
    brief: Vec<u16>,
    folded: Vec<f32>,
    bias: Vec<f32>,
    pub scores: Vec<f32>,
    weights: Vec<f32>,
    page: Vec<f32>,
    scales: Vec<f32>,
    /// First and one past the last position that each new token sees.
    pub limits: Vec<(u32, u32)>,
    many: many::Room,
    /// Queries that are lanes, the first ones.
    turned: usize,
    /// For each query: its largest score, the sum of its weights, and its weighted values.
    pub largest: Vec<f32>,
    pub total: Vec<f32>,
    pub sums: Vec<f32>,
    /// Numbers from one query's sums to the next one's.
    pub width: usize,
}

/// One piece. Leaves largest scores, totals and sums in the scratch, queries ordered by member, token and
/// head of the group.
pub(super) struct Item<'a> {
    pub layer: &'a Layer,
    pub query: &'a Query,
    pub scoring: &'a Scoring<'a>,
    pub rows: &'a Rows,
    pub segment: &'a Segment,
    pub head: usize,
    pub blocks: Range<usize>,
    pub scratch: &'a mut Scratch,
}

fn room(of: &mut Vec<f32>, length: usize) {
    if of.len() < length {
        of.resize(length, 0.0);
    }
}

impl Body for Item<'_> {
    type Out = ();

    #[inline(always)]
    fn run<A: Words>(self) {
        let Item { layer, query, scoring, rows, segment, head, blocks, scratch } = self;
        let group = query.heads / layer.kv_heads;
        let count = segment.num_queries() * group;
        let dots = A::DOTS_BF16
            && layer.float == Float::Bf16
            && query.float == Float::Bf16
            && layer.dim.is_multiple_of(2 * A::LANES);
        let table = &rows.table(segment.members[0]);
        let cold = blocks.clone().any(|block| table[block] >= layer.pages);
        let width = layer.dim.next_multiple_of(2 * A::LANES);
        // Products of bfloat16 are exact whatever the scale, so there it is applied to scores.
        let before = if dots { 1.0 } else { scoring.scale };
        let after = if dots { scoring.scale } else { 1.0 };
        prepare(scratch, query, rows, segment, head, group, width, layer.dim, before, scoring.window, dots);
        scratch.turned = count / A::LANES * A::LANES;
        if scratch.turned > 0 {
            if dots {
                many::turn_pairs::<A>(&mut scratch.many, &scratch.brief, scratch.turned, width, layer.dim);
            } else {
                many::turn::<A>(&mut scratch.many, &scratch.queries, scratch.turned, width, layer.dim);
            }
        }
        let sums_width = (2 * layer.value_dim.div_ceil(2)).next_multiple_of(A::LANES);
        scratch.width = sums_width;
        room(&mut scratch.largest, count);
        room(&mut scratch.total, count);
        room(&mut scratch.sums, count * sums_width);
        scratch.largest[..count].fill(f32::NEG_INFINITY);
        scratch.total[..count].fill(0.0);
        scratch.sums[..count * sums_width].fill(0.0);
        let per_chunk = (CHUNK / layer.block).max(1);
        let stride = (per_chunk * layer.block).next_multiple_of(16);
        room(&mut scratch.scores, count * stride);
        if cold {
            room(&mut scratch.folded, count * width);
            room(&mut scratch.bias, count);
            room(&mut scratch.weights, count * layer.block);
            room(&mut scratch.page, count * sums_width);
            room(&mut scratch.scales, 2 * layer.dim.max(layer.value_dim).max(layer.block).next_multiple_of(16));
        }
        let lowest = scratch.limits[..segment.num_queries()].iter().map(|it| it.0).min().unwrap_or(0) as usize;
        let highest = scratch.limits[..segment.num_queries()].iter().map(|it| it.1).max().unwrap_or(0) as usize;
        let mut first = blocks.start.max(lowest / layer.block);
        let end = blocks.end.min(highest.div_ceil(layer.block));
        let place = |block: usize, first: usize| Place {
            page: table[block],
            head,
            offset: (block - first) * layer.block,
            stride,
            tokens: (highest - block * layer.block).min(layer.block),
            next: if block + 1 < end { table[block + 1] } else { u32::MAX },
        };
        while first < end {
            let last = (first + per_chunk).min(end);
            for block in first..last {
                let at = place(block, first);
                // SAFETY: the page is there (checked with the rows), and all rooms were made above.
                unsafe { score::<A>(layer, scratch, at, count, width, dots, after) };
            }
            let tokens = (highest - first * layer.block).min((last - first) * layer.block);
            soften::<A>(scratch, scoring, segment.num_queries(), group, first * layer.block, tokens, stride);
            for block in first..last {
                let at = place(block, first);
                // SAFETY: likewise.
                unsafe { take::<A>(layer, scratch, at, count) };
            }
            first = last;
        }
    }
}

/// A page, and where its scores lie in a chunk's.
#[derive(Clone, Copy)]
struct Place {
    page: u32,
    head: usize,
    offset: usize,
    stride: usize,
    tokens: usize,
    /// The page of the next block: what to ask memory for meanwhile.
    next: u32,
}

/// Copy the queries of one KV head into the scratch, in float32 and scaled (or as they are, in bfloat16), and note
/// which tokens each of them sees.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // one caller, and a struct would only rename them
fn prepare(
    scratch: &mut Scratch,
    query: &Query,
    rows: &Rows,
    segment: &Segment,
    head: usize,
    group: usize,
    width: usize,
    dim: usize,
    scale: f32,
    window: Option<u32>,
    dots: bool,
) {
    let queries = segment.num_queries();
    room(&mut scratch.queries, queries * group * width);
    if dots && scratch.brief.len() < queries * group * width {
        scratch.brief.resize(queries * group * width, 0);
    }
    scratch.limits.clear();
    let mut at = 0;
    for member in &segment.members {
        let row = rows.spans[*member];
        for token in 0..row.count {
            let end = row.past + token + 1;
            scratch.limits.push((window.map_or(0, |window| end.saturating_sub(window)), end));
            for g in 0..group {
                let place = row.row * query.strides[0]
                    + (head * group + g) * query.strides[1]
                    + (row.column + token as usize) * query.strides[2];
                let to = &mut scratch.queries[at * width..][..width];
                to[dim..].fill(0.0);
                // SAFETY: the caller of `attend` vouches for every query of every row.
                unsafe {
                    match query.float {
                        Float::F32 => copy::<AsF32>(query.data.cast::<f32>().add(place), &mut to[..dim], scale),
                        Float::F16 => copy::<AsF16>(query.data.cast::<u16>().add(place), &mut to[..dim], scale),
                        Float::Bf16 => copy::<AsBf16>(query.data.cast::<u16>().add(place), &mut to[..dim], scale),
                    }
                }
                if dots {
                    for (brief, wide) in scratch.brief[at * width..][..width].iter_mut().zip(to.iter()) {
                        *brief = f32_to_bf16(*wide);
                    }
                }
                at += 1;
            }
        }
    }
}

#[inline(always)]
unsafe fn copy<L: Load>(from: *const L::Raw, to: &mut [f32], scale: f32) {
    for (index, number) in to.iter_mut().enumerate() {
        // SAFETY: the caller's: as many numbers as there is room.
        *number = L::one(unsafe { *from.add(index) }) * scale;
    }
}

/// What is read behind a head's part of a page: that of the next block's, unless that is a page of another kind.
/// `width` numbers a token of a full one, else a record of those that `records` names.
#[inline(always)]
fn next_part(layer: &Layer, full: *mut u8, width: usize, records: impl Fn(&Cold) -> Records, at: Place) -> Ahead {
    let part = |page: usize| page * layer.kv_heads + at.head;
    let next = if at.page < layer.pages {
        let bytes = layer.block * width * layer.float.size();
        let is_full = at.next < layer.pages;
        if is_full { full.wrapping_add(part(at.next as usize) * bytes) } else { std::ptr::null_mut() }
    } else {
        match (layer.record(at.page), layer.record(at.next)) {
            (Some((own, _)), Some((next, index))) if own.keys.format.bits == next.keys.format.bits => {
                records(&next).at(part(index)).cast_mut()
            }
            _ => std::ptr::null_mut(),
        }
    };
    Ahead { next, is_wanted: true }
}

/// Scores of one page's tokens.
#[inline(always)]
unsafe fn score<A: Words>(
    layer: &Layer,
    scratch: &mut Scratch,
    at: Place,
    count: usize,
    width: usize,
    dots: bool,
    after: f32,
) {
    let (page, head) = (at.page as usize, at.head);
    let scores = scratch.scores[at.offset..].as_mut_ptr();
    let ahead = next_part(layer, layer.keys, layer.dim, |cold| cold.keys, at);
    let tile = Tile { queries: scratch.queries.as_ptr(), width, rows: count, scores, stride: at.stride, ahead };
    // SAFETY: the caller's; offsets as `Layer` says.
    unsafe {
        if at.page < layer.pages {
            let first = (page * layer.kv_heads + head) * layer.block * layer.dim;
            let keys = layer.keys.cast_const();
            match layer.float {
                Float::F32 => plain::<A, AsF32>(scratch, tile, keys.cast::<f32>().add(first), at.tokens, layer.dim),
                Float::F16 => plain::<A, AsF16>(scratch, tile, keys.cast::<u16>().add(first), at.tokens, layer.dim),
                Float::Bf16 if dots => {
                    let keys = keys.cast::<u16>().add(first);
                    let turned = scratch.turned;
                    if turned > 0 {
                        many::score_bf16::<A>(&scratch.many, tile, turned, keys, at.tokens, layer.dim);
                    }
                    let queries = scratch.brief.as_ptr().add(turned * width);
                    scores::bf16_dots::<A>(tile.below(turned), queries, keys, at.tokens, layer.dim);
                }
                Float::Bf16 => plain::<A, AsBf16>(scratch, tile, keys.cast::<u16>().add(first), at.tokens, layer.dim),
            }
        } else if let Some((Cold { keys, .. }, index)) = layer.record(at.page) {
            let record = keys.at(index * layer.kv_heads + head);
            let fields = record.add(keys.format.codes());
            let (scale, minimum) = scratch.scales.split_at_mut(layer.dim);
            halves(fields, &mut scale[..layer.dim]);
            halves(fields.add(2 * layer.dim), &mut minimum[..layer.dim]);
            for r in 0..count {
                let query = &scratch.queries[r * width..][..layer.dim];
                let folded = &mut scratch.folded[r * width..][..layer.dim];
                scratch.bias[r] = fold(query, scale, minimum, folded);
            }
            let tile = Tile { queries: scratch.folded.as_ptr(), ..tile };
            let four = keys.format.bits == Bits::Four;
            scores::quantized::<A>(tile, record, layer.block, layer.dim, scratch.bias.as_ptr(), four);
        }
    }
    #[allow(clippy::float_cmp)] // one is no approximation: there is nothing to do
    if after != 1.0 {
        for r in 0..count {
            for score in &mut scratch.scores[r * at.stride + at.offset..][..at.tokens] {
                *score *= after;
            }
        }
    }
}

/// Scores over full precision: as many queries as fill vectors are lanes, the others rows.
#[inline(always)]
unsafe fn plain<A: Words, L: Load>(scratch: &mut Scratch, tile: Tile, keys: *const L::Raw, tokens: usize, dim: usize) {
    let turned = scratch.turned;
    // SAFETY: the caller's.
    unsafe {
        if turned > 0 {
            many::score::<A, L>(&mut scratch.many, tile, turned, keys, tokens, dim);
        }
        scores::full::<A, L>(tile.below(turned), keys, tokens, dim);
    }
}

/// # Safety
/// As many float16 as there is room can be read.
#[inline(always)]
unsafe fn halves(from: *const u8, to: &mut [f32]) {
    for (index, number) in to.iter_mut().enumerate() {
        // SAFETY: the caller's.
        *number = f16_to_f32(unsafe { from.cast::<u16>().add(index).read_unaligned() });
    }
}

/// Multiply numbers by what codes are multiplied by; what they make of the codes' minima is returned.
#[inline(always)]
fn fold(from: &[f32], scale: &[f32], minimum: &[f32], to: &mut [f32]) -> f32 {
    let mut bias = [0.0; 16];
    for (index, ((to, from), (scale, minimum))) in to.iter_mut().zip(from).zip(scale.iter().zip(minimum)).enumerate() {
        *to = from * scale;
        bias[index % 16] += from * minimum;
    }
    bias.iter().sum()
}

/// Add one page's values, weighted.
#[inline(always)]
unsafe fn take<A: Words>(layer: &Layer, scratch: &mut Scratch, at: Place, count: usize) {
    let (page, head, dim) = (at.page as usize, at.head, layer.value_dim);
    let weights = scratch.scores[at.offset..].as_ptr();
    let width = scratch.width;
    let ahead = next_part(layer, layer.values, dim, |cold| cold.values, at);
    let mix = Mix { weights, stride: at.stride, rows: count, sums: scratch.sums.as_mut_ptr(), width, ahead };
    // SAFETY: the caller's; offsets as `Layer` says.
    unsafe {
        if at.page < layer.pages {
            let first = (page * layer.kv_heads + head) * layer.block * dim;
            let values = layer.values.cast_const();
            match layer.float {
                Float::F32 => mix::full::<A, AsF32>(mix, values.cast::<f32>().add(first), at.tokens, dim),
                Float::F16 => mix::full::<A, AsF16>(mix, values.cast::<u16>().add(first), at.tokens, dim),
                Float::Bf16 => mix::full::<A, AsBf16>(mix, values.cast::<u16>().add(first), at.tokens, dim),
            }
            return;
        }
        let Some((Cold { values: records, .. }, index)) = layer.record(at.page) else { return };
        let record = records.at(index * layer.kv_heads + head);
        let fields = record.add(records.format.codes());
        let (scale, minimum) = scratch.scales.split_at_mut(layer.block);
        halves(fields, &mut scale[..layer.block]);
        halves(fields.add(2 * layer.block), &mut minimum[..layer.block]);
        for r in 0..count {
            let from = &scratch.scores[r * at.stride + at.offset..][..at.tokens];
            let to = &mut scratch.weights[r * layer.block..][..at.tokens];
            scratch.bias[r] = fold(from, scale, minimum, to);
        }
        let page = &mut scratch.page[..count * width];
        page.fill(0.0);
        let mix = Mix { weights: scratch.weights.as_ptr(), stride: layer.block, sums: page.as_mut_ptr(), ..mix };
        match records.format.bits {
            Bits::Eight => mix::full::<A, AsU8>(mix, record, at.tokens, dim),
            Bits::Four => mix::fours::<A>(mix, record, at.tokens, dim),
        }
        let exponents = std::slice::from_raw_parts(fields.add(4 * layer.block).cast::<i8>(), dim);
        for r in 0..count {
            let bias = scratch.bias[r];
            let (sums, page) = (&mut scratch.sums[r * width..][..dim], &page[r * width..][..dim]);
            for ((sum, part), exponent) in sums.iter_mut().zip(page).zip(exponents) {
                let factor = f32::from_bits(((i32::from(*exponent) + 127) as u32) << 23);
                *sum = A::mul_add(part + bias, factor, *sum);
            }
        }
    }
}
