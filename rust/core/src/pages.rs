//! The life of pages: free, private to one or more sequences, or in the tree.
//!
//! A private page with one holder is mutable; with more it is shared and must be copied before a
//! write. A page in the tree is sealed: full, immutable, and pinned by nodes rather than counted here.

use crate::ids::PageId;

/// Holders of a private page; 0 is free, `IN_TREE` belongs to a node.
type Holders = u32;

const FREE: Holders = 0;
const IN_TREE: Holders = u32::MAX;

pub(crate) struct Pages {
    holders: Vec<Holders>,
    /// A stack. Runs are pushed backwards, so that they are taken in ascending order: attention
    /// reads neighbouring pages as one view.
    free: Vec<PageId>,
    shared: usize,
}

impl Pages {
    pub(crate) fn new(num_pages: u32) -> Self {
        Self { holders: vec![FREE; num_pages as usize], free: (0..num_pages).rev().map(PageId).collect(), shared: 0 }
    }

    pub(crate) fn total(&self) -> usize {
        self.holders.len()
    }

    pub(crate) fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Private pages with more than one holder.
    pub(crate) fn num_shared(&self) -> usize {
        self.shared
    }

    pub(crate) fn bytes(&self) -> usize {
        self.holders.capacity() * size_of::<Holders>() + self.free.capacity() * size_of::<PageId>()
    }

    /// Append `count` free pages to `out`, private from now on. The caller asked `num_free` first.
    pub(crate) fn take(&mut self, count: usize, out: &mut Vec<PageId>) {
        let rest = self.free.len() - count;
        for page in self.free.drain(rest..).rev() {
            self.holders[page.index()] = 1;
            out.push(page);
        }
    }

    /// Make pages that left the tree private to one holder.
    pub(crate) fn claim(&mut self, pages: &[PageId]) {
        for page in pages {
            self.holders[page.index()] = 1;
        }
    }

    /// Free pages whatever they were; they are taken again in the order given.
    pub(crate) fn free(&mut self, pages: &[PageId]) {
        for page in pages {
            self.holders[page.index()] = FREE;
        }
        self.free.extend(pages.iter().rev());
    }

    /// Hand a page over to the tree.
    pub(crate) fn seal(&mut self, page: PageId) {
        self.holders[page.index()] = IN_TREE;
    }

    pub(crate) fn is_in_tree(&self, page: PageId) -> bool {
        self.holders[page.index()] == IN_TREE
    }

    /// True when one sequence alone holds the page.
    pub(crate) fn is_mutable(&self, page: PageId) -> bool {
        self.holders[page.index()] == 1
    }

    /// True when a write into the page would be seen by someone else.
    pub(crate) fn must_copy(&self, page: PageId) -> bool {
        self.holders[page.index()] > 1
    }

    /// Add a holder to a private page.
    pub(crate) fn hold(&mut self, page: PageId) {
        let holders = &mut self.holders[page.index()];
        *holders += 1;
        if *holders == 2 {
            self.shared += 1;
        }
    }

    /// Take one holder off a private page; the last one frees it. Pages in the tree are left alone.
    pub(crate) fn release(&mut self, page: PageId) {
        let holders = &mut self.holders[page.index()];
        match *holders {
            IN_TREE => {}
            1 => {
                *holders = FREE;
                self.free.push(page);
            }
            count => {
                *holders = count - 1;
                if count == 2 {
                    self.shared -= 1;
                }
            }
        }
    }

    /// Holders of every page, for `check`.
    pub(crate) fn holders(&self, page: PageId) -> Option<u32> {
        let holders = self.holders[page.index()];
        (holders != IN_TREE).then_some(holders)
    }

    pub(crate) fn free_pages(&self) -> &[PageId] {
        &self.free
    }
}
