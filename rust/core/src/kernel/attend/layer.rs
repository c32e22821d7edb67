//! Where one layer's pages lie, and what a query and its answer look like.

use crate::kernel::half::Float;
use crate::kernel::quant::{Bits, Format, Part};

/// Keys or values of quantized pages, `[pages][kv_heads][record]`.
#[derive(Clone, Copy, Debug)]
pub struct Records {
    /// The first byte.
    pub data: *const u8,
    /// What a record's bytes mean.
    pub format: Format,
}

/// Quantized pages of one format.
#[derive(Clone, Copy, Debug)]
pub struct Cold {
    /// Their keys.
    pub keys: Records,
    /// Their values.
    pub values: Records,
    /// How many pages.
    pub pages: u32,
}

impl Records {
    /// Where the record of that number lies.
    #[inline(always)]
    pub(super) fn at(&self, record: usize) -> *const u8 {
        self.data.wrapping_add(record * self.format.bytes())
    }
}

/// One layer's pages: full ones, `[pages][kv_heads][block][dim]`, have the first ids, quantized ones the next, one
/// format behind the other.
#[derive(Clone, Copy, Debug)]
pub struct Layer {
    /// Keys of full pages.
    pub keys: *mut u8,
    /// Values of full pages.
    pub values: *mut u8,
    /// Full pages.
    pub pages: u32,
    /// Their numbers.
    pub float: Float,
    /// Heads of K and V.
    pub kv_heads: usize,
    /// Tokens a page.
    pub block: usize,
    /// Width of a key.
    pub dim: usize,
    /// Width of a value.
    pub value_dim: usize,
    /// Quantized pages, of two formats at most.
    pub cold: [Option<Cold>; 2],
}

// SAFETY: addresses; whoever reads or writes through them says why that is sound.
unsafe impl Send for Layer {}
// SAFETY: likewise.
unsafe impl Sync for Layer {}

impl Layer {
    /// Quantized pages of this layer's shape.
    pub fn quantized(&self, keys: *const u8, values: *const u8, pages: u32, bits: Bits) -> Cold {
        let records = |data, part, width| Records { data, format: Format { part, bits, block: self.block, width } };
        let (keys, values) = (records(keys, Part::Keys, self.dim), records(values, Part::Values, self.value_dim));
        Cold { keys, values, pages }
    }

    /// True when a page of that id is here.
    pub fn has(&self, page: u32) -> bool {
        page < self.pages || self.record(page).is_some()
    }

    /// The quantized pages that a page is one of, and which of them it is.
    #[inline(always)]
    pub(super) fn record(&self, page: u32) -> Option<(Cold, usize)> {
        let mut index = page.checked_sub(self.pages)?;
        for cold in self.cold.iter().flatten() {
            if index < cold.pages {
                return Some((*cold, index as usize));
            }
            index -= cold.pages;
        }
        None
    }
}

/// The queries of a step, `[rows][heads][tokens][dim]`, by strides in numbers; a query's own numbers are neighbours.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// The first number.
    pub data: *const u8,
    /// Numbers of what.
    pub float: Float,
    /// From row to row, head to head, token to token.
    pub strides: [usize; 3],
    /// Query heads, a multiple of the layer's.
    pub heads: usize,
}

/// The answers, `[rows][tokens][heads][value_dim]`, in the queries' format, by strides in numbers.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// The first number.
    pub data: *mut u8,
    /// From row to row, head to head, token to token.
    pub strides: [usize; 3],
}

// SAFETY: as `Layer`.
unsafe impl Sync for Query {}
// SAFETY: likewise.
unsafe impl Sync for Answer {}

/// How scores are taken.
#[derive(Clone, Copy, Debug)]
pub struct Scoring<'a> {
    /// What products are multiplied by.
    pub scale: f32,
    /// A token sees itself and the `window - 1` before it.
    pub window: Option<u32>,
    /// `cap * tanh(score / cap)` instead of a score (Gemma-2).
    pub soft_cap: Option<f32>,
    /// A score a query head that takes weight and gives nothing (GPT-OSS's attention sinks).
    pub sinks: Option<&'a [f32]>,
}
