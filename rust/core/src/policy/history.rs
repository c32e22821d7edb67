//! What is remembered of blocks, those in the tree and those that left: ids and counts, never data.
//!
//! A block's key is a hash of its tokens and of all before them, so it names a text in one namespace.
//! A collision costs a wrong count or a wrong explanation, never a wrong page: nothing is found by it.

use hashbrown::HashTable;

use crate::ids::{Namespace, PageId};

/// Ids remembered for every page of the pool.
const GHOSTS_PER_PAGE: usize = 4;
/// And at least so many: a small cache is where remembering helps most, and this is 3 MiB.
const LEAST_GHOSTS: usize = 1 << 16;

/// Why a block left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A step needed its page, and it was the least recently used.
    Recency,
    /// A step needed its page, and it was the least likely to be wanted soon.
    Survival,
    /// It was asked to leave: in the background, by clearing, or with its namespace.
    Asked,
}

impl Cause {
    /// One word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Recency => "lru",
            Self::Survival => "survival",
            Self::Asked => "asked",
        }
    }
}

/// What is known of a block.
#[derive(Clone, Copy, Default)]
pub(crate) struct Mark {
    pub key: u64,
    /// When a prompt last ended with it; 0 is never.
    pub ended: u64,
    /// Its latest sample record, plus 1; 0 is none.
    pub record: u32,
    /// Texts that used it, up to 255.
    pub uses: u8,
    /// Different blocks that followed it, up to 255.
    pub kids: u8,
}

/// A block that left.
#[derive(Clone, Copy)]
pub(crate) struct Ghost {
    pub mark: Mark,
    pub left: u64,
    pub cause: Cause,
}

/// Marks by page, and ghosts, the oldest of which are forgotten first.
pub(crate) struct History {
    marks: Vec<Mark>,
    ghosts: Vec<Ghost>,
    /// Where the next ghost goes once the ring is full.
    oldest: usize,
    most: usize,
    by_key: HashTable<u32>,
    seed: u64,
}

impl History {
    pub(crate) fn new(num_pages: usize, seed: u64) -> Self {
        Self {
            marks: vec![Mark::default(); num_pages],
            ghosts: Vec::new(),
            oldest: 0,
            most: (GHOSTS_PER_PAGE * num_pages).max(LEAST_GHOSTS),
            by_key: HashTable::new(),
            seed,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.marks.capacity() * size_of::<Mark>()
            + self.ghosts.capacity() * size_of::<Ghost>()
            + self.by_key.allocation_size()
    }

    /// Blocks that left and are remembered.
    pub(crate) fn num_ghosts(&self) -> usize {
        self.by_key.len()
    }

    /// The key of nothing: above a namespace's first block.
    pub(crate) fn root(&self, namespace: Namespace) -> u64 {
        fold(self.seed ^ 0x9e37_79b9_7f4a_7c15, namespace.0)
    }

    /// The key of the block that follows `key` and holds `tokens`.
    pub(crate) fn follow(key: u64, tokens: &[u32]) -> u64 {
        let mut key = fold(key, tokens.len() as u64);
        let mut pairs = tokens.chunks_exact(2);
        for pair in &mut pairs {
            key = fold(key, u64::from(pair[0]) | u64::from(pair[1]) << 32);
        }
        pairs.remainder().iter().fold(key, |key, token| fold(key, u64::from(*token)))
    }

    pub(crate) fn mark(&self, page: PageId) -> &Mark {
        &self.marks[page.index()]
    }

    pub(crate) fn mark_mut(&mut self, page: PageId) -> &mut Mark {
        &mut self.marks[page.index()]
    }

    /// A block came into the tree with this page. Returns true when it had been there before.
    pub(crate) fn enter(&mut self, page: PageId, key: u64) -> bool {
        let ghosts = &self.ghosts;
        let found = self.by_key.find_entry(key, |slot| ghosts[*slot as usize].mark.key == key);
        let (mark, is_back) = match found {
            Ok(entry) => (ghosts[entry.remove().0 as usize].mark, true),
            Err(_) => (Mark { key, ..Mark::default() }, false),
        };
        self.marks[page.index()] = mark;
        is_back
    }

    /// A block left the tree.
    pub(crate) fn leave(&mut self, page: PageId, left: u64, cause: Cause) {
        let mark = std::mem::take(&mut self.marks[page.index()]);
        self.bury(mark, left, cause);
    }

    /// Remember a block that left.
    pub(crate) fn bury(&mut self, mark: Mark, left: u64, cause: Cause) {
        let key = mark.key;
        let ghost = Ghost { mark, left, cause };
        let slot = if self.ghosts.len() < self.most {
            self.ghosts.push(ghost);
            self.ghosts.len() - 1
        } else {
            let slot = self.oldest;
            self.oldest = if slot + 1 == self.most { 0 } else { slot + 1 };
            let forgotten = std::mem::replace(&mut self.ghosts[slot], ghost).mark.key;
            if let Ok(entry) = self.by_key.find_entry(forgotten, |other| *other as usize == slot) {
                entry.remove();
            }
            slot
        };
        let ghosts = &self.ghosts;
        let entry = self.by_key.entry(
            key,
            |other| ghosts[*other as usize].mark.key == key,
            |other| ghosts[*other as usize].mark.key,
        );
        entry.and_modify(|other| *other = slot as u32).or_insert(slot as u32);
    }

    /// What is remembered of a block that left.
    pub(crate) fn ghost(&self, key: u64) -> Option<&Ghost> {
        let slot = self.by_key.find(key, |slot| self.ghosts[*slot as usize].mark.key == key)?;
        Some(&self.ghosts[*slot as usize])
    }
}

/// Fold the 128-bit product: every input bit reaches both ends of the result.
fn fold(key: u64, word: u64) -> u64 {
    let product = u128::from(key ^ 0xa076_1d64_78bd_642f) * u128::from(word ^ 0xe703_7ed1_a0b4_28db);
    (product as u64) ^ ((product >> 64) as u64)
}
