//! Newtypes for ids, so that a page is never taken for a node.

/// The physical room of one block in this tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

impl PageId {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// The two classes of pages: ids below `num_full` are of full precision, those behind are quantized.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Classes {
    pub num_full: u32,
    pub num_quantized: u32,
}

impl Classes {
    pub(crate) fn total(self) -> u32 {
        self.num_full + self.num_quantized
    }

    pub(crate) fn is_quantized(self, page: PageId) -> bool {
        page.0 >= self.num_full
    }

    /// How many of these pages are quantized.
    pub(crate) fn count(self, pages: &[PageId]) -> usize {
        if self.num_quantized == 0 { 0 } else { pages.iter().filter(|page| self.is_quantized(**page)).count() }
    }
}

/// A run of tokens in the tree. Ids are slots of a slab and are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct NodeId(pub u32);

impl NodeId {
    /// No node: the end of a list, the parent of a root.
    pub(crate) const NONE: Self = Self(u32::MAX);

    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }

    pub(crate) fn is_none(self) -> bool {
        self == Self::NONE
    }

    pub(crate) fn is_some(self) -> bool {
        self != Self::NONE
    }
}

/// A running text. The generation tells a closed sequence from the next one in its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceId {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

impl std::fmt::Display for SequenceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.index, self.generation)
    }
}

/// Who may share with whom: prefixes are found within one namespace only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Namespace(pub u64);
