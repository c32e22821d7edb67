//! Bindings of the core: convert, detach, map errors, nothing else.
//!
//! Every class is frozen with its lock inside, and none holds a Python object, so handles cannot
//! form cycles and dropping one gives back what it holds at once. `python/kvhybrid/_core.pyi` is the
//! contract, docstrings included.

mod attend;
mod batch;
mod buffers;
mod codec;
mod errors;
mod held;
mod memory;
mod ordered;
mod pin;
mod plan;
mod pool;
mod replay;
mod retention;
mod sequence;
mod team;
mod token_buffer;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
mod _core {
    use super::{Bound, PyModule, PyModuleMethods, PyResult};

    #[pymodule_export]
    use crate::attend::{PageKernel, StepRows};
    #[pymodule_export]
    use crate::batch::Batch;
    #[pymodule_export]
    use crate::codec::PageCodec;
    #[pymodule_export]
    use crate::errors::{CapacityError, ClosedError, KVHybridError};
    #[pymodule_export]
    use crate::held::{holds, read_at, sums_at};
    #[pymodule_export]
    use crate::pin::Pin;
    #[pymodule_export]
    use crate::plan::Plan;
    #[pymodule_export]
    use crate::pool::PagePool;
    #[pymodule_export]
    use crate::replay::{Replay, Trace};
    #[pymodule_export]
    use crate::sequence::Sequence;
    #[pymodule_export]
    use crate::token_buffer::TokenBuffer;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
