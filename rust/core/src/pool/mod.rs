//! The pool: pages, tree and sequences together, and the calls that move tokens through them.

mod check;
mod edit;
mod explain;
mod held;
mod learn;
mod open;
mod pins;
mod retain;
mod room;
mod step;
mod undo;

pub use explain::Explanation;
pub use learn::Adaptive;
pub use open::OpenOptions;
pub use pins::PinId;

use crate::error::{Error, Result};
use crate::ids::{CLASSES, Classes, Namespace, PageId, SequenceId};
use crate::pages::Pages;
use crate::plan::Plan;
use crate::policy::{Cause, Clock, History};
use crate::sequence::Sequences;
use crate::shared::Settle;
use crate::stats::{Statistics, Totals};
use crate::tree::{Tree, Victim};

/// Tokens are below this: they cross the boundary as int32.
pub(crate) const MAX_TOKEN: u32 = i32::MAX as u32;

/// Pages of `block_size` tokens, the prefix tree over them, and who must leave first.
pub struct Pool {
    pages: Pages,
    tree: Tree,
    sequences: Sequences,
    totals: Totals,
    /// log2 of the block size.
    shift: u32,
    /// A finished plan, its vectors ready for the next.
    spare: Option<Plan>,
    duplicates: Vec<PageId>,
    /// Closed sequences leave their last, partly filled block behind.
    keep_tails: bool,
    /// The demotions of an open plan were not written yet: nobody else can plan, or would read what is not there.
    moving: bool,
    clock: Clock,
    history: History,
    /// Learn in the call that finds it is time, not when asked to.
    learns_at_once: bool,
    /// Keys of blocks about to be sealed, and the path of a sequence about to close.
    keys: Vec<u64>,
    path: Vec<PageId>,
    pins: pins::Pins,
    /// Pages of each class that users may pin, all texts together.
    most_kept: [u32; CLASSES],
}

impl Pool {
    /// Make a pool of empty pages. Slots (`page * block_size + offset`) must fit int32. With `keep_tails`
    /// closed sequences leave their last, partly filled block behind, else full blocks only.
    pub fn new(num_pages: usize, block_size: usize, keep_tails: bool) -> Result<Self> {
        Self::with_classes([num_pages, 0, 0], block_size, keep_tails)
    }

    /// Make a pool whose pages are of several classes: first those of full precision, then quantized ones, which
    /// take the blocks that are coldest when the pages before them are short. The last class may be empty, or the
    /// last two.
    pub fn with_classes(counts: [usize; 3], block_size: usize, keep_tails: bool) -> Result<Self> {
        if !block_size.is_power_of_two() {
            return Err(Error::Argument(format!("block_size must be a power of two, not {block_size}")));
        }
        let num_pages = counts.iter().fold(0, |sum: usize, count| sum.saturating_add(*count));
        let slots = num_pages.checked_mul(block_size).filter(|slots| *slots <= 1 << 31);
        if counts[1] == 0 && counts[2] > 0 {
            return Err(Error::Argument(format!("{} pages of the lowest class, and none above", counts[2])));
        }
        if counts[0] == 0 || slots.is_none() {
            return Err(Error::Argument(format!(
                "num_pages must lie in 1..={} for blocks of {block_size}, not {num_pages}",
                (1u64 << 31) / block_size as u64
            )));
        }
        let classes = Classes(counts.map(|count| count as u32));
        Ok(Self {
            pages: Pages::new(classes),
            tree: Tree::new(block_size as u32, classes),
            sequences: Sequences::default(),
            totals: Totals::default(),
            shift: block_size.trailing_zeros(),
            spare: None,
            duplicates: Vec::new(),
            keep_tails,
            moving: false,
            clock: Clock::new(),
            history: History::new(num_pages, learn::random_seed()),
            learns_at_once: false,
            keys: Vec::new(),
            path: Vec::new(),
            pins: pins::Pins::default(),
            most_kept: classes.0.map(|count| count / 2),
        })
    }

    /// Pages of the pool.
    pub fn num_pages(&self) -> usize {
        self.pages.classes().total() as usize
    }

    /// Tokens a page.
    pub fn block_size(&self) -> usize {
        1 << self.shift
    }

    /// Pages that hold nothing.
    pub fn num_free(&self) -> usize {
        self.pages.free_pages().iter().map(Vec::len).sum()
    }

    /// Quantized pages that hold nothing.
    pub fn num_free_quantized(&self) -> usize {
        self.num_free() - self.pages.num_free(0)
    }

    /// Pages of the tree that may leave.
    pub fn num_evictable(&self) -> usize {
        self.tree.num_evictable()
    }

    /// Return how many leading tokens are cached, to the token. Changes nothing.
    pub fn matched(&self, namespace: Namespace, tokens: &[u32]) -> Result<usize> {
        let matched = self.tree.find_root(namespace).map_or(0, |root| self.tree.walk(root, tokens).1 as usize);
        check_tokens(&tokens[matched..], matched)?;
        Ok(matched)
    }

    /// Evict up to `count` cold pages and return how many left.
    pub fn evict(&mut self, count: usize) -> usize {
        let count = count.min(self.tree.num_evictable());
        self.evict_by(|tree, now, pages, victims| tree.condemn(count, now, pages, victims))
    }

    /// Whether any page or running text is under a namespace.
    pub fn has_namespace(&self, namespace: Namespace) -> bool {
        self.tree.find_root(namespace).is_some()
    }

    /// Evict every unpinned page of a namespace and return how many left.
    ///
    /// What users pinned there is pinned no more: nobody will ask for it again.
    pub fn drop_namespace(&mut self, namespace: Namespace) -> usize {
        self.unpin_all(namespace);
        let Some(root) = self.tree.find_root(namespace) else { return 0 };
        self.evict_by(|tree, _, pages, victims| tree.condemn_below(root, pages, victims))
    }

    fn evict_by(&mut self, condemn: impl FnOnce(&mut Tree, u64, &mut Vec<PageId>, &mut Vec<Victim>)) -> usize {
        let mut plan = self.spare.take().unwrap_or_default();
        plan.left = self.clock.now();
        condemn(&mut self.tree, plan.left, &mut plan.victim_pages, &mut plan.victims);
        self.note_victims(&mut plan, 0);
        self.forget(&plan, Cause::Asked);
        self.tree.finish(&mut plan.victims);
        self.tree.forget_refused(&plan.victim_pages);
        self.pages.free(&plan.victim_pages);
        let count = plan.victim_pages.len();
        self.totals.evicted_pages += count as u64;
        self.retire(plan);
        count
    }

    /// Give back all that a sequence holds; one in an open plan leaves when that is finished.
    pub fn close(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.find_mut(id) else { return };
        if sequence.planned {
            sequence.closing = true;
            return;
        }
        let tail = if self.keep_tails { self.seal_tail(id) } else { None };
        self.note_use(id, tail);
        self.expire();
        self.retain_closing(id, tail);
        let Some(sequence) = self.sequences.find_mut(id) else { return };
        let private = (sequence.sealed >> self.shift) as usize;
        for page in sequence.table[private..].iter().rev() {
            self.pages.release(*page);
        }
        self.tree.unpin_path(sequence.anchor);
        self.sequences.remove(id);
    }

    /// True when the sequence can no longer be used.
    pub fn is_closed(&self, id: SequenceId) -> bool {
        self.sequences.get(id).is_err()
    }

    /// Counters, O(1).
    pub fn statistics(&self) -> Statistics {
        let (total, free) = (self.num_pages(), self.num_free());
        let (sealed, evictable) = (self.tree.num_sealed(), self.tree.num_evictable());
        Statistics {
            num_pages: total as u64,
            num_quantized_pages: total as u64 - u64::from(self.pages.classes().0[0]),
            num_lowest_pages: u64::from(self.pages.classes().0[2]),
            free_pages: free as u64,
            free_quantized_pages: self.num_free_quantized() as u64,
            free_lowest_pages: self.pages.num_free(2) as u64,
            mutable_pages: self.pages.num_private() as u64,
            sealed_pages: sealed as u64,
            shared_pages: (self.tree.num_shared() + self.pages.num_shared()) as u64,
            pinned_pages: (sealed - evictable) as u64,
            evictable_pages: evictable as u64,
            sequences: self.sequences.len() as u64,
            nodes: self.tree.num_nodes() as u64,
            opens: self.totals.opens,
            queried_tokens: self.totals.queried_tokens,
            cached_tokens: self.totals.cached_tokens,
            evicted_pages: self.totals.evicted_pages,
            sealed_total: self.totals.sealed_pages,
            duplicate_pages: self.totals.duplicate_pages,
            copied_pages: self.totals.copied_pages,
            demoted_pages: self.totals.demoted_pages,
            lowered_pages: self.totals.lowered_pages,
            refused_pages: self.totals.refused_pages,
            plans: self.totals.plans,
            abandoned_plans: self.totals.abandoned_plans,
            returned_pages: self.totals.returned_pages,
            ghosts: self.history.num_ghosts() as u64,
            user_pins: self.pins.len() as u64,
            user_pinned_pages: self.tree.num_kept().iter().sum::<u32>().into(),
            most_user_pinned_pages: self.most_pinned(),
            evicted_lru_pages: self.totals.evicted_by[Cause::Recency as usize],
            evicted_survival_pages: self.totals.evicted_by[Cause::Survival as usize],
            evicted_ttl_pages: self.totals.evicted_by[Cause::Expired as usize],
            evicted_priority_pages: self.totals.evicted_by[Cause::Priority as usize],
            evicted_asked_pages: self.totals.evicted_by[Cause::Asked as usize],
        }
    }

    /// Bytes that the bookkeeping owns, token ids not counted. Walks the tree.
    pub fn bytes(&self) -> usize {
        self.pages.bytes() + self.tree.bytes() + self.sequences.bytes() + self.history.bytes() + self.pins.bytes()
    }

    /// Keep a finished plan's vectors.
    fn retire(&mut self, mut plan: Plan) {
        plan.reset();
        self.spare = Some(plan);
    }
}

/// Refuse token ids that int32 cannot hold. `base` is where the slice stands in the argument.
pub fn check_tokens(tokens: &[u32], base: usize) -> Result<()> {
    if tokens.iter().fold(0, |bits, token| bits | token) <= MAX_TOKEN {
        return Ok(());
    }
    match tokens.iter().position(|token| *token > MAX_TOKEN) {
        Some(offset) => Err(Error::Token { index: base + offset, value: tokens[offset] }),
        None => Ok(()),
    }
}

/// What a handle leaves behind that goes while its pool is at work.
pub enum Left {
    /// A sequence to close.
    Sequence(SequenceId),
    /// A pin to let go of.
    Pin(PinId),
    /// A plan to abandon.
    Plan(Box<Plan>),
}

impl Settle for Pool {
    type Left = Left;

    fn settle(&mut self, left: Left) {
        match left {
            Left::Sequence(id) => self.close(id),
            Left::Pin(id) => self.unpin(id),
            Left::Plan(plan) => self.abandon(*plan),
        }
    }
}
