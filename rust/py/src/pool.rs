//! `PagePool`, and the lock that its sequences, batches and plans share.

use std::sync::{Arc, Mutex, MutexGuard};

use kvhybrid_core::{Namespace, OpenOptions, Pool};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::buffers::with_tokens;
use crate::errors::{poisoned, raised};
use crate::plan::Plan;
use crate::sequence::Sequence;

/// The core behind its lock. It is held for bookkeeping only, and nobody attaches while holding it.
pub struct Shared(Mutex<Pool>);

impl Shared {
    pub fn lock(&self) -> PyResult<MutexGuard<'_, Pool>> {
        self.0.lock().map_err(poisoned)
    }

    /// The pool for a handle that is being dropped: nothing is left to do in a poisoned one.
    pub fn lock_to_drop(&self) -> Option<MutexGuard<'_, Pool>> {
        self.0.lock().ok()
    }
}

#[pyclass(frozen, module = "kvhybrid._core")]
pub struct PagePool {
    pub shared: Arc<Shared>,
    num_pages: usize,
    num_quantized: usize,
    block_size: usize,
}

#[pymethods]
impl PagePool {
    #[new]
    #[pyo3(signature = (num_pages, block_size, *, num_quantized = 0, keep_tails = true))]
    fn new(num_pages: usize, block_size: usize, num_quantized: usize, keep_tails: bool) -> PyResult<Self> {
        let pool = Pool::with_quantized(num_pages, num_quantized, block_size, keep_tails).map_err(raised)?;
        let num_pages = pool.num_pages();
        Ok(Self { shared: Arc::new(Shared(Mutex::new(pool))), num_pages, num_quantized, block_size })
    }

    fn __repr__(&self) -> PyResult<String> {
        let pool = self.shared.lock()?;
        Ok(format!(
            "PagePool({} pages of {} tokens, {} free, {} evictable)",
            self.num_pages,
            self.block_size,
            pool.num_free(),
            pool.num_evictable()
        ))
    }

    #[getter]
    fn num_pages(&self) -> usize {
        self.num_pages
    }

    #[getter]
    fn num_quantized(&self) -> usize {
        self.num_quantized
    }

    #[getter]
    fn block_size(&self) -> usize {
        self.block_size
    }

    #[getter]
    fn num_free(&self) -> PyResult<usize> {
        Ok(self.shared.lock()?.num_free())
    }

    #[getter]
    fn num_free_quantized(&self) -> PyResult<usize> {
        Ok(self.shared.lock()?.num_free_quantized())
    }

    #[getter]
    fn num_evictable(&self) -> PyResult<usize> {
        Ok(self.shared.lock()?.num_evictable())
    }

    #[pyo3(name = "match", signature = (tokens, namespace = 0))]
    fn matched(&self, tokens: &Bound<'_, PyAny>, namespace: u64) -> PyResult<usize> {
        with_tokens(tokens, |tokens| match self.shared.lock() {
            Ok(pool) => pool.matched(Namespace(namespace), tokens).map(Ok),
            Err(poisoned) => Ok(Err(poisoned)),
        })?
    }

    #[pyo3(signature = (tokens, namespace = 0, *, reuse = true, share = true, align = 1))]
    fn open(
        &self,
        tokens: &Bound<'_, PyAny>,
        namespace: u64,
        reuse: bool,
        share: bool,
        align: usize,
    ) -> PyResult<Sequence> {
        let options = OpenOptions { namespace: Namespace(namespace), reuse, share, align };
        let opened = with_tokens(tokens, |tokens| match self.shared.lock() {
            Ok(mut pool) => pool.open(tokens, options).map(Ok),
            Err(poisoned) => Ok(Err(poisoned)),
        })?;
        let (id, cached) = opened?;
        Ok(Sequence::new(self.shared.clone(), id, cached))
    }

    fn demote(&self, num_pages: usize) -> PyResult<Plan> {
        let plan = self.shared.lock()?.plan_demotion(num_pages).map_err(raised)?;
        Ok(Plan::new(self.shared.clone(), plan))
    }

    fn evict(&self, num_pages: usize) -> PyResult<usize> {
        Ok(self.shared.lock()?.evict(num_pages))
    }

    fn drop(&self, namespace: u64) -> PyResult<usize> {
        Ok(self.shared.lock()?.drop_namespace(Namespace(namespace)))
    }

    fn statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let statistics = self.shared.lock()?.statistics();
        let items = PyDict::new(py);
        for (name, value) in statistics.items() {
            items.set_item(name, value)?;
        }
        Ok(items)
    }

    fn bookkeeping_bytes(&self) -> PyResult<usize> {
        Ok(self.shared.lock()?.bytes())
    }

    fn check(&self) -> PyResult<()> {
        self.shared.lock()?.check().map_err(raised)
    }
}
