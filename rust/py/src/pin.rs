//! `Pin`: a handle that lets go of what a user pinned when it goes.

use std::sync::Arc;

use kvhybrid_core::{Left, PinId};
use pyo3::prelude::*;

use crate::pool::Shared;

#[pyclass(frozen, module = "kvhybrid._core")]
pub struct Pin {
    shared: Arc<Shared>,
    id: PinId,
    num_tokens: usize,
}

impl Pin {
    pub fn new(shared: Arc<Shared>, id: PinId, num_tokens: usize) -> Self {
        Self { shared, id, num_tokens }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.shared.leave(Left::Pin(self.id));
    }
}

#[pymethods]
impl Pin {
    fn __repr__(&self) -> PyResult<String> {
        let state = if self.is_held()? { "" } else { ", ended" };
        Ok(format!("Pin({} tokens{state})", self.num_tokens))
    }

    #[getter]
    fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    #[getter]
    fn is_held(&self) -> PyResult<bool> {
        Ok(self.shared.lock()?.is_pinned(self.id))
    }

    fn release(&self) -> PyResult<()> {
        self.shared.lock()?.unpin(self.id);
        Ok(())
    }
}
