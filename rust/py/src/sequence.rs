//! `Sequence`: a handle that closes its sequence when it goes.

use std::sync::Arc;

use kvhybrid_core::{Left, SequenceId};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::buffers::with_tokens;
use crate::errors::raised;
use crate::pool::Shared;
use crate::retention::retention;
use crate::token_buffer::native_bytes;

#[pyclass(frozen, module = "kvhybrid._core")]
pub struct Sequence {
    pub shared: Arc<Shared>,
    pub id: SequenceId,
    cached: usize,
}

impl Sequence {
    pub fn new(shared: Arc<Shared>, id: SequenceId, cached: usize) -> Self {
        Self { shared, id, cached }
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        self.shared.leave(Left::Sequence(self.id));
    }
}

#[pymethods]
impl Sequence {
    fn __repr__(&self) -> PyResult<String> {
        let pool = self.shared.lock()?;
        let (Ok(length), Ok(pending)) = (pool.length(self.id), pool.pending(self.id)) else {
            return Ok(format!("Sequence({}, closed)", self.id));
        };
        Ok(format!("Sequence({}, {length} tokens, {} cached, {pending} pending)", self.id, self.cached))
    }

    #[getter]
    fn length(&self) -> PyResult<usize> {
        self.shared.lock()?.length(self.id).map_err(raised)
    }

    #[getter]
    fn pending(&self) -> PyResult<usize> {
        self.shared.lock()?.pending(self.id).map_err(raised)
    }

    #[getter]
    fn cached(&self) -> usize {
        self.cached
    }

    #[getter]
    fn num_pages(&self) -> PyResult<usize> {
        Ok(self.shared.lock()?.block_table(self.id).map_err(raised)?.len())
    }

    #[getter]
    fn closed(&self) -> PyResult<bool> {
        Ok(self.shared.lock()?.is_closed(self.id))
    }

    fn append(&self, tokens: &Bound<'_, PyAny>) -> PyResult<()> {
        with_tokens(tokens, |tokens| match self.shared.lock() {
            Ok(mut pool) => pool.append(self.id, tokens).map(Ok),
            Err(poisoned) => Ok(Err(poisoned)),
        })?
    }

    fn tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let tokens = self.shared.lock()?.tokens(self.id).map_err(raised)?;
        native_bytes(py, &tokens, |token| token.to_ne_bytes())
    }

    fn block_table<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let table = self.shared.lock()?.block_table(self.id).map_err(raised)?.to_vec();
        native_bytes(py, &table, |page| page.0.to_ne_bytes())
    }

    fn fork(&self) -> PyResult<Self> {
        let id = self.shared.lock()?.fork(self.id).map_err(raised)?;
        Ok(Self { shared: self.shared.clone(), id, cached: self.cached })
    }

    fn share_up_to(&self, length: usize) -> PyResult<()> {
        self.shared.lock()?.share_up_to(self.id, length).map_err(raised)
    }

    fn require_verification(&self) -> PyResult<()> {
        self.shared.lock()?.require_verification(self.id).map_err(raised)
    }

    fn verify(&self, length: usize) -> PyResult<()> {
        self.shared.lock()?.verify(self.id, length).map_err(raised)
    }

    fn freeze(&self, length: usize) -> PyResult<()> {
        self.shared.lock()?.freeze(self.id, length).map_err(raised)
    }

    #[pyo3(signature = (priority = 0, ttl_s = None, *, lapses = false, start = 0))]
    fn retain(&self, priority: i32, ttl_s: Option<f64>, lapses: bool, start: usize) -> PyResult<()> {
        let retention = retention(priority, ttl_s, lapses)?;
        self.shared.lock()?.retain_sequence(self.id, Some(retention), start).map_err(raised)
    }

    fn truncate(&self, length: usize) -> PyResult<()> {
        self.shared.lock()?.truncate(self.id, length).map_err(raised)
    }

    fn close(&self) -> PyResult<()> {
        self.shared.close(self.id)
    }
}
