//! Who must leave first.
//!
//! Recency orders the unpinned nodes and knows nothing else about them. The tree keeps it under every
//! policy, and keeps one promise to it: a parent is always younger than its children, so that the oldest
//! node is a leaf and eviction never cuts a prefix in the middle. A [`Policy`] stands beside it, one a file:
//! it is told which leaves may leave, and may name another one than the oldest.

mod clock;
mod history;
mod keys;
mod lru;
mod survival;

use crate::ids::{NodeId, PageId};
use crate::retention::Level;

pub(crate) use clock::Clock;
pub use history::Cause;
pub(crate) use history::{History, Trail};
pub(crate) use lru::{Lru, Recency};
pub use survival::{Lesson, Rule};
pub(crate) use survival::{Memory, Survival, Turn};

/// Who leaves next, among leaves that nobody pins, and who steps down before. What is not implemented is what
/// recency does.
///
/// Pages have numbers, and so have blocks that left: the slots of [`History`]. What a policy knows of either
/// it keeps by these.
pub(crate) trait Policy: Send {
    /// Why a page that is needed now would leave.
    fn cause(&self) -> Cause;

    /// A block came into the tree with this page, back from among those that left when it has a slot there.
    /// Told only where `learns`.
    fn enter(&mut self, _page: PageId, _back: Option<u32>, _now: u64) {}

    /// A text ended that stood on these pages, all from its beginning on. Told only where `learns`.
    fn touch(&mut self, _history: &History, _path: &[PageId], _turn: Turn, _now: u64) {}

    /// A node is a leaf that may leave, and ends with this page; or, with none, it is not, or not any more.
    fn rank(&mut self, _node: NodeId, _deepest: Option<PageId>) {}

    /// The leaf to take from; none is the least recently used.
    fn lowest(&mut self, _now: u64) -> Option<NodeId> {
        None
    }

    /// The same as `rank`, of a leaf of another level than the usual one.
    fn rank_at(&mut self, _level: Level, _node: NodeId, _deepest: Option<PageId>) {}

    /// The leaf of such a level to take from; none is the least recently used of it.
    fn lowest_at(&mut self, _level: Level, _now: u64) -> Option<NodeId> {
        None
    }

    /// A node that nobody pins would give this page of a class to the class below, or has none to give.
    fn cool(&mut self, _class: usize, _node: NodeId, _next: Option<PageId>) {}

    /// The same, of a node of another level.
    fn cool_at(&mut self, _level: Level, _class: usize, _node: NodeId, _next: Option<PageId>) {}

    /// The node of the usual level whose page of a class steps down next; none is the one that was let go of first.
    fn coldest(&mut self, _class: usize, _now: u64) -> Option<NodeId> {
        None
    }

    /// The same, of another level.
    fn coldest_at(&mut self, _level: Level, _class: usize, _now: u64) -> Option<NodeId> {
        None
    }

    /// How many pages at the end of the leaf that `lowest` named rank as the last one does.
    fn alike(&self, pages: &[PageId]) -> usize {
        pages.len()
    }

    /// Append what is known of the blocks in these pages, which leave, to `memories`: an entry a page, or none.
    fn remember(&self, _pages: &[PageId], _memories: &mut Vec<Memory>) {}

    /// A page holds the block again of which this was known.
    fn recall(&mut self, _page: PageId, _memory: &Memory) {}

    /// A block of which this was known left for good.
    fn bury(&mut self, _slot: u32, _memory: &Memory) {}

    /// The block in a page is in another one from now on.
    fn relocate(&mut self, _from: PageId, _to: PageId) {}

    /// True when use is to be told.
    fn learns(&self) -> bool {
        false
    }

    /// Copy what there is to learn from, when it is time.
    fn lesson(&mut self, _now: u64) -> Option<Lesson> {
        None
    }

    /// Go by what was learned from now on.
    fn apply(&mut self, _lesson: Lesson) {}

    /// Who rules, where that may change.
    fn rule(&self) -> Option<Rule> {
        None
    }

    /// Leaves that are ranked, where they are.
    fn num_ranked(&self) -> Option<usize> {
        None
    }

    /// True when a leaf stands where its deepest page does.
    fn is_ranked_as(&self, _node: NodeId, _deepest: PageId) -> bool {
        false
    }

    /// The same, of a leaf of another level.
    fn is_ranked_at(&self, _level: Level, _node: NodeId, _deepest: PageId) -> bool {
        false
    }

    /// Nodes that have pages of a class to give, where these are ranked.
    fn num_cooling(&self, _class: usize) -> Option<usize> {
        None
    }

    /// True when a node stands where the page does that it gives next.
    fn is_cooling_as(&self, _class: usize, _node: NodeId, _next: PageId) -> bool {
        false
    }

    /// The same, of a node of another level.
    fn is_cooling_at(&self, _level: Level, _class: usize, _node: NodeId, _next: PageId) -> bool {
        false
    }

    /// Bytes owned.
    fn bytes(&self) -> usize {
        0
    }
}
