//! A plan: pages reserved for one step of some sequences, and what it takes to undo that.

use crate::ids::{NodeId, PageId, SequenceId};
use crate::policy::{Cause, Memory};
use crate::tree::Victim;

/// One sequence of a plan.
pub(crate) struct Row {
    pub sequence: SequenceId,
    /// Tokens computed before the step.
    pub length: u32,
    /// Tokens of the step; 0 leaves the sequence alone.
    pub count: u32,
    /// Pages of the sequence before the plan.
    pub pages: u32,
}

/// Where the target of a demotion comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// It was free.
    Free,
    /// A victim held it.
    Victim,
    /// It is the source of an earlier demotion of the plan, which makes room.
    Source,
}

/// A page that gives its place to a copy of it in the next class down.
pub(crate) struct Demotion {
    pub source: PageId,
    pub target: PageId,
    pub origin: Origin,
    /// Which block of its text the page holds.
    pub block: u32,
    /// Where it stands in the tree, as of when it was chosen; None for a page of a sequence's own.
    pub place: Option<(NodeId, usize)>,
}

/// Pages reserved for one step. Give it to `Pool::commit` or `Pool::abandon`: dropping it leaks its
/// pages, for it does not know the pool.
#[must_use]
#[derive(Default)]
pub struct Plan {
    pub(crate) rows: Vec<Row>,
    /// Reserved pages in row order, of full precision all of them: first `num_taken` that were free, then
    /// those of victims, then the sources of demotions from full precision.
    pub(crate) reserved: Vec<PageId>,
    pub(crate) num_taken: usize,
    pub(crate) victims: Vec<Victim>,
    /// The victims' pages, of all classes, in the order in which they were condemned.
    pub(crate) victim_pages: Vec<PageId>,
    /// Those of them that the codec had refused: another block may come into one.
    pub(crate) refused: Vec<PageId>,
    /// Keys of the blocks in them, and what the policy knew of each: a page may hold another block before the plan
    /// is filled.
    pub(crate) keys: Vec<u64>,
    pub(crate) memories: Vec<Memory>,
    pub(crate) cause: Option<Cause>,
    /// When they were chosen; 0 is not yet.
    pub(crate) left: u64,
    /// In an order in which they can be written: those out of quantized pages first, for others go to where they
    /// were. Undone in the opposite one.
    pub(crate) demotions: Vec<Demotion>,
    /// How many of them are from full precision, the last ones.
    pub(crate) num_given: usize,
    /// Written out: victims are gone.
    pub(crate) is_filled: bool,
    /// The targets of demotions were written.
    pub(crate) is_moved: bool,
    pub(crate) copies: Vec<(PageId, PageId)>,
    /// One token was appended to each row.
    pub(crate) appended: bool,
    pub(crate) num_tokens: usize,
    pub(crate) num_evicted: usize,
    pub(crate) max_pages: usize,
}

impl Plan {
    /// Rows, those of zero tokens included.
    pub fn num_rows(&self) -> usize {
        self.rows.len()
    }

    /// Tokens of the step, all rows together.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Pages taken from the tree.
    pub fn num_evicted(&self) -> usize {
        self.num_evicted
    }

    /// Longest block table of the rows that take part.
    pub fn max_pages(&self) -> usize {
        self.max_pages
    }

    /// Pages to copy before anything is written: source, then destination.
    pub fn copies(&self) -> &[(PageId, PageId)] {
        &self.copies
    }

    /// Pages to quantize, in this order, before anything else is copied or written: source, then target, in the
    /// next class down. A target may be an earlier one's source. Followed by `Pool::moved`; until then nobody else
    /// can plan.
    pub fn demotions(&self) -> impl ExactSizeIterator<Item = (PageId, PageId)> + '_ {
        self.demotions.iter().map(|demotion| (demotion.source, demotion.target))
    }

    /// True when the row's sequence is in the plan: it computes something, or was appended to.
    pub(crate) fn touches(&self, row: &Row) -> bool {
        row.count > 0 || self.appended
    }

    /// Empty it for another step, keeping its vectors.
    pub(crate) fn reset(&mut self) {
        self.rows.clear();
        self.reserved.clear();
        self.victims.clear();
        self.victim_pages.clear();
        self.keys.clear();
        self.memories.clear();
        self.refused.clear();
        self.cause = None;
        self.left = 0;
        self.demotions.clear();
        self.num_given = 0;
        self.is_filled = false;
        self.is_moved = false;
        self.copies.clear();
        self.num_taken = 0;
        self.appended = false;
        self.num_tokens = 0;
        self.num_evicted = 0;
        self.max_pages = 0;
    }
}
