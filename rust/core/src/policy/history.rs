//! Blocks that left: their keys, never data, and when and why they left.
//!
//! What leaves a text together stands side by side in a ring of keys, and only the first of such a run is in
//! the table, with the time and the reason. Leaves leave first, so a block is remembered only while those
//! before it are, or are in the tree: a text that was never seen costs one look, whatever its length, and
//! one that comes back is followed along the ring.

use hashbrown::HashTable;

use super::keys::Keys;
use crate::ids::{Namespace, PageId};

/// Keys remembered for every page of the pool.
const GHOSTS_PER_PAGE: usize = 4;
/// And at least so many: a small cache is where remembering helps most, and this is half a MiB.
const LEAST_GHOSTS: usize = 1 << 16;
/// Set in the ring at the first block of a run, which is in the table.
const HEAD: u64 = 1 << 63;

/// Why a block left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A step needed its page, and it was the least recently used.
    Recency,
    /// A step needed its page, and it was the least likely to be wanted soon.
    Survival,
    /// It had no more time to live.
    Expired,
    /// It was of a lower priority than what nobody spoke of.
    Priority,
    /// It was asked to leave: in the background, by clearing, or with its namespace.
    Asked,
}

impl Cause {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Recency, Self::Survival, Self::Expired, Self::Priority, Self::Asked];

    /// One word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Recency => "lru",
            Self::Survival => "survival",
            Self::Expired => "ttl",
            Self::Priority => "priority",
            Self::Asked => "asked",
        }
    }
}

/// A block that left: where it stands in the ring, and when and why its run left.
#[derive(Clone, Copy)]
pub(crate) struct Ghost {
    pub slot: u32,
    pub cause: Cause,
    pub left: u64,
}

/// How far blocks that come into the tree one behind the other were followed among those that left.
#[derive(Default)]
pub(crate) enum Trail {
    /// The next one may be among them.
    #[default]
    Open,
    /// This one was, so the next one may stand behind it.
    At(Ghost),
    /// One was not, so no later one is.
    Lost,
}

/// Keys by page, and the ring, in which the oldest are forgotten first.
pub(crate) struct History {
    keys: Keys,
    by_page: Vec<u64>,
    /// 0 where a block came back.
    ring: Vec<u64>,
    /// Where the next one goes.
    end: usize,
    most: usize,
    remembered: usize,
    heads: HashTable<Ghost>,
}

impl History {
    pub(crate) fn new(num_pages: usize, seed: u64) -> Self {
        Self {
            keys: Keys::new(seed),
            by_page: vec![0; num_pages],
            ring: Vec::new(),
            end: 0,
            most: (GHOSTS_PER_PAGE * num_pages).max(LEAST_GHOSTS),
            remembered: 0,
            heads: HashTable::new(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        (self.by_page.capacity() + self.ring.capacity()) * size_of::<u64>() + self.heads.allocation_size()
    }

    /// Blocks that left and are remembered.
    pub(crate) fn num_ghosts(&self) -> usize {
        self.remembered
    }

    /// The key of nothing: above a namespace's first block.
    pub(crate) fn root(&self, namespace: Namespace) -> u64 {
        self.keys.root(namespace)
    }

    /// The key of the block that follows `key` and holds `tokens`.
    pub(crate) fn follow(&self, key: u64, tokens: &[u32]) -> u64 {
        self.keys.follow(key, tokens)
    }

    /// The key of the block in a page.
    pub(crate) fn key(&self, page: PageId) -> u64 {
        self.by_page[page.index()]
    }

    /// A page holds the block with this key, whatever it held before.
    pub(crate) fn name(&mut self, page: PageId, key: u64) {
        self.by_page[page.index()] = key;
    }

    /// What is remembered of a block that left; `before` is what is remembered of the one before it.
    pub(crate) fn find(&self, key: u64, before: Option<Ghost>) -> Option<Ghost> {
        let behind = before.map(|ghost| Ghost { slot: self.behind(ghost.slot), ..ghost });
        behind.filter(|ghost| self.ring.get(ghost.slot as usize) == Some(&key)).or_else(|| {
            let found = self.heads.find(key, |ghost| self.ring[ghost.slot as usize] == key | HEAD);
            found.copied()
        })
    }

    /// A block came into the tree with this page, `trail` after the one before it. Returns its slot when it
    /// had been there before.
    #[inline]
    pub(crate) fn enter(&mut self, page: PageId, key: u64, trail: &mut Trail) -> Option<u32> {
        self.by_page[page.index()] = key;
        let before = match trail {
            Trail::Lost => return None,
            Trail::Open => None,
            Trail::At(ghost) => Some(*ghost),
        };
        self.take(key, before, trail)
    }

    fn take(&mut self, key: u64, before: Option<Ghost>, trail: &mut Trail) -> Option<u32> {
        let found = self.find(key, before);
        if before.is_some_and(|before| found.is_none_or(|found| found.slot != self.behind(before.slot))) {
            self.close(trail);
        }
        *trail = found.map_or(Trail::Lost, Trail::At);
        let slot = found?.slot;
        if std::mem::take(&mut self.ring[slot as usize]) & HEAD != 0 {
            self.forget_head(slot, key);
        }
        self.remembered -= 1;
        Some(slot)
    }

    /// No more blocks come behind these. What is left of the run that they were followed along is a run of
    /// its own from now on.
    pub(crate) fn close(&mut self, trail: &mut Trail) {
        let Trail::At(ghost) = std::mem::take(trail) else { return };
        let slot = self.behind(ghost.slot);
        if let Some(key) = self.ring.get(slot as usize).copied()
            && slot as usize != self.end
            && key & HEAD == 0
            && key != 0
        {
            self.set_head(key, Ghost { slot, ..ghost });
        }
    }

    /// Blocks left the tree together, one behind the other. Returns the slot of the first one.
    pub(crate) fn bury(&mut self, keys: &[u64], left: u64, cause: Cause) -> u32 {
        let (first, most) = (self.end, self.most);
        for key in keys {
            if self.ring.len() < most {
                self.ring.push(*key);
            } else {
                let slot = self.end;
                let forgotten = std::mem::replace(&mut self.ring[slot], *key);
                self.remembered -= usize::from(forgotten != 0);
                if forgotten & HEAD != 0 {
                    self.forget_head(slot as u32, forgotten & !HEAD);
                }
            }
            self.end = if self.end + 1 == most { 0 } else { self.end + 1 };
        }
        self.remembered += keys.len();
        if let Some(key) = keys.first() {
            self.set_head(*key, Ghost { slot: first as u32, cause, left });
        }
        first as u32
    }

    /// The slot of the block behind another one of its run.
    pub(crate) fn behind(&self, slot: u32) -> u32 {
        if slot as usize + 1 == self.most { 0 } else { slot + 1 }
    }

    fn set_head(&mut self, key: u64, ghost: Ghost) {
        self.ring[ghost.slot as usize] = key | HEAD;
        let ring = &self.ring;
        // One that is known already came back and left again while the way to it was lost.
        let is_it = |other: &Ghost| ring[other.slot as usize] == key | HEAD;
        let entry = self.heads.entry(key, is_it, |other| ring[other.slot as usize] & !HEAD);
        entry.and_modify(|other| *other = ghost).or_insert(ghost);
    }

    fn forget_head(&mut self, slot: u32, key: u64) {
        if let Ok(entry) = self.heads.find_entry(key, |ghost| ghost.slot == slot) {
            entry.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAUSE: Cause = Cause::Recency;

    fn history() -> History {
        History::new(8, 1)
    }

    fn text(history: &History, from: u64, blocks: &[u32]) -> Vec<u64> {
        let mut key = from;
        let follow = |block: &u32| {
            key = history.follow(key, &[*block]);
            key
        };
        blocks.iter().map(follow).collect()
    }

    /// How many of a text's first blocks are remembered.
    fn known(history: &History, keys: &[u64]) -> usize {
        let mut before = None;
        let is_known = |key: &&u64| {
            before = history.find(**key, before);
            before.is_some()
        };
        keys.iter().take_while(is_known).count()
    }

    fn enter(history: &mut History, keys: &[u64]) -> usize {
        let mut trail = Trail::default();
        let back = keys.iter().filter(|key| history.enter(PageId(0), **key, &mut trail).is_some()).count();
        history.close(&mut trail);
        back
    }

    #[test]
    fn the_rest_of_a_run_is_found_after_its_beginning_came_back() {
        let mut history = history();
        let keys = text(&history, history.root(Namespace(0)), &[1, 2, 3, 4, 5, 6]);
        history.bury(&keys, 10, CAUSE);
        assert_eq!((known(&history, &keys), history.num_ghosts()), (6, 6));
        assert_eq!(enter(&mut history, &keys[..2]), 2);
        assert_eq!((known(&history, &keys[..2]), known(&history, &keys[2..])), (0, 4));
        assert_eq!(history.find(keys[2], None).map(|ghost| ghost.left), Some(10));
        assert_eq!(enter(&mut history, &keys[2..]), 4);
        assert_eq!(history.num_ghosts(), 0);
    }

    #[test]
    fn a_text_that_left_in_pieces_comes_back_whole_and_one_that_branches_off_does_not() {
        let mut history = history();
        let root = history.root(Namespace(0));
        let keys = text(&history, root, &[1, 2, 3, 4, 5]);
        let other = text(&history, keys[2], &[8, 9]);
        for piece in [&keys[3..], &other, &keys[1..3], &keys[..1]] {
            history.bury(piece, 10, CAUSE);
        }
        assert_eq!(known(&history, &keys), 5);
        let mut strange = keys[..3].to_vec();
        strange.extend(text(&history, keys[2], &[7, 9]));
        assert_eq!(known(&history, &strange), 3);
        assert_eq!(enter(&mut history, &strange), 3);
        assert_eq!((known(&history, &keys[3..]), known(&history, &other)), (2, 2));
        assert_eq!(enter(&mut history, &[&keys[3..], &other].concat()), 4);
    }

    #[test]
    fn what_left_first_is_forgotten_first_and_nothing_else() {
        let mut history = history();
        let root = history.root(Namespace(0));
        let texts: Vec<Vec<u64>> =
            (0..LEAST_GHOSTS as u32).map(|number| text(&history, root, &[number, 1, 2])).collect();
        for keys in &texts {
            history.bury(keys, 10, CAUSE);
        }
        assert_eq!(history.num_ghosts(), LEAST_GHOSTS);
        let remembered = LEAST_GHOSTS / 3;
        let (old, young) = texts.split_at(texts.len() - remembered);
        assert!(old.iter().all(|keys| known(&history, keys) == 0));
        assert!(young.iter().all(|keys| known(&history, keys) == 3));
        assert_eq!(history.heads.len(), remembered);
        let back: usize = young.iter().map(|keys| enter(&mut history, keys)).sum();
        assert_eq!((back, history.heads.len()), (3 * remembered, 0));
        assert_eq!(history.num_ghosts(), LEAST_GHOSTS - 3 * remembered, "the rest of a run whose head is gone");
    }

    #[test]
    fn a_block_that_came_back_by_another_way_and_left_again_is_remembered_as_of_then() {
        let mut history = history();
        let keys = text(&history, history.root(Namespace(0)), &[1, 2]);
        history.bury(&keys, 10, CAUSE);
        history.bury(&keys[..1], 20, Cause::Asked);
        let found = history.find(keys[0], None).map(|ghost| (ghost.left, ghost.cause));
        assert_eq!(found, Some((20, Cause::Asked)));
        for round in 0..=LEAST_GHOSTS as u64 {
            let keys = text(&history, round, &[7, 8]);
            history.bury(&keys, 30, CAUSE);
        }
        assert_eq!(known(&history, &keys), 0);
        assert_eq!(history.heads.len(), LEAST_GHOSTS / 2);
    }
}
