//! The invariants of the pool, verified against everything that holds a page.

use super::Pool;
use crate::error::{Error, Result};
use crate::ids::PageId;

impl Pool {
    /// Verify every invariant and name the one that broke. Costs the pool: for tests.
    pub fn check(&self) -> Result<()> {
        let broken = |what: String| Err(Error::Broken(what));
        let (lasting, pins) = (self.pins.anchors(true), self.pins.anchors(false));
        let anchors = self.sequences.iter().map(|(_, sequence)| sequence.anchor);
        let in_tree = self.tree.check(anchors.chain(pins.clone()).chain(lasting.clone()), lasting, pins)?;
        let mut held: Vec<Option<u32>> = vec![Some(0); self.num_pages()];
        for page in in_tree {
            if held[page.index()].take().is_none() {
                return broken(format!("page {} stands twice in the tree", page.0));
            }
        }
        for (_, sequence) in self.sequences.iter() {
            let sealed = (sequence.sealed >> self.shift) as usize;
            let mut path = vec![PageId(0); sealed];
            self.tree.copy_pages(sequence.anchor, &mut path);
            if sequence.table[..sealed] != path {
                return broken(format!("a table holds {:?}, its path {path:?}", &sequence.table[..sealed]));
            }
            let pages = (sequence.length as usize).div_ceil(1 << self.shift);
            if !sequence.planned && (pages != sequence.table.len() || sequence.replaced.is_some()) {
                return broken(format!("{} pages for {} tokens", sequence.table.len(), sequence.length));
            }
            if sequence.length > sequence.known() || sequence.sealed > sequence.length {
                return broken(format!("{} sealed of {} tokens", sequence.sealed, sequence.length));
            }
            let whole = (sequence.length >> self.shift) as usize;
            let own = sequence.table.iter().enumerate().skip(whole.max(sealed));
            for (block, page) in own.filter(|(_, page)| self.pages.is_mutable(**page)) {
                // A sequence that was cut goes on from a copy, and until a step writes it stands on the page it had.
                let is_cut = sequence.replaced.is_none() && block == whole;
                if self.pages.classes().is_quantized(*page) && !is_cut {
                    return broken(format!("quantized page {} is written, as block {block}", page.0));
                }
            }
            for page in sequence.table[sealed..].iter().chain(&sequence.replaced) {
                if let Some(count) = &mut held[page.index()] {
                    *count += 1;
                }
            }
        }
        let mut kept = 0; // by plans that were not filled
        for (page, expected) in (0..).map(PageId).zip(&held) {
            let holders = self.pages.holders(page);
            let is_kept = self.pages.is_set_aside(page) && *expected == Some(0);
            kept += usize::from(is_kept);
            if holders != *expected && !is_kept {
                return broken(format!("page {} has {holders:?} holders for {expected:?}", page.0));
            }
        }
        let shared = held.iter().flatten().filter(|count| **count > 1).count();
        if shared != self.pages.num_shared() {
            return broken(format!("{} private pages counted as shared of {shared}", self.pages.num_shared()));
        }
        let private = held.iter().flatten().filter(|count| **count > 0).count() + kept;
        if private != self.pages.num_private() {
            return broken(format!("{} pages counted as private of {private}", self.pages.num_private()));
        }
        let classes = self.pages.classes();
        let mut free: Vec<PageId> = self.pages.free_pages().concat();
        for (class, pages) in self.pages.free_pages().iter().enumerate() {
            if let Some(page) = pages.iter().find(|page| classes.of(**page) != class) {
                return broken(format!("page {} is free among those of class {class}", page.0));
            }
        }
        free.sort_unstable();
        free.dedup();
        let unheld = held.iter().filter(|count| **count == Some(0)).count() - kept;
        if free.len() != self.num_free() || unheld != free.len() {
            return broken(format!("{} pages on the free lists of {unheld}", self.num_free()));
        }
        if free.iter().any(|page| held[page.index()] != Some(0)) {
            return broken("a page on a free list is in use".into());
        }
        Ok(())
    }
}
