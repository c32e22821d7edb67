//! Who must leave first.
//!
//! Recency orders the unpinned nodes and knows nothing else about them. The tree keeps one promise to it
//! and asks one in return: a parent is always younger than its children, so that the oldest node is a
//! leaf and eviction never cuts a prefix in the middle. The learned order ranks leaves only, and stands
//! beside recency, which never stops being kept: who rules may change with every victim.

mod clock;
mod history;
mod lru;
mod survival;

pub(crate) use clock::Clock;
pub use history::Cause;
pub(crate) use history::{History, Mark};
pub(crate) use lru::Lru;
pub use survival::{Lesson, Rule};
pub(crate) use survival::{Standing, Survival, Turn};

/// All that is known of the block in a page.
#[derive(Clone, Copy, Default)]
pub(crate) struct Memory {
    pub mark: Mark,
    pub standing: Standing,
}
