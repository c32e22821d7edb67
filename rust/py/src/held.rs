//! Whether a model is what it was: what it holds by identity, numbers in its weights by their bytes.
//!
//! Asked when a pass over the whole model has left nothing of it in the processor's caches: what counts is how little of
//! it is looked at.

use pyo3::exceptions::{PyAttributeError, PyKeyError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::critical_section::with_critical_section;
use pyo3::types::{PyBytes, PyDict, PyEllipsis, PyList, PyMappingProxy, PySet, PyString};
use xxhash_rust::xxh3::xxh3_64;

use crate::buffers::with_int64;
use crate::memory::{MOST_AT_ONCE, Piece, read};

/// Whether objects still are of their types, and dictionaries and lists still hold what they held, all by identity.
///
/// The first containers are the owners' own attributes. `contents` holds, one container after the other, the keys and
/// values of dictionaries and the items of lists; an ellipsis stands for any value. Of a class's attributes, which have
/// nothing there, only the number counts.
#[pyfunction]
pub fn holds(
    owners: &Bound<'_, PyList>,
    types: &Bound<'_, PyList>,
    containers: &Bound<'_, PyList>,
    counts: &Bound<'_, PyAny>,
    contents: &Bound<'_, PyList>,
    entries: &Bound<'_, PyList>,
) -> PyResult<bool> {
    let (has, of, kept) = (types.len(), owners.len(), containers.len());
    if has != of || kept < of || entries.len() % 3 != 0 {
        let message = format!("{has} types and {kept} containers for {of} owners, {} entries", entries.len());
        return Err(PyValueError::new_err(message));
    }
    touch(owners);
    touch(containers);
    let py = owners.py();
    for ((owner, kind), container) in owners.iter().zip(types.iter()).zip(containers.iter()) {
        // SAFETY: the object is alive and we are attached; this is a dictionary, or null with an error set.
        let own = unsafe { ffi::PyObject_GenericGetDict(owner.as_ptr(), std::ptr::null_mut()) };
        // SAFETY: the reference is ours, or null.
        let own = unsafe { Bound::from_owned_ptr_or_err(py, own) }?;
        if owner.get_type_ptr().cast() != kind.as_ptr() || own.as_ptr() != container.as_ptr() {
            return Ok(false);
        }
    }
    let any = PyEllipsis::get(py).as_ptr();
    let mut known = Borrowed { list: contents, next: 0 };
    let is_same = with_int64("counts", counts, |counts| {
        if counts.len() != kept {
            return Err(PyValueError::new_err(format!("{} counts for {kept} containers", counts.len())));
        }
        for (container, count) in containers.iter().zip(counts) {
            let is_known = |known: &mut Borrowed<'_, '_>, found: *mut ffi::PyObject| {
                let known = known.next();
                known == found || known == any
            };
            let is_same = if let Ok(dict) = container.cast::<PyDict>() {
                dict.len() as i64 == *count && has_same_items(dict, |found| is_known(&mut known, found))
            } else if let Ok(set) = container.cast::<PySet>() {
                set.len() as i64 == *count && (0..*count).all(|_| contains(set, known.next()))
            } else if let Ok(attributes) = container.cast::<PyMappingProxy>() {
                attributes.len()? as i64 == *count
            } else {
                let list = container.cast::<PyList>()?;
                list.len() as i64 == *count && {
                    let mut items = Borrowed { list, next: 0 };
                    (0..list.len()).all(|_| is_known(&mut known, items.next()))
                }
            };
            if !is_same {
                return Ok(false);
            }
        }
        Ok(true)
    })?;
    if !is_same || !known.next().is_null() {
        return Ok(false);
    }
    let mut entries = entries.iter();
    while let (Some(mapping), Some(key), Some(value)) = (entries.next(), entries.next(), entries.next()) {
        if !found_at(&mapping, &key)?.is_some_and(|found| found.is(&value)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What a dictionary, or the attributes of a class, have under a key; of any other object, its attribute of that name.
fn found_at<'py>(place: &Bound<'py, PyAny>, key: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
    if let Ok(dict) = place.cast_exact::<PyDict>() {
        return dict.get_item(key);
    }
    let is_mapping = place.is_instance_of::<PyMappingProxy>() || place.is_instance_of::<PyDict>();
    let found = if is_mapping { place.get_item(key) } else { place.getattr(key.cast::<PyString>()?) };
    let py = place.py();
    match found {
        Ok(found) => Ok(Some(found)),
        // A variable of a function that holds nothing any more raises ValueError.
        Err(error)
            if error.is_instance_of::<PyKeyError>(py)
                || error.is_instance_of::<PyAttributeError>(py)
                || error.is_instance_of::<PyValueError>(py) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The items of a list one after the other, without a reference to any: that would touch the memory of each.
struct Borrowed<'a, 'py> {
    list: &'a Bound<'py, PyList>,
    next: ffi::Py_ssize_t,
}

impl Borrowed<'_, '_> {
    /// Where the next item lies, to be compared and not looked at; null at the end.
    fn next(&mut self) -> *mut ffi::PyObject {
        if self.next as usize >= self.list.len() {
            return std::ptr::null_mut();
        }
        // SAFETY: the list is alive and we are attached; the index is within it, or null comes back with an error.
        let item = unsafe { ffi::PyList_GetItem(self.list.as_ptr(), self.next) };
        if item.is_null() {
            // SAFETY: we are attached. Another thread has cut the list: nothing is equal to null.
            unsafe { ffi::PyErr_Clear() };
        }
        self.next += 1;
        item
    }
}

fn contains(set: &Bound<'_, PySet>, item: *mut ffi::PyObject) -> bool {
    if item.is_null() {
        return false;
    }
    // SAFETY: both are alive and we are attached.
    let found = unsafe { ffi::PySet_Contains(set.as_ptr(), item) };
    if found < 0 {
        // SAFETY: we are attached. What cannot be hashed is no item of the set.
        unsafe { ffi::PyErr_Clear() };
    }
    found == 1
}

fn has_same_items(dict: &Bound<'_, PyDict>, mut is_known: impl FnMut(*mut ffi::PyObject) -> bool) -> bool {
    let (mut at, mut key, mut value) = (0, std::ptr::null_mut(), std::ptr::null_mut());
    let mut is_same = true;
    // Without a global lock, another thread may write to the dictionary.
    with_critical_section(dict, || {
        let (at, key, value) = (&raw mut at, &raw mut key, &raw mut value);
        // SAFETY: we are attached, and nothing here changes the dictionary. Not through its iterator: that takes a
        // reference to each value, and so waits for the memory of every one.
        while is_same && unsafe { ffi::PyDict_Next(dict.as_ptr(), at, key, value) } != 0 {
            // SAFETY: the call above has written both.
            let (key, value) = unsafe { (*key, *value) };
            is_same = is_known(key) && is_known(value);
        }
    });
    is_same
}

/// Have the beginnings of these objects fetched from memory all at once, and not one after the other.
fn touch(objects: &Bound<'_, PyList>) {
    for object in objects.iter() {
        // SAFETY: the object is alive, and no shorter than this.
        std::hint::black_box(unsafe { object.as_ptr().cast::<usize>().read_volatile() });
    }
}

/// The bytes of pieces of memory, one after the other, or None where some are not mapped any more.
#[pyfunction]
pub fn read_at<'py>(
    py: Python<'py>,
    addresses: &Bound<'py, PyAny>,
    lengths: &Bound<'py, PyAny>,
) -> PyResult<Option<Bound<'py, PyBytes>>> {
    let pieces = pieces(addresses, lengths)?;
    let mut is_mapped = true;
    let bytes = PyBytes::new_with(py, total(&pieces), |bytes| {
        is_mapped = read(&pieces, bytes)?;
        Ok(())
    })?;
    Ok(is_mapped.then_some(bytes))
}

/// A sum of each piece of memory that depends on every byte and its place, as native-endian u64, one after the other;
/// None where some are not mapped any more.
#[pyfunction]
pub fn sums_at<'py>(
    py: Python<'py>,
    addresses: &Bound<'py, PyAny>,
    lengths: &Bound<'py, PyAny>,
) -> PyResult<Option<Bound<'py, PyBytes>>> {
    let pieces = pieces(addresses, lengths)?;
    let sums = py.detach(|| sums(&pieces))?;
    sums.map(|sums| {
        PyBytes::new_with(py, 8 * sums.len(), |bytes| {
            for (bytes, sum) in bytes.as_chunks_mut().0.iter_mut().zip(&sums) {
                *bytes = sum.to_ne_bytes();
            }
            Ok(())
        })
    })
    .transpose()
}

fn sums(pieces: &[Piece]) -> std::io::Result<Option<Vec<u64>>> {
    let mut sums = Vec::with_capacity(pieces.len());
    let mut room = Vec::new();
    let mut rest = pieces;
    while !rest.is_empty() {
        let (mut count, mut length) = (1, rest[0].1);
        while count < rest.len() && length + rest[count].1 <= MOST_AT_ONCE {
            length += rest[count].1;
            count += 1;
        }
        let (now, later) = rest.split_at(count);
        rest = later;
        room.resize(length, 0);
        if !read(now, &mut room)? {
            return Ok(None);
        }
        let mut start = 0;
        for (_, length) in now {
            sums.push(xxh3_64(&room[start..start + length]));
            start += length;
        }
    }
    Ok(Some(sums))
}

fn pieces(addresses: &Bound<'_, PyAny>, lengths: &Bound<'_, PyAny>) -> PyResult<Vec<Piece>> {
    with_int64("addresses", addresses, |addresses| {
        with_int64("lengths", lengths, |lengths| {
            if addresses.len() != lengths.len() || lengths.iter().any(|length| *length < 0) {
                let (has, of) = (lengths.len(), addresses.len());
                return Err(PyValueError::new_err(format!("{has} lengths, none below 0, for {of} addresses")));
            }
            let pairs = addresses.iter().zip(lengths);
            Ok(pairs.map(|(at, length)| (at.cast_unsigned() as usize, length.cast_unsigned() as usize)).collect())
        })
    })
}

fn total(pieces: &[Piece]) -> usize {
    pieces.iter().map(|(_, length)| length).sum()
}
