//! Counters, kept as things happen, so that asking is free.

use crate::policy::Cause;

/// What only ever grows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub opens: u64,
    pub queried_tokens: u64,
    pub cached_tokens: u64,
    pub evicted_pages: u64,
    pub sealed_pages: u64,
    pub duplicate_pages: u64,
    pub copied_pages: u64,
    pub demoted_pages: u64,
    pub lowered_pages: u64,
    pub refused_pages: u64,
    pub plans: u64,
    pub abandoned_plans: u64,
    pub returned_pages: u64,
    /// Pages evicted, by `Cause`.
    pub evicted_by: [u64; Cause::ALL.len()],
}

macro_rules! statistics {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// The state of a pool in numbers. Pages are counted by what they are now; the totals
        /// (from `opens` on) only grow.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Statistics {
            $($(#[doc = $doc])+ pub $name: u64,)+
        }

        impl Statistics {
            /// Names and values, in declaration order.
            pub fn items(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
                [$((stringify!($name), self.$name),)+].into_iter()
            }
        }
    };
}

statistics! {
    /// Pages of the pool.
    num_pages,
    /// Those of them that are quantized.
    num_quantized_pages,
    /// Those of these that are of the lowest class of a ladder of three.
    num_lowest_pages,
    /// Pages that hold nothing.
    free_pages,
    /// Quantized pages that hold nothing.
    free_quantized_pages,
    /// Those of them that are of the lowest class.
    free_lowest_pages,
    /// Private pages, those reserved by open plans included.
    mutable_pages,
    /// Pages in the tree.
    sealed_pages,
    /// Pages that more than one sequence holds or pins.
    shared_pages,
    /// Pages in the tree that a sequence pins.
    pinned_pages,
    /// Pages in the tree that may leave.
    evictable_pages,
    /// Open sequences.
    sequences,
    /// Nodes of the tree, roots included.
    nodes,
    /// Sequences opened.
    opens,
    /// Tokens they were opened with.
    queried_tokens,
    /// Tokens of those that were found.
    cached_tokens,
    /// Pages evicted.
    evicted_pages,
    /// Pages that entered the tree.
    sealed_total,
    /// Pages freed at commit because an equal block had been sealed meanwhile.
    duplicate_pages,
    /// Pages copied before a write.
    copied_pages,
    /// Pages that gave their place to a quantized copy, or to one in fewer bits.
    demoted_pages,
    /// Those of them that were quantized before.
    lowered_pages,
    /// Pages that the codec refused: they stay in their class.
    refused_pages,
    /// Plans made.
    plans,
    /// Plans abandoned.
    abandoned_plans,
    /// Pages that entered the tree again after they had been evicted, as far as that is remembered.
    returned_pages,
    /// Evicted blocks whose ids are remembered.
    ghosts,
    /// Pins that users hold.
    user_pins,
    /// Pages that they hold.
    user_pinned_pages,
    /// Pages that they may hold.
    most_user_pinned_pages,
    /// Of the pages evicted, those that were the least recently used when room was needed.
    evicted_lru_pages,
    /// Those that were the least likely to be wanted soon.
    evicted_survival_pages,
    /// Those whose time was over.
    evicted_ttl_pages,
    /// Those that were of a lower priority than the usual one.
    evicted_priority_pages,
    /// Those that were asked to leave.
    evicted_asked_pages,
}
