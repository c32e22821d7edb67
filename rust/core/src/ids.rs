//! Newtypes for ids, so that a page is never taken for a node.

/// The physical room of one block in this tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

impl PageId {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Classes of pages, and steps from one to the next: full precision, and up to two of records.
pub(crate) const CLASSES: usize = 3;
pub(crate) const STEPS: usize = CLASSES - 1;

/// How many pages there are of each class. Ids tell them apart: those of full precision come first, then the
/// quantized ones, the lowest class last. Pages step down one class at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Classes(pub [u32; CLASSES]);

impl Classes {
    pub(crate) fn total(self) -> u32 {
        self.0.iter().sum()
    }

    pub(crate) fn of(self, page: PageId) -> usize {
        usize::from(page.0 >= self.0[0]) + usize::from(page.0 >= self.0[0] + self.0[1])
    }

    pub(crate) fn is_quantized(self, page: PageId) -> bool {
        page.0 >= self.0[0]
    }

    /// True when pages of this class can step down.
    pub(crate) fn has_below(self, class: usize) -> bool {
        class + 1 < CLASSES && self.0[class + 1] > 0
    }

    /// How many of these pages are in each of the quantized classes.
    pub(crate) fn count(self, pages: &[PageId]) -> [u32; STEPS] {
        let mut counts = [0; STEPS];
        if self.has_below(0) {
            for class in pages.iter().filter_map(|page| self.of(*page).checked_sub(1)) {
                counts[class] += 1;
            }
        }
        counts
    }
}

/// A run of tokens in the tree. Ids are slots of a slab and are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
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
