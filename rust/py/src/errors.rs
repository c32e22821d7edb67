//! The exceptions, and how the core's errors become them.

use kvhybrid_core::Error;
use pyo3::create_exception;
use pyo3::exceptions::{PyAssertionError, PyException, PyValueError};
use pyo3::prelude::*;

create_exception!(kvhybrid, KVHybridError, PyException, "Base of every error that kvhybrid raises on its own account.");
create_exception!(
    kvhybrid,
    CapacityError,
    KVHybridError,
    "The pool cannot hold what was asked, even after evicting all that may leave."
);
create_exception!(
    kvhybrid,
    ClosedError,
    KVHybridError,
    "The handle was closed, or its plan was already committed or abandoned."
);

/// The core's error as an exception. A function, for neither type is ours to implement `From` on.
pub fn raised(error: Error) -> PyErr {
    match error {
        Error::Capacity { .. } | Error::Pinned { .. } => CapacityError::new_err(error.to_string()),
        Error::Closed | Error::ClosedRow(_) => ClosedError::new_err(error.to_string()),
        Error::Broken(what) => PyAssertionError::new_err(what),
        _ => PyValueError::new_err(error.to_string()),
    }
}

/// What a lock says whose holder panicked: what it guards can no longer be trusted.
pub fn poisoned<E>(_: E) -> PyErr {
    ClosedError::new_err("an earlier call panicked inside the core; this object can no longer be used")
}
