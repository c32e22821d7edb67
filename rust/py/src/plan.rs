//! `Plan`: a handle that abandons its plan when it goes unfinished.

use std::sync::Arc;

use kvhybrid_core::Left;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffers::{Room, overlap};
use crate::errors::{ClosedError, raised};
use crate::ordered::{Ordered, Rank};
use crate::pool::Shared;

#[pyclass(frozen, module = "kvhybrid._core")]
pub struct Plan {
    shared: Arc<Shared>,
    open: Ordered<Option<kvhybrid_core::Plan>>,
    num_tokens: usize,
    num_evicted: usize,
    max_pages: usize,
    copies: Vec<(u32, u32)>,
    demotions: Vec<(u32, u32)>,
}

impl Plan {
    pub fn new(shared: Arc<Shared>, plan: kvhybrid_core::Plan) -> Self {
        Self {
            shared,
            num_tokens: plan.num_tokens(),
            num_evicted: plan.num_evicted(),
            max_pages: plan.max_pages(),
            copies: plan.copies().iter().map(|(source, target)| (source.0, target.0)).collect(),
            demotions: plan.demotions().map(|(source, target)| (source.0, target.0)).collect(),
            open: Ordered::new(Rank::Rows, Some(plan)),
        }
    }

    fn take(&self) -> PyResult<kvhybrid_core::Plan> {
        self.open.lock()?.take().ok_or_else(finished)
    }
}

fn finished() -> PyErr {
    ClosedError::new_err("the plan was already committed or abandoned")
}

impl Drop for Plan {
    fn drop(&mut self) {
        if let Some(open) = self.open.get_mut()
            && let Some(plan) = open.take()
        {
            self.shared.leave(Left::Plan(Box::new(plan)));
        }
    }
}

#[pymethods]
impl Plan {
    fn __repr__(&self) -> PyResult<String> {
        let state = if self.open.lock()?.is_some() { "open" } else { "finished" };
        Ok(format!("Plan({} tokens, {} evicted, {state})", self.num_tokens, self.num_evicted))
    }

    #[getter]
    fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    #[getter]
    fn num_evicted(&self) -> usize {
        self.num_evicted
    }

    #[getter]
    fn max_pages(&self) -> usize {
        self.max_pages
    }

    #[getter]
    fn copies(&self) -> Vec<(u32, u32)> {
        self.copies.clone()
    }

    #[getter]
    fn demotions(&self) -> Vec<(u32, u32)> {
        self.demotions.clone()
    }

    fn fill(&self, tables: &Bound<'_, PyAny>, slots: &Bound<'_, PyAny>, lengths: &Bound<'_, PyAny>) -> PyResult<()> {
        let (mut room_1, mut room_2, mut room_3) = (Room::new(), Room::new(), Room::new());
        let mut tables = room_1.writable(tables, "tables", 2)?;
        let mut slots = room_2.writable(slots, "slots", 1)?;
        let mut lengths = room_3.writable(lengths, "lengths", 2)?;
        let width = tables.extent(1);
        if lengths.extent(1) != 2 {
            return Err(PyValueError::new_err(format!("lengths must be 2 wide, not {}", lengths.extent(1))));
        }
        if overlap(&tables, &slots) || overlap(&slots, &lengths) || overlap(&tables, &lengths) {
            return Err(PyValueError::new_err("tables, slots and lengths must not share memory"));
        }
        let mut open = self.open.lock()?;
        let plan = open.as_mut().ok_or_else(finished)?;
        self.shared
            .lock()?
            .fill(plan, tables.int32_mut(), width, slots.int32_mut(), lengths.int32_mut())
            .map_err(raised)
    }

    #[pyo3(signature = (*, written = true))]
    fn commit(&self, written: bool) -> PyResult<()> {
        let plan = self.take()?;
        let mut pool = self.shared.lock()?;
        if written {
            pool.commit(plan);
        } else {
            pool.commit_unwritten(plan);
        }
        Ok(())
    }

    fn moved(&self) -> PyResult<()> {
        let mut open = self.open.lock()?;
        let plan = open.as_mut().ok_or_else(finished)?;
        self.shared.lock()?.moved(plan);
        Ok(())
    }

    fn abandon(&self) -> PyResult<()> {
        let plan = self.take()?;
        self.shared.lock()?.abandon(plan);
        Ok(())
    }

    #[allow(clippy::needless_pass_by_value)] // as Python hands it over
    fn refuse(&self, tried: usize, refused: Vec<usize>) -> PyResult<()> {
        if tried > self.demotions.len() || refused.iter().any(|index| *index >= tried) {
            let count = self.demotions.len();
            return Err(PyValueError::new_err(format!("{refused:?} are not among {tried} of {count} demotions")));
        }
        let plan = self.take()?;
        self.shared.lock()?.refuse(plan, tried, &refused);
        Ok(())
    }
}
