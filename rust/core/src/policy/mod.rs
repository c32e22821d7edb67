//! Who must leave first.
//!
//! A policy orders the unpinned nodes and knows nothing else about them. The tree keeps one promise
//! to it and asks one in return: a parent is always younger than its children, so that the oldest
//! node is a leaf and eviction never cuts a prefix in the middle.

mod lru;

pub(crate) use lru::Lru;
