//! `StepRows` and `PageKernel`: attention over pages that lie in tensors, by address.

use kvhybrid_core::kernel::attend::{Answer, Cold, Layer, New, Query, Row, Rows, Scoring, append, attend};
use kvhybrid_core::kernel::half::Float;
use kvhybrid_core::kernel::isa::Isa;
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;

use crate::buffers::with_int32;
use crate::codec::code_bits;
use crate::team::with_team;

#[pyclass(frozen, module = "kvhybrid._core")]
pub struct StepRows {
    rows: Rows,
    last_page: u32,
    block_size: usize,
}

#[pymethods]
impl StepRows {
    #[new]
    fn new(
        tables: &Bound<'_, PyAny>,
        lengths: &Bound<'_, PyAny>,
        places: &Bound<'_, PyAny>,
        block_size: usize,
    ) -> PyResult<Self> {
        let lengths = with_int32("lengths", lengths, |it| Ok(it.to_vec()))?;
        let places = with_int32("places", places, |it| Ok(it.to_vec()))?;
        let tables = with_int32("tables", tables, |it| Ok(it.to_vec()))?;
        let count = lengths.len() / 2;
        let wrong = || PyValueError::new_err("tables, lengths and places do not describe the same rows");
        if count == 0 || lengths.len() != 2 * count || places.len() != lengths.len() || tables.len() % count != 0 {
            return Err(wrong());
        }
        let number =
            |value: i32| u32::try_from(value).map_err(|_| PyValueError::new_err(format!("{value} is below 0")));
        let rows = (0..count)
            .map(|row| {
                Ok(Row {
                    row: number(places[2 * row])? as usize,
                    column: number(places[2 * row + 1])? as usize,
                    past: number(lengths[2 * row])?,
                    count: number(lengths[2 * row + 1])?,
                })
            })
            .collect::<PyResult<Vec<_>>>()?;
        // Behind a row's last page a table holds anything; no page has such an id.
        let ids = tables.iter().map(|page| page.cast_unsigned()).collect();
        if !block_size.is_power_of_two() {
            return Err(PyValueError::new_err(format!("block_size must be a power of two, not {block_size}")));
        }
        let rows = Rows::new(rows, ids, tables.len() / count, block_size).ok_or_else(wrong)?;
        let last_page = rows.last_page(block_size).ok_or_else(wrong)?;
        Ok(Self { rows, last_page, block_size })
    }
}

#[pyclass(frozen, module = "kvhybrid._core")]
pub struct PageKernel {
    layers: Vec<Layer>,
    isa: Isa,
}

/// A format by its number.
pub fn float(code: u8) -> PyResult<Float> {
    match code {
        0 => Ok(Float::F32),
        1 => Ok(Float::F16),
        2 => Ok(Float::Bf16),
        _ => Err(PyValueError::new_err(format!("float must be 0, 1 or 2, not {code}"))),
    }
}

/// Addresses of keys and of values, and how many pages lie there.
type Pool = (usize, usize, u32);
/// `kv_heads`, `block_size`, `head_dim`, `value_head_dim`.
type Shape = (usize, usize, usize, usize);
/// A layer: full pages, their format (0, 1, 2: float32, float16, bfloat16), shape; quantized pages and their bits,
/// of two formats at most.
type LayerArguments = (Pool, u8, Shape, Vec<(Pool, u8)>);

#[pymethods]
impl PageKernel {
    #[new]
    #[pyo3(signature = (layers, *, isa = None))]
    fn new(layers: Vec<LayerArguments>, isa: Option<&str>) -> PyResult<Self> {
        let isa = match isa {
            None => Isa::best(),
            Some(name) => Isa::available()
                .find(|isa| isa_name(*isa) == name)
                .ok_or_else(|| PyValueError::new_err(format!("this machine has no {name}")))?,
        };
        let layers = layers
            .into_iter()
            .map(|((keys, values, pages), code, (kv_heads, block, dim, value_dim), cold)| {
                if kv_heads == 0 || dim == 0 || value_dim == 0 || !block.is_power_of_two() {
                    return Err(PyValueError::new_err("a layer without heads, widths or a block size"));
                }
                let (keys, values) = (keys as *mut u8, values as *mut u8);
                let float = float(code)?;
                let full = Layer { keys, values, pages, float, kv_heads, block, dim, value_dim, cold: [None; 2] };
                Ok(Layer { cold: records(&full, cold)?, ..full })
            })
            .collect::<PyResult<Vec<_>>>()?;
        Ok(Self { layers, isa })
    }

    #[getter]
    fn isa(&self) -> &'static str {
        isa_name(self.isa)
    }

    #[staticmethod]
    fn available() -> Vec<&'static str> {
        Isa::available().map(isa_name).collect()
    }

    #[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // one call a layer: what it needs, as numbers
    #[pyo3(signature = (layer, rows, float_code, heads, query, answer, scale, *, window = None, soft_cap = None, sinks = None, new = None, threads = 1, parallel = 0))]
    fn attend(
        &self,
        py: Python<'_>,
        layer: usize,
        rows: &StepRows,
        float_code: u8,
        heads: usize,
        query: (usize, usize, usize, usize),
        answer: (usize, usize, usize, usize),
        scale: f32,
        window: Option<u32>,
        soft_cap: Option<f32>,
        sinks: Option<Vec<f32>>,
        new: Option<(Strided, Strided)>,
        threads: usize,
        parallel: usize,
    ) -> PyResult<()> {
        let layer = self.layers.get(layer).ok_or_else(|| PyIndexError::new_err("no such layer"))?;
        if rows.block_size != layer.block || !layer.has(rows.last_page) {
            return Err(PyValueError::new_err(format!("page {} is none of the layer's", rows.last_page)));
        }
        if heads == 0
            || !heads.is_multiple_of(layer.kv_heads)
            || sinks.as_ref().is_some_and(|sinks| sinks.len() != heads)
        {
            return Err(PyValueError::new_err(format!("{heads} query heads over {} heads of K", layer.kv_heads)));
        }
        let float = float(float_code)?;
        let scoring = Scoring { scale, window, soft_cap, sinks: sinks.as_deref() };
        let (isa, rows) = (self.isa, &rows.rows);
        py.detach(move || {
            let query = Query { data: query.0 as *const u8, float, strides: [query.1, query.2, query.3], heads };
            let answer = Answer { data: answer.0 as *mut u8, strides: [answer.1, answer.2, answer.3] };
            if let Some((keys, values)) = new {
                let [keys, values] = [keys, values]
                    .map(|(data, row, head, token)| New { data: data as *const u8, strides: [row, head, token] });
                // SAFETY: the caller keeps the tensors behind these addresses, of these shapes, alive and its own.
                unsafe { append(layer, rows, &keys, &values) }.map_err(|page| {
                    PyValueError::new_err(format!("page {page} is quantized, and cannot be written"))
                })?;
            }
            // SAFETY: likewise; the pages were checked above.
            unsafe {
                with_team(threads, parallel, |team| attend(isa, team, layer, rows, &query, &answer, &scoring));
            }
            Ok(())
        })
    }
}

/// The layer's quantized pages, one format behind the other.
fn records(layer: &Layer, found: Vec<(Pool, u8)>) -> PyResult<[Option<Cold>; 2]> {
    if found.len() > 2 {
        return Err(PyValueError::new_err(format!("a layer has records of two formats at most, not {}", found.len())));
    }
    if !found.is_empty() && !layer.block.is_multiple_of(16) {
        return Err(PyValueError::new_err("quantized pages hold at least 16 tokens"));
    }
    let mut cold = [None; 2];
    for (place, ((keys, values, pages), bits)) in cold.iter_mut().zip(found) {
        *place = Some(layer.quantized(keys as *const u8, values as *const u8, pages, code_bits(bits)?));
    }
    Ok(cold)
}

/// An address, and strides in numbers from row to row, head to head and token to token.
type Strided = (usize, usize, usize, usize);

fn isa_name(isa: Isa) -> &'static str {
    match isa {
        Isa::Portable => "portable",
        Isa::Avx2 => "avx2",
        Isa::Avx512 => "avx512",
        Isa::Avx512Bf16 => "avx512_bf16",
    }
}
