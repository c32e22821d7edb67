//! Two small caches that hold no data, one in order of recency and one in the learned order: what each
//! would have hit. A sample of the blocks, by key, in as much smaller a cache.

use hashbrown::HashTable;

use super::curves::Curves;
use super::ranking::{DEPTHS, Ranking, Standing};

/// Blocks that a shadow holds at most.
const MOST: usize = 4096;
const NONE: u32 = u32::MAX;
/// The two orders.
const RECENT: usize = 0;
const LEARNED: usize = 1;

#[derive(Clone, Copy)]
struct Block {
    key: u64,
    standing: Standing,
    /// The next sampled block above.
    parent: u32,
    /// In which shadow it is, and how many sampled blocks there follow it.
    is_in: [bool; 2],
    kids: [u32; 2],
    /// The touch that it was last part of.
    touch: u64,
}

/// Both shadows over one set of blocks.
pub(super) struct Shadows {
    blocks: Vec<Block>,
    vacant: Vec<u32>,
    by_key: HashTable<u32>,
    rankings: [Ranking; 2],
    held: [usize; 2],
    capacity: usize,
    /// A block is sampled when these bits of its key are 0.
    mask: u64,
    touch: u64,
    path: Vec<u32>,
}

impl Shadows {
    pub(super) fn new(num_pages: usize, weights: [f32; DEPTHS]) -> Self {
        let rate = num_pages.div_ceil(MOST).next_power_of_two();
        Self {
            blocks: Vec::new(),
            vacant: Vec::new(),
            by_key: HashTable::new(),
            rankings: [Ranking::new([0.0; DEPTHS]), Ranking::new(weights)],
            held: [0; 2],
            capacity: (num_pages / rate).max(1),
            // Not the low bits: records are sampled by those.
            mask: (rate as u64 - 1) << 20,
            touch: 0,
            path: Vec::new(),
        }
    }

    pub(super) fn is_sampled(&self, key: u64) -> bool {
        key & self.mask == 0
    }

    /// Blocks that a shadow may hold.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(super) fn bytes(&self) -> usize {
        self.blocks.capacity() * size_of::<Block>()
            + self.by_key.allocation_size()
            + self.rankings.iter().map(Ranking::bytes).sum::<usize>()
    }

    /// A text used these sampled blocks, from its beginning on. Returns how many each shadow had.
    pub(super) fn touch(&mut self, sampled: &[(u64, Standing)], curves: &Curves, now: u64) -> [u32; 2] {
        self.touch += 1;
        let mut path = std::mem::take(&mut self.path);
        path.clear();
        let mut parent = NONE;
        for (key, standing) in &sampled[..sampled.len().min(self.capacity)] {
            let slot = self.find_or_add(*key, parent);
            self.blocks[slot as usize].standing = *standing;
            self.blocks[slot as usize].touch = self.touch;
            path.push(slot);
            parent = slot;
        }
        let hits = [RECENT, LEARNED].map(|which| self.serve(which, &path, curves, now));
        for slot in &path {
            self.drop_if_unused(*slot);
        }
        self.path = path;
        hits
    }

    fn serve(&mut self, which: usize, path: &[u32], curves: &Curves, now: u64) -> u32 {
        let hits = path.iter().take_while(|slot| self.blocks[**slot as usize].is_in[which]).count();
        for slot in path {
            self.rankings[which].set(*slot, None);
        }
        for slot in &path[hits..] {
            while self.held[which] >= self.capacity {
                let victim = match which {
                    RECENT => self.rankings[RECENT].oldest(),
                    _ => self.rankings[LEARNED].lowest(curves, now),
                };
                let Some(victim) = victim else { return hits as u32 };
                self.evict(which, victim);
            }
            self.held[which] += 1;
            let Block { parent, .. } = self.blocks[*slot as usize];
            self.blocks[*slot as usize].is_in[which] = true;
            if parent != NONE {
                self.blocks[parent as usize].kids[which] += 1;
            }
        }
        for slot in path {
            self.rank(which, *slot);
        }
        hits as u32
    }

    fn evict(&mut self, which: usize, slot: u32) {
        self.held[which] -= 1;
        self.rankings[which].set(slot, None);
        let block = &mut self.blocks[slot as usize];
        block.is_in[which] = false;
        let parent = block.parent;
        if parent != NONE {
            self.blocks[parent as usize].kids[which] -= 1;
            if self.blocks[parent as usize].touch != self.touch {
                self.rank(which, parent);
            }
        }
        if self.blocks[slot as usize].touch != self.touch {
            self.drop_if_unused(slot);
        }
    }

    fn rank(&mut self, which: usize, slot: u32) {
        let block = &self.blocks[slot as usize];
        let is_leaf = block.is_in[which] && block.kids[which] == 0;
        let standing = match which {
            // One class, so that the oldest is found at once.
            RECENT => Standing { class: 0, last: block.standing.last },
            _ => block.standing,
        };
        self.rankings[which].set(slot, is_leaf.then_some(standing));
    }

    fn find_or_add(&mut self, key: u64, parent: u32) -> u32 {
        let blocks = &self.blocks;
        if let Some(slot) = self.by_key.find(key, |slot| blocks[*slot as usize].key == key) {
            return *slot;
        }
        let block = Block { key, standing: Standing::default(), parent, is_in: [false; 2], kids: [0; 2], touch: 0 };
        let slot = if let Some(slot) = self.vacant.pop() {
            self.blocks[slot as usize] = block;
            slot
        } else {
            self.blocks.push(block);
            self.blocks.len() as u32 - 1
        };
        let blocks = &self.blocks;
        self.by_key.insert_unique(key, slot, |slot| blocks[*slot as usize].key);
        slot
    }

    fn drop_if_unused(&mut self, slot: u32) {
        let Block { key, is_in, .. } = self.blocks[slot as usize];
        if is_in != [false; 2] {
            return;
        }
        if let Ok(entry) = self.by_key.find_entry(key, |other| *other == slot) {
            entry.remove();
            self.vacant.push(slot);
        }
    }
}
