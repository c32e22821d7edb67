//! Whole pages to records of 8 or 4 bits and back; `format` has the bytes.
//!
//! Everything is computed in float32. A page of NaN, of an infinity, or of more than float16 scales is refused and
//! stays what it was.

#![allow(clippy::cast_precision_loss)] // codes and exponents are small
#![allow(clippy::many_single_char_names)] // eight rows of one matrix are a to h
#![allow(clippy::verbose_bit_mask)] // a sign is masked out

mod format;
mod keys;
mod number;
mod outliers;
mod scales;
mod values;

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};

pub use format::{Bits, Format, LEAST_BLOCK, Part};
use number::{Brain, Half, Number, Rows};

use super::half::Float;
use super::isa::{Body, Isa};
use super::lanes::Words;
use super::team::Team;

/// Full pages of one layer's keys or values, `[pages][heads][block][width]`, by strides in bytes; a token's
/// channels are neighbours.
#[derive(Clone, Copy, Debug)]
pub struct Pages {
    /// The first number.
    pub start: *mut u8,
    /// Numbers of what.
    pub float: Float,
    /// From page to page, head to head, token to token.
    pub strides: [isize; 3],
}

/// What goes where: `pages[page_ids[i]]` and `records[record_ids[i]]`, records `[records][heads][bytes]`.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// Of the records.
    pub format: Format,
    /// Heads of K and V.
    pub heads: usize,
    /// The full pages.
    pub pages: Pages,
    /// Which of them.
    pub page_ids: &'a [u32],
    /// The first byte of the first record.
    pub records: *mut u8,
    /// Which of them.
    pub record_ids: &'a [u32],
}

// SAFETY: addresses; `quantize` and `dequantize` say who may call them.
unsafe impl Sync for Work<'_> {}

/// A part of the work: neighbouring heads, counted over all pages.
struct Heads<'a> {
    work: &'a Work<'a>,
    first: usize,
    last: usize,
    /// Which pages are refused, when pages are quantized; None to dequantize.
    refused: Option<&'a [AtomicBool]>,
}

/// Heads that a thread takes at once: enough to make its room worth while, few enough to share out.
const HEADS: usize = 8;

/// Write the records of pages; which of the pages were refused, and then their records mean nothing.
///
/// # Safety
/// The format is sound, every named page can be read and every named record written, no record is named twice,
/// and nobody else writes the pages or touches the records meanwhile.
pub unsafe fn quantize(work: &Work<'_>, isa: Isa, team: &dyn Team) -> Vec<bool> {
    let refused: Vec<AtomicBool> = work.page_ids.iter().map(|_| AtomicBool::new(false)).collect();
    share(work, isa, team, Some(&refused));
    refused.into_iter().map(AtomicBool::into_inner).collect()
}

/// Write the numbers of records to pages.
///
/// # Safety
/// The format is sound, every named record can be read and every named page written, no page is named twice,
/// and nobody else writes the records or touches the pages meanwhile.
pub unsafe fn dequantize(work: &Work<'_>, isa: Isa, team: &dyn Team) {
    share(work, isa, team, None);
}

fn share(work: &Work<'_>, isa: Isa, team: &dyn Team, refused: Option<&[AtomicBool]>) {
    assert!(work.format.is_sound() && work.page_ids.len() == work.record_ids.len());
    let total = work.page_ids.len() * work.heads;
    let each = HEADS.min(total.div_ceil(team.size())).max(1);
    team.run(total.div_ceil(each), &|part| {
        let first = part * each;
        isa.run(Heads { work, first, last: total.min(first + each), refused });
    });
}

impl Body for Heads<'_> {
    type Out = ();

    #[inline(always)]
    fn run<A: Words>(self) {
        match self.work.pages.float {
            Float::F32 => self.convert::<A, f32>(),
            Float::F16 => self.convert::<A, Half>(),
            Float::Bf16 => self.convert::<A, Brain>(),
        }
    }
}

impl Heads<'_> {
    #[inline(always)]
    fn convert<A: Words, N: Number>(self) {
        match self.work.format.part {
            Part::Keys => self.each::<A, N, keys::Room<N>>(),
            Part::Values => self.each::<A, N, values::Room<N>>(),
        }
    }

    #[inline(always)]
    fn each<A: Words, N: Number, R: Room<N>>(self) {
        let Work { format, heads, pages, page_ids, records, record_ids } = *self.work;
        let bytes = format.bytes();
        let mut room = R::new::<A>(&format);
        for unit in self.first..self.last {
            let (index, head) = (unit / heads, unit % heads);
            let [by_page, by_head, stride] = pages.strides;
            let offset = page_ids[index] as isize * by_page + head as isize * by_head;
            // SAFETY: the caller's: the page is there, and this unit's alone where it is written.
            let page = Rows { start: unsafe { pages.start.offset(offset) }.cast::<N>(), stride };
            // SAFETY: likewise.
            let record = unsafe { records.add((record_ids[index] as usize * heads + head) * bytes) };
            if let Some(refused) = self.refused {
                // SAFETY: the record is this unit's alone; the room is the format's and this instruction set's.
                let done = unsafe { room.quantize::<A>(&format, page, std::slice::from_raw_parts_mut(record, bytes)) };
                if !done {
                    refused[index].store(true, Ordering::Relaxed);
                }
            } else {
                // SAFETY: nobody writes the record; the room likewise.
                unsafe { room.dequantize::<A>(&format, std::slice::from_raw_parts(record, bytes), page) };
            }
        }
    }
}

/// Room to work in, kept from head to head, for one format and one instruction set.
trait Room<N: Number>: Sized {
    fn new<A: Words>(format: &Format) -> Self;

    /// Write a page's record; false when it holds what cannot be quantized.
    ///
    /// # Safety
    /// The page can be read; record and room are of the format, and the room of the instruction set.
    unsafe fn quantize<A: Words>(&mut self, format: &Format, page: Rows<N>, record: &mut [u8]) -> bool;

    /// Write the numbers of a record.
    ///
    /// # Safety
    /// The page can be written; record and room are of the format, and the room of the instruction set.
    unsafe fn dequantize<A: Words>(&mut self, format: &Format, record: &[u8], page: Rows<N>);
}
