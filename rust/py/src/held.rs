//! Whether a model is what it was: what it holds by identity, numbers in its weights by their bytes.
//!
//! Asked before every step, when the pass before has left nothing of it in the processor's caches: what counts is how
//! little of it is looked at.

use pyo3::exceptions::PyValueError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::critical_section::with_critical_section;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};

use crate::buffers::with_int64;

/// Whether each owner's attributes `names` are these dictionaries, and hold `values`, in order, and nothing else.
#[pyfunction]
pub fn holds(
    owners: &Bound<'_, PyList>,
    names: &Bound<'_, PyTuple>,
    dicts: &Bound<'_, PyList>,
    values: &Bound<'_, PyList>,
) -> PyResult<bool> {
    if dicts.len() != owners.len() * names.len() {
        let (found, owners, names) = (dicts.len(), owners.len(), names.len());
        return Err(PyValueError::new_err(format!("{found} dictionaries for {names} names of {owners} owners")));
    }
    touch(owners);
    touch(dicts);
    let names: Vec<_> = names.iter().collect();
    let mut known = dicts.iter();
    for owner in owners.iter() {
        // SAFETY: the object is alive and we are attached; this is a dictionary, or null with an error set.
        let own = unsafe { ffi::PyObject_GenericGetDict(owner.as_ptr(), std::ptr::null_mut()) };
        // SAFETY: the reference is ours, or null.
        let own = unsafe { Bound::from_owned_ptr_or_err(owner.py(), own) }?;
        for (name, dict) in names.iter().zip(&mut known) {
            // SAFETY: all are alive and we are attached. What is found is compared, and not looked at.
            if unsafe { ffi::PyDict_GetItemWithError(own.as_ptr(), name.as_ptr()) } != dict.as_ptr() {
                return PyErr::take(owner.py()).map_or(Ok(false), Err);
            }
        }
    }
    let mut known = values.iter();
    for dict in dicts.iter() {
        let dict = dict.cast_into::<PyDict>()?;
        if dict.is_empty() {
            continue; // most of them, and then there is nothing behind it to look at
        }
        let (mut at, mut value) = (0, std::ptr::null_mut());
        let mut is_same = true;
        // Without a global lock, another thread may write to the dictionary.
        with_critical_section(&dict, || {
            let at = &raw mut at;
            let found = &raw mut value;
            // SAFETY: we are attached, and nothing here changes the dictionary. Not through its iterator: that takes
            // a reference to each value, and so waits for the memory of every one.
            while is_same && unsafe { ffi::PyDict_Next(dict.as_ptr(), at, std::ptr::null_mut(), found) } != 0 {
                // SAFETY: the call above has written it.
                let value = unsafe { *found };
                is_same = known.next().is_some_and(|known| known.as_ptr() == value);
            }
        });
        if !is_same {
            return Ok(false);
        }
    }
    Ok(known.next().is_none())
}

/// Have the beginnings of these objects fetched from memory all at once, and not one behind the other.
fn touch(objects: &Bound<'_, PyList>) {
    for object in objects.iter() {
        // SAFETY: the object is alive, and no shorter than this.
        std::hint::black_box(unsafe { object.as_ptr().cast::<usize>().read_volatile() });
    }
}

/// `width` bytes from each of these addresses, one behind the other.
#[pyfunction]
pub fn read_at<'py>(py: Python<'py>, addresses: &Bound<'py, PyAny>, width: usize) -> PyResult<Bound<'py, PyBytes>> {
    with_int64("addresses", addresses, |addresses| {
        PyBytes::new_with(py, addresses.len() * width, |bytes| {
            for (bytes, address) in bytes.chunks_exact_mut(width.max(1)).zip(addresses) {
                let from = address.cast_unsigned() as usize as *const u8;
                // SAFETY: the caller says that so many bytes lie there and stay there.
                unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), width) };
            }
            Ok(())
        })
    })
}
