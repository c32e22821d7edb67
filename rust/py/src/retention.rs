//! What Python says of texts, read into the core's words.

use std::time::Duration;

use kvhybrid_core::Retention;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Microseconds of a time to live. Refuses what is no time.
pub fn microseconds(ttl_s: Option<f64>) -> PyResult<Option<u64>> {
    let Some(seconds) = ttl_s else { return Ok(None) };
    let time = Duration::try_from_secs_f64(seconds).ok().and_then(|time| u64::try_from(time.as_micros()).ok());
    let refused = || PyValueError::new_err(format!("ttl_s must be a number of seconds of at least 0, not {seconds}"));
    time.ok_or_else(refused).map(Some)
}

pub fn retention(priority: i32, ttl_s: Option<f64>, lapses: bool) -> PyResult<Retention> {
    Ok(Retention { priority, ttl: microseconds(ttl_s)?, lapses })
}
