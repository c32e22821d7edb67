//! The one place that touches foreign memory: Python buffers, for the length of one call.
//!
//! Slices are lent while attached. A call that detaches copies first, for another thread could write
//! meanwhile; what a thread without the interpreter lock writes under our eyes is its own fault, and
//! can cost it wrong matches but never memory safety: lengths are read once and ids are checked where
//! they are stored.

use std::ffi::c_int;
use std::mem::MaybeUninit;

use kvhybrid_core::{Error, Result as CoreResult};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;

use crate::errors::raised;
use crate::token_buffer::TokenBuffer;

/// Arguments longer than this are copied in and worked on without the interpreter.
const DETACH_TOKENS: usize = 1 << 18;

/// Call `work` with the token ids of an argument: a buffer, a torch CPU tensor, or a `TokenBuffer`.
pub fn with_tokens<T: Send>(
    tokens: &Bound<'_, PyAny>,
    work: impl FnOnce(&[u32]) -> CoreResult<T> + Send,
) -> PyResult<T> {
    let py = tokens.py();
    if let Ok(buffer) = tokens.cast::<TokenBuffer>() {
        let buffer = buffer.get();
        let work = || buffer.with(work);
        let result = if buffer.length()? > DETACH_TOKENS { py.detach(work)? } else { work()? };
        return result.map_err(raised);
    }
    let array;
    let tokens = if is_array_only(tokens) {
        array = tokens.call_method0("__array__")?;
        &array
    } else {
        tokens
    };
    let mut room = Room::new();
    let view = room.view(tokens, "tokens", ffi::PyBUF_ND)?;
    view.check_dimensions("tokens", 1)?;
    let (owned, is_signed);
    let slice: &[u32] = match view.element() {
        Element::Int32 | Element::Uint32 => {
            is_signed = view.element() == Element::Int32;
            // SAFETY: `view` checked alignment and length of 4-byte items; every bit pattern is a u32.
            unsafe { view.slice() }
        }
        Element::Int64 => {
            is_signed = true;
            // SAFETY: as above, with 8-byte items.
            owned = narrow(unsafe { view.slice() })?;
            &owned
        }
        Element::Other => return Err(view.refuse_format("tokens", "int32, int64 or uint32")),
    };
    let result = if slice.len() > DETACH_TOKENS {
        let copy = slice.to_vec();
        py.detach(move || work(&copy))
    } else {
        work(slice)
    };
    result.map_err(|error| match error {
        Error::Token { index, value } if is_signed => refuse_token(index, i64::from(value.cast_signed())),
        error => raised(error),
    })
}

/// True for what is no buffer but gives an array over its memory: torch's CPU tensors.
fn is_array_only(object: &Bound<'_, PyAny>) -> bool {
    // SAFETY: the object is alive and we are attached.
    let is_buffer = unsafe { ffi::PyObject_CheckBuffer(object.as_ptr()) } != 0;
    !is_buffer && object.hasattr("__array__").unwrap_or(false)
}

/// Call `work` with an int32 argument that is only read.
pub fn with_int32<T>(name: &str, object: &Bound<'_, PyAny>, work: impl FnOnce(&[i32]) -> PyResult<T>) -> PyResult<T> {
    let mut room = Room::new();
    let view = room.view(object, name, ffi::PyBUF_ND)?;
    view.check_dimensions(name, 1)?;
    view.check_int32(name)?;
    // SAFETY: `view` checked alignment and length; every bit pattern is an i32.
    work(unsafe { view.slice() })
}

/// Call `work` with an int64 argument that is only read.
pub fn with_int64<T>(name: &str, object: &Bound<'_, PyAny>, work: impl FnOnce(&[i64]) -> PyResult<T>) -> PyResult<T> {
    let mut room = Room::new();
    let view = room.view(object, name, ffi::PyBUF_ND)?;
    view.check_dimensions(name, 1)?;
    if view.element() != Element::Int64 {
        return Err(view.refuse_format(name, "int64"));
    }
    // SAFETY: `view` checked alignment and length; every bit pattern is an i64.
    work(unsafe { view.slice() })
}

/// Room for a buffer view. It stays where it is while the view lives: some exporters point into it.
pub struct Room(MaybeUninit<ffi::Py_buffer>);

/// A contiguous, aligned buffer, released when dropped.
pub struct View<'a>(&'a mut ffi::Py_buffer);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Element {
    Int32,
    Uint32,
    Int64,
    Other,
}

impl Room {
    pub fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    /// Ask `object` for a C-contiguous buffer.
    pub fn view(&mut self, object: &Bound<'_, PyAny>, name: &str, flags: c_int) -> PyResult<View<'_>> {
        // SAFETY: the object is alive and we are attached; the call fills the view or fails.
        let code = unsafe {
            ffi::PyObject_GetBuffer(object.as_ptr(), self.0.as_mut_ptr(), flags | ffi::PyBUF_FORMAT | ffi::PyBUF_ND)
        };
        if code != 0 {
            let cause = PyErr::fetch(object.py());
            return Err(explain(object, name, flags, cause));
        }
        // SAFETY: the call above succeeded.
        let view = View(unsafe { self.0.assume_init_mut() });
        if view.len() > 0 && !view.0.buf.addr().is_multiple_of(view.itemsize().max(1)) {
            return Err(PyValueError::new_err(format!("{name} must be aligned to its items")));
        }
        Ok(view)
    }

    /// Ask `object` for a writable int32 buffer of so many dimensions.
    pub fn writable(&mut self, object: &Bound<'_, PyAny>, name: &str, dimensions: usize) -> PyResult<View<'_>> {
        let view = self.view(object, name, ffi::PyBUF_WRITABLE)?;
        view.check_dimensions(name, dimensions)?;
        view.check_int32(name)?;
        Ok(view)
    }
}

impl View<'_> {
    fn itemsize(&self) -> usize {
        self.0.itemsize.cast_unsigned()
    }

    fn len(&self) -> usize {
        self.0.len.cast_unsigned() / self.itemsize().max(1)
    }

    /// Length along one dimension.
    pub fn extent(&self, dimension: usize) -> usize {
        // SAFETY: PyBUF_ND was asked for, so there are `ndim` extents; callers checked `ndim`.
        unsafe { *self.0.shape.add(dimension) }.cast_unsigned()
    }

    fn check_dimensions(&self, name: &str, dimensions: usize) -> PyResult<()> {
        if self.0.ndim.cast_unsigned() as usize == dimensions {
            return Ok(());
        }
        Err(PyValueError::new_err(format!("{name} must have {dimensions} dimensions, not {}", self.0.ndim)))
    }

    fn check_int32(&self, name: &str) -> PyResult<()> {
        match self.element() {
            Element::Int32 => Ok(()),
            _ => Err(self.refuse_format(name, "int32")),
        }
    }

    fn format(&self) -> &[u8] {
        if self.0.format.is_null() {
            return b"B";
        }
        // SAFETY: a non-null format is a C string that lives as long as the view.
        unsafe { std::ffi::CStr::from_ptr(self.0.format) }.to_bytes()
    }

    fn element(&self) -> Element {
        let format = self.format();
        let code = match format {
            [b'@' | b'=', code] | [code] => *code,
            [b'<', code] if cfg!(target_endian = "little") => *code,
            [b'>' | b'!', code] if cfg!(target_endian = "big") => *code,
            _ => return Element::Other,
        };
        match (code, self.itemsize()) {
            (b'i' | b'l', 4) => Element::Int32,
            (b'I' | b'L', 4) => Element::Uint32,
            (b'l' | b'q', 8) => Element::Int64,
            _ => Element::Other,
        }
    }

    fn refuse_format(&self, name: &str, wanted: &str) -> PyErr {
        let format = String::from_utf8_lossy(self.format()).into_owned();
        PyTypeError::new_err(format!(
            "{name} must hold {wanted}, not items of format '{format}' and {} bytes",
            self.itemsize()
        ))
    }

    /// The items.
    ///
    /// # Safety
    /// `T` must be as large as an item and valid for every bit pattern.
    unsafe fn slice<T>(&self) -> &[T] {
        if self.len() == 0 {
            return &[];
        }
        // SAFETY: contiguous (no strides were asked for), aligned (checked), alive as long as self.
        unsafe { std::slice::from_raw_parts(self.0.buf.cast(), self.len()) }
    }

    /// The items of a view made by `Room::writable`, to write.
    pub fn int32_mut(&mut self) -> &mut [i32] {
        if self.len() == 0 {
            return &mut [];
        }
        // SAFETY: writable int32 (asked for and checked), contiguous, aligned, alive as long as self.
        unsafe { std::slice::from_raw_parts_mut(self.0.buf.cast(), self.len()) }
    }
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        // SAFETY: views exist only while attached, and are released once.
        unsafe { ffi::PyBuffer_Release(self.0) }
    }
}

/// True when two views share memory, so that they must not be written through at once.
pub fn overlap(a: &View<'_>, b: &View<'_>) -> bool {
    let (from_a, from_b) = (a.0.buf.addr(), b.0.buf.addr());
    from_a < from_b + b.len() * b.itemsize() && from_b < from_a + a.len() * a.itemsize()
}

/// Say what was wrong with an object that gave no buffer.
fn explain(object: &Bound<'_, PyAny>, name: &str, flags: c_int, cause: PyErr) -> PyErr {
    let py = object.py();
    // SAFETY: the object is alive and we are attached.
    if unsafe { ffi::PyObject_CheckBuffer(object.as_ptr()) } == 0 {
        let kind = object.get_type().to_string();
        return PyTypeError::new_err(format!("{name} must be a buffer of integers, not {kind}"));
    }
    let wanted = if flags & ffi::PyBUF_WRITABLE == 0 { "contiguous" } else { "writable and contiguous" };
    let error = PyValueError::new_err(format!("{name} must be {wanted}"));
    error.set_cause(py, Some(cause));
    error
}

fn refuse_token(index: usize, value: i64) -> PyErr {
    PyValueError::new_err(format!("token ids lie in 0..2147483648, and index {index} holds {value}"))
}

fn narrow(wide: &[i64]) -> PyResult<Vec<u32>> {
    if wide.iter().fold(0, |bits, token| bits | token) >> 31 == 0 {
        return Ok(wide.iter().map(|token| *token as u32).collect());
    }
    let index = wide.iter().position(|token| *token >> 31 != 0).unwrap_or_default();
    Err(refuse_token(index, wide[index]))
}
