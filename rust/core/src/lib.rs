//! The core of one tier: page pool, prefix tree, block tables and eviction order.
//!
//! It knows token ids, page ids and order. It has never heard of tensors, models, Python or event
//! loops: what a page holds is the caller's, and so is every copy. All of it is plain data behind
//! `&mut`; whoever shares a [`Pool`] does so behind a lock ([`Shared`]). [`kernel`] computes with what pages hold, and knows
//! none of the rest.
//!
//! A step is a [`Plan`]: [`Pool::plan`] decides, [`Pool::fill`] writes the decision out and makes it
//! final for the victims, [`Pool::commit`] makes it true, [`Pool::abandon`] takes it back.

#![deny(unsafe_code)]

mod error;
mod ids;
#[allow(unsafe_code)] // addresses of pages and vector instructions; nothing else here needs any
pub mod kernel;
mod pages;
mod plan;
mod policy;
mod pool;
mod replay;
mod retention;
mod sequence;
mod shared;
mod stats;
mod tree;

pub use error::{Error, Result};
pub use ids::{Namespace, PageId, SequenceId};
pub use plan::Plan;
pub use policy::{Cause, Lesson, Rule};
pub use pool::{Adaptive, Explanation, Left, OpenOptions, PinId, Pool, check_tokens};
pub use replay::{Arrival, Replay, Trace, TraceError};
pub use retention::{PRIORITIES, Retention};
pub use shared::{Held, Poisoned, Settle, Shared};
pub use stats::Statistics;
pub use tree::common_prefix;
