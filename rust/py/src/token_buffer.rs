//! `TokenBuffer`: a growing run of token ids on the native side.

use kvhybrid_core::{Result as CoreResult, check_tokens, common_prefix};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::buffers::with_tokens;
use crate::ordered::{Guard, Ordered, Rank};

#[pyclass(frozen, module = "kvhybrid._core")]
pub struct TokenBuffer(Ordered<Vec<u32>>);

impl TokenBuffer {
    fn lock(&self) -> PyResult<Guard<'_, Vec<u32>>> {
        self.0.lock()
    }

    pub fn length(&self) -> PyResult<usize> {
        Ok(self.lock()?.len())
    }

    /// Lend the tokens to `work`.
    pub fn with<T>(&self, work: impl FnOnce(&[u32]) -> CoreResult<T>) -> PyResult<CoreResult<T>> {
        Ok(work(&self.lock()?))
    }
}

/// Copy tokens in, so that no two buffers are ever locked at once.
fn copied(tokens: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    with_tokens(tokens, |tokens| {
        check_tokens(tokens, 0)?;
        Ok(tokens.to_vec())
    })
}

#[pymethods]
impl TokenBuffer {
    #[new]
    #[pyo3(signature = (tokens = None))]
    fn new(tokens: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        Ok(Self(Ordered::new(Rank::Tokens, tokens.map_or(Ok(Vec::new()), copied)?)))
    }

    fn __len__(&self) -> PyResult<usize> {
        self.length()
    }

    fn __repr__(&self) -> PyResult<String> {
        Ok(format!("TokenBuffer({} tokens)", self.length()?))
    }

    fn append(&self, tokens: &Bound<'_, PyAny>) -> PyResult<usize> {
        let more = copied(tokens)?;
        let mut own = self.lock()?;
        own.extend_from_slice(&more);
        Ok(own.len())
    }

    fn truncate(&self, length: usize) -> PyResult<()> {
        self.lock()?.truncate(length);
        Ok(())
    }

    #[pyo3(signature = (start = 0, stop = None))]
    fn tobytes<'py>(&self, py: Python<'py>, start: usize, stop: Option<usize>) -> PyResult<Bound<'py, PyBytes>> {
        let tokens = {
            let own = self.lock()?;
            let stop = stop.unwrap_or(own.len());
            let Some(tokens) = own.get(start..stop) else {
                return Err(PyValueError::new_err(format!("[{start}, {stop}) is not within {} tokens", own.len())));
            };
            tokens.to_vec()
        };
        native_bytes(py, &tokens, |token| token.to_ne_bytes())
    }

    fn common_prefix(&self, tokens: &Bound<'_, PyAny>) -> PyResult<usize> {
        if tokens.cast::<Self>().is_ok() {
            let other = copied(tokens)?;
            return Ok(common_prefix(&self.lock()?, &other));
        }
        with_tokens(tokens, |tokens| {
            let compared = self.with(|own| {
                let equal = common_prefix(own, tokens);
                check_tokens(&tokens[equal..], equal)?;
                Ok(equal)
            });
            match compared {
                Ok(equal) => equal.map(Ok),
                Err(poisoned) => Ok(Err(poisoned)),
            }
        })?
    }
}

/// Copy 32-bit items into a `bytes` object.
pub fn native_bytes<'py, T>(
    py: Python<'py>,
    items: &[T],
    convert: impl Fn(&T) -> [u8; 4],
) -> PyResult<Bound<'py, PyBytes>> {
    PyBytes::new_with(py, 4 * items.len(), |bytes| {
        for (target, item) in bytes.chunks_exact_mut(4).zip(items) {
            target.copy_from_slice(&convert(item));
        }
        Ok(())
    })
}
