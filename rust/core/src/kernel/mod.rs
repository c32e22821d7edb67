//! Page kernels: attention over pages and page codecs, for the CPU. Knows addresses, shapes and numbers;
//! refuses to know who a page belongs to.
//!
//! One body a kernel, compiled for several instruction sets and chosen at run time (`isa`), run by a team
//! of threads that lives on between calls (`team`).

#![allow(clippy::inline_always)] // what is not inlined into a body is not compiled for its instruction set
#![allow(clippy::cast_ptr_alignment)] // addresses come as bytes, and numbers lie where numbers may
#![cfg_attr(test, allow(clippy::float_cmp, clippy::cast_precision_loss))] // tests compare what is exact

pub mod attend;
pub mod half;
pub mod isa;
mod lanes;
pub mod quant;
pub mod team;
pub mod threads;
mod transpose;
