//! The life of pages: free, private to one or more sequences, or in the tree.
//!
//! A private page with one holder is mutable; with more it is shared and must be copied before a
//! write. A page in the tree is sealed: immutable, and pinned by nodes rather than counted here.
//!
//! Pages are of several classes, told by their id: the first ones are of full precision and take what is
//! computed, the others are quantized and hold a whole block that was sealed before. A page keeps its class.

use crate::ids::{CLASSES, Classes, PageId};

/// Holders of a private page; 0 is free, `IN_TREE` belongs to a node, `SET_ASIDE` to a plan alone.
type Holders = u32;

const FREE: Holders = 0;
const IN_TREE: Holders = u32::MAX;
const SET_ASIDE: Holders = u32::MAX - 1;

fn is_private(holders: Holders) -> bool {
    holders != FREE && holders != IN_TREE
}

pub(crate) struct Pages {
    holders: Vec<Holders>,
    classes: Classes,
    /// Stacks, one a class. Runs are pushed backwards, so that they are taken in ascending order: attention
    /// reads neighbouring pages as one view.
    free: [Vec<PageId>; CLASSES],
    shared: usize,
    /// Pages that are neither free nor in the tree, counted as they come and go.
    private: usize,
}

impl Pages {
    pub(crate) fn new(classes: Classes) -> Self {
        let mut first = 0;
        let free = classes.0.map(|count| {
            first += count;
            (first - count..first).rev().map(PageId).collect()
        });
        Self { holders: vec![FREE; classes.total() as usize], classes, free, shared: 0, private: 0 }
    }

    pub(crate) fn classes(&self) -> Classes {
        self.classes
    }

    /// Free pages of a class.
    pub(crate) fn num_free(&self, class: usize) -> usize {
        self.free[class].len()
    }

    /// Pages that sequences hold, or a plan alone.
    pub(crate) fn num_private(&self) -> usize {
        self.private
    }

    /// Note how a page is held now.
    fn put(&mut self, page: PageId, holders: Holders) {
        let before = std::mem::replace(&mut self.holders[page.index()], holders);
        self.private += usize::from(is_private(holders));
        self.private -= usize::from(is_private(before));
    }

    /// Private pages with more than one holder.
    pub(crate) fn num_shared(&self) -> usize {
        self.shared
    }

    pub(crate) fn bytes(&self) -> usize {
        self.holders.capacity() * size_of::<Holders>()
            + self.free.iter().map(Vec::capacity).sum::<usize>() * size_of::<PageId>()
    }

    /// Append `count` free pages of full precision to `out`, private from now on. The caller asked `num_free` first.
    pub(crate) fn take(&mut self, count: usize, out: &mut Vec<PageId>) {
        let (start, free) = (out.len(), &mut self.free[0]);
        out.extend(free.drain(free.len() - count..).rev());
        for page in &out[start..] {
            self.put(*page, 1);
        }
    }

    /// Take a free page of a class, private from now on.
    pub(crate) fn take_one(&mut self, class: usize) -> Option<PageId> {
        let page = self.free[class].pop()?;
        self.put(page, 1);
        Some(page)
    }

    /// Take this very page off its free list. Searches the list.
    pub(crate) fn take_back(&mut self, page: PageId) {
        self.free_list(page).retain(|free| *free != page);
        self.put(page, 1);
    }

    fn free_list(&mut self, page: PageId) -> &mut Vec<PageId> {
        &mut self.free[self.classes.of(page)]
    }

    /// Have `to` held as `from` is, and make `from` private to one holder.
    pub(crate) fn hand_over(&mut self, from: PageId, to: PageId) {
        let holders = self.holders[from.index()];
        self.put(from, 1);
        self.put(to, holders);
    }

    /// Make pages that left the tree private to one holder.
    pub(crate) fn claim(&mut self, pages: &[PageId]) {
        for page in pages {
            self.put(*page, 1);
        }
    }

    /// Keep pages that left the tree for the plan that condemned them.
    pub(crate) fn set_aside(&mut self, pages: &[PageId]) {
        for page in pages {
            self.put(*page, SET_ASIDE);
        }
    }

    pub(crate) fn is_set_aside(&self, page: PageId) -> bool {
        self.holders[page.index()] == SET_ASIDE
    }

    /// Free pages whatever they were; they are taken again in the order given.
    pub(crate) fn free(&mut self, pages: &[PageId]) {
        for page in pages {
            self.put(*page, FREE);
        }
        for page in pages.iter().rev() {
            self.free_list(*page).push(*page);
        }
    }

    /// Hand a page over to the tree.
    pub(crate) fn seal(&mut self, page: PageId) {
        self.put(page, IN_TREE);
    }

    pub(crate) fn is_in_tree(&self, page: PageId) -> bool {
        self.holders[page.index()] == IN_TREE
    }

    /// True when one sequence alone holds the page.
    pub(crate) fn is_mutable(&self, page: PageId) -> bool {
        self.holders[page.index()] == 1
    }

    /// True when a write into the page would be seen by someone else, or would have to be quantized.
    pub(crate) fn must_copy(&self, page: PageId) -> bool {
        self.holders[page.index()] > 1 || self.classes.is_quantized(page)
    }

    pub(crate) fn is_free(&self, page: PageId) -> bool {
        self.holders[page.index()] == FREE
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
                self.put(page, FREE);
                self.free_list(page).push(page);
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

    /// Free pages of each class.
    pub(crate) fn free_pages(&self) -> &[Vec<PageId>; CLASSES] {
        &self.free
    }
}
