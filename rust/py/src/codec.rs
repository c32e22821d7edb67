//! `PageCodec`: whole pages that lie in tensors, by address, to records of 8 or 4 bits and back.

use kvhybrid_core::kernel::isa::Isa;
use kvhybrid_core::kernel::quant::{Bits, Format, Pages, Part, Work, dequantize, quantize};
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;

use crate::attend::float;
use crate::buffers::with_int32;
use crate::team::with_team;

#[pyclass(frozen, module = "kvhybrid._core")]
pub struct PageCodec {
    part: Part,
    bits: Bits,
}

/// Where full pages lie: address, how many, format (0, 1, 2: float32, float16, bfloat16), and strides in bytes
/// from page to page, head to head, token to token.
type PagesArgument = (usize, usize, u8, (isize, isize, isize));
/// `heads`, `block_size`, `width`.
type Shape = (usize, usize, usize);

/// A call's arguments, checked: what a core's `Work` borrows from.
struct Checked {
    format: Format,
    heads: usize,
    pages: Pages,
    page_ids: Vec<u32>,
    records: *mut u8,
    record_ids: Vec<u32>,
}

// SAFETY: addresses; the caller keeps what lies there alive and its own.
unsafe impl Send for Checked {}

/// Codes of that many bits.
pub fn code_bits(number: u8) -> PyResult<Bits> {
    Bits::of(number).ok_or_else(|| PyValueError::new_err(format!("bits must be 4 or 8, not {number}")))
}

#[pymethods]
impl PageCodec {
    #[new]
    fn new(part: &str, bits: u8) -> PyResult<Self> {
        let part = match part {
            "keys" => Part::Keys,
            "values" => Part::Values,
            _ => return Err(PyValueError::new_err(format!("a page has keys and values, not {part}"))),
        };
        Ok(Self { part, bits: code_bits(bits)? })
    }

    fn record_bytes(&self, block_size: usize, width: usize) -> PyResult<usize> {
        Ok(self.format(block_size, width)?.bytes())
    }

    #[allow(clippy::too_many_arguments)] // one call for many pages: what it needs, as numbers
    #[pyo3(signature = (shape, pages, page_ids, records, record_ids, *, threads = 1, parallel = 0))]
    fn quantize(
        &self,
        py: Python<'_>,
        shape: Shape,
        pages: PagesArgument,
        page_ids: &Bound<'_, PyAny>,
        records: (usize, usize),
        record_ids: &Bound<'_, PyAny>,
        threads: usize,
        parallel: usize,
    ) -> PyResult<Vec<usize>> {
        let checked = self.check(shape, pages, page_ids, records, record_ids)?;
        distinct("record", &checked.record_ids)?;
        Ok(py.detach(move || {
            // SAFETY: the caller's, who keeps pages and records alive and its own; ids were checked.
            let refused = unsafe { with_team(threads, parallel, |team| quantize(&checked.work(), Isa::best(), team)) };
            (0..refused.len()).filter(|i| refused[*i]).collect()
        }))
    }

    #[allow(clippy::too_many_arguments)] // as above
    #[pyo3(signature = (shape, records, record_ids, pages, page_ids, *, threads = 1, parallel = 0))]
    fn dequantize(
        &self,
        py: Python<'_>,
        shape: Shape,
        records: (usize, usize),
        record_ids: &Bound<'_, PyAny>,
        pages: PagesArgument,
        page_ids: &Bound<'_, PyAny>,
        threads: usize,
        parallel: usize,
    ) -> PyResult<()> {
        let checked = self.check(shape, pages, page_ids, records, record_ids)?;
        distinct("page", &checked.page_ids)?;
        py.detach(move || {
            // SAFETY: the caller's, who keeps pages and records alive and its own; ids were checked.
            unsafe { with_team(threads, parallel, |team| dequantize(&checked.work(), Isa::best(), team)) };
        });
        Ok(())
    }
}

impl PageCodec {
    fn format(&self, block: usize, width: usize) -> PyResult<Format> {
        let format = Format { part: self.part, bits: self.bits, block, width };
        if format.is_sound() {
            return Ok(format);
        }
        Err(PyValueError::new_err(format!("pages of {block} tokens of {width} channels cannot be quantized")))
    }

    fn check(
        &self,
        (heads, block, width): Shape,
        (start, count, code, (by_page, by_head, by_token)): PagesArgument,
        page_ids: &Bound<'_, PyAny>,
        (records, record_count): (usize, usize),
        record_ids: &Bound<'_, PyAny>,
    ) -> PyResult<Checked> {
        let float = float(code)?;
        if !start.is_multiple_of(float.size()) {
            return Err(PyValueError::new_err("pages must be aligned to their numbers"));
        }
        let page_ids = ids("page", page_ids, count)?;
        let record_ids = ids("record", record_ids, record_count)?;
        if page_ids.len() != record_ids.len() {
            let (pages, records) = (page_ids.len(), record_ids.len());
            return Err(PyValueError::new_err(format!("{pages} pages and {records} records do not pair")));
        }
        let pages = Pages { start: start as *mut u8, float, strides: [by_page, by_head, by_token] };
        let records = records as *mut u8;
        Ok(Checked { format: self.format(block, width)?, heads, pages, page_ids, records, record_ids })
    }
}

impl Checked {
    fn work(&self) -> Work<'_> {
        Work {
            format: self.format,
            heads: self.heads,
            pages: self.pages,
            page_ids: &self.page_ids,
            records: self.records,
            record_ids: &self.record_ids,
        }
    }
}

/// Copy ids out, every one below `count`.
fn ids(what: &str, buffer: &Bound<'_, PyAny>, count: usize) -> PyResult<Vec<u32>> {
    with_int32(&format!("{what}_ids"), buffer, |ids| {
        ids.iter()
            .map(|id| match u32::try_from(*id) {
                Ok(id) if (id as usize) < count => Ok(id),
                _ => Err(PyIndexError::new_err(format!("{what} {id} is not within {count}"))),
            })
            .collect()
    })
}

/// Refuse to write a place twice: two threads could, at once.
fn distinct(what: &str, ids: &[u32]) -> PyResult<()> {
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(PyValueError::new_err(format!("{what} {} cannot be written twice in one call", pair[0]))),
        None => Ok(()),
    }
}
