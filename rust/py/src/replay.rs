//! `Trace` and `Replay`: a recorded workload on its way through a pool of its own.

use std::sync::{Arc, Mutex};

use kvhybrid_core::{Adaptive, Arrival, Pool};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::buffers::with_int64;
use crate::errors::{poisoned, raised};
use crate::pool::{rule, set_policy};

#[pyclass(frozen, module = "kvhybrid._core")]
pub struct Trace(Mutex<Arc<kvhybrid_core::Trace>>);

impl Trace {
    fn shared(&self) -> PyResult<Arc<kvhybrid_core::Trace>> {
        Ok(self.0.lock().map_err(poisoned)?.clone())
    }
}

#[pymethods]
impl Trace {
    #[new]
    #[pyo3(signature = (block_tokens, *, join = 1, full_blocks_only = false))]
    fn new(block_tokens: u32, join: usize, full_blocks_only: bool) -> PyResult<Self> {
        if block_tokens == 0 || join == 0 {
            return Err(PyValueError::new_err(format!(
                "block_tokens and join must be at least 1, not {block_tokens} and {join}"
            )));
        }
        Ok(Self(Mutex::new(Arc::new(kvhybrid_core::Trace::new(block_tokens, join, full_blocks_only)))))
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(self.shared()?.num_requests())
    }

    #[getter]
    fn num_references(&self) -> PyResult<usize> {
        Ok(self.shared()?.num_references())
    }

    #[getter]
    fn num_unique(&self) -> PyResult<usize> {
        Ok(self.shared()?.num_unique())
    }

    #[getter]
    fn block_tokens(&self) -> PyResult<usize> {
        Ok(self.shared()?.block_tokens())
    }

    fn extend(&self, requests: &Bound<'_, PyAny>, runs: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut trace = self.0.lock().map_err(poisoned)?;
        let trace =
            Arc::get_mut(&mut trace).ok_or_else(|| PyRuntimeError::new_err("a trace that is replayed is complete"))?;
        with_int64("requests", requests, |requests| {
            with_int64("runs", runs, |mut runs| {
                if !requests.len().is_multiple_of(4) {
                    return Err(PyValueError::new_err(format!("{} numbers are no rows of 4", requests.len())));
                }
                for (index, row) in requests.chunks_exact(4).enumerate() {
                    let refuse = || PyValueError::new_err(format!("request {index}: no request: {row:?}"));
                    let arrival = Arrival {
                        time_ms: u64::try_from(row[0]).map_err(|_| refuse())?,
                        prompt: u32::try_from(row[1]).map_err(|_| refuse())?,
                        output: u32::try_from(row[2]).map_err(|_| refuse())?,
                    };
                    let count = usize::try_from(row[3]).map_err(|_| refuse())?;
                    let (own, rest) = runs.split_at_checked(count).ok_or_else(refuse)?;
                    runs = rest;
                    trace
                        .push(index, arrival, own)
                        .map_err(|error| PyValueError::new_err(format!("request {}: {error}", error.index)))?;
                }
                Ok(())
            })
        })
    }
}

#[pyclass(frozen, module = "kvhybrid._core")]
pub struct Replay {
    trace: Arc<kvhybrid_core::Trace>,
    replay: Mutex<kvhybrid_core::Replay>,
}

#[pymethods]
impl Replay {
    #[new]
    #[pyo3(signature = (trace, num_blocks, *, policy = "lru", seed = 0))]
    fn new(trace: &Bound<'_, Trace>, num_blocks: usize, policy: &str, seed: u64) -> PyResult<Self> {
        let trace = trace.get().shared()?;
        let mut pool = Pool::new(num_blocks, 1, false).map_err(raised)?;
        let token_weight = u32::try_from(trace.block_tokens()).unwrap_or(u32::MAX);
        let options = Adaptive { seed: Some(seed), token_weight, learns_at_once: true, is_unguarded: false };
        set_policy(&mut pool, policy, options)?;
        Ok(Self { trace, replay: Mutex::new(kvhybrid_core::Replay::new(pool)) })
    }

    fn rule<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let found = self.replay.lock().map_err(poisoned)?.pool().rule();
        rule(py, found)
    }

    fn advance(&self, py: Python<'_>, requests: usize) -> PyResult<usize> {
        py.detach(|| {
            let mut replay = self.replay.lock().map_err(poisoned)?;
            replay.advance(&self.trace, requests).map_err(raised)
        })
    }

    #[getter]
    fn hits(&self) -> PyResult<u64> {
        Ok(self.replay.lock().map_err(poisoned)?.hits())
    }

    #[getter]
    fn references(&self) -> PyResult<u64> {
        Ok(self.replay.lock().map_err(poisoned)?.references())
    }
}
