//! `Batch`: rows of sequences that step together. It names them and does not keep them alive.

use std::sync::Arc;

use kvhybrid_core::SequenceId;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffers::{with_int32, with_tokens};
use crate::errors::raised;
use crate::ordered::{Guard, Ordered, Rank};
use crate::plan::Plan;
use crate::pool::{PagePool, Shared};
use crate::sequence::Sequence;

#[pyclass(frozen, module = "kvhybrid._core")]
pub struct Batch {
    shared: Arc<Shared>,
    rows: Ordered<Vec<SequenceId>>,
}

impl Batch {
    fn rows(&self) -> PyResult<Guard<'_, Vec<SequenceId>>> {
        self.rows.lock()
    }

    fn reserve(&self, counts: Option<&[i32]>, tokens: Option<&[u32]>) -> PyResult<kvhybrid_core::Result<Plan>> {
        let rows = self.rows()?;
        let plan = self.shared.lock()?.plan(&rows, counts, tokens);
        Ok(plan.map(|plan| Plan::new(self.shared.clone(), plan)))
    }
}

#[pymethods]
impl Batch {
    #[new]
    #[pyo3(signature = (pool, sequences = None))]
    fn new(pool: &Bound<'_, PagePool>, sequences: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let batch = Self { shared: pool.get().shared.clone(), rows: Ordered::new(Rank::Rows, Vec::new()) };
        if let Some(sequences) = sequences {
            for sequence in sequences.try_iter()? {
                batch.add(sequence?.cast::<Sequence>()?)?;
            }
        }
        Ok(batch)
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(self.rows()?.len())
    }

    fn __repr__(&self) -> PyResult<String> {
        Ok(format!("Batch({} rows)", self.rows()?.len()))
    }

    fn add(&self, sequence: &Bound<'_, Sequence>) -> PyResult<usize> {
        let sequence = sequence.get();
        if !Arc::ptr_eq(&self.shared, &sequence.shared) {
            return Err(PyValueError::new_err(format!("sequence {} belongs to another pool", sequence.id)));
        }
        let mut rows = self.rows()?;
        if let Some(row) = rows.iter().position(|row| *row == sequence.id) {
            return Err(PyValueError::new_err(format!("sequence {} is already in row {row}", sequence.id)));
        }
        rows.push(sequence.id);
        Ok(rows.len() - 1)
    }

    fn remove(&self, sequence: &Bound<'_, Sequence>) -> PyResult<()> {
        let id = sequence.get().id;
        let mut rows = self.rows()?;
        let Some(row) = rows.iter().position(|row| *row == id) else {
            return Err(PyValueError::new_err(format!("sequence {id} is in none of the {} rows", rows.len())));
        };
        rows.remove(row);
        Ok(())
    }

    #[pyo3(signature = (counts = None, *, tokens = None))]
    fn plan(&self, counts: Option<&Bound<'_, PyAny>>, tokens: Option<&Bound<'_, PyAny>>) -> PyResult<Plan> {
        let with_counts = |counts: Option<&[i32]>| match tokens {
            None => self.reserve(counts, None)?.map_err(raised),
            Some(tokens) => with_tokens(tokens, |tokens| match self.reserve(counts, Some(tokens)) {
                Ok(plan) => plan.map(Ok),
                Err(poisoned) => Ok(Err(poisoned)),
            })?,
        };
        match counts {
            None => with_counts(None),
            Some(counts) => with_int32("counts", counts, |counts| with_counts(Some(counts))),
        }
    }
}
