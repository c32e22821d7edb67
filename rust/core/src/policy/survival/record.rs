//! Samples of what became of blocks: when one was used, and when it was used again.

/// Features of a block at the moment of its use; each picks one weight of its row.
pub(super) const FEATURES: usize = 12;
/// Records kept, the oldest overwritten: 1 MiB.
pub(super) const RECORDS: usize = 1 << 15;

/// Records a text, on average: its blocks fare alike, so more of them say little new, and leave less room
/// for other texts.
const RECORDS_A_TEXT: u64 = 4;
/// Pages of the pool for which the blocks that the records were sampled from must suffice so many times: what
/// is wanted again after a page's usual stay must be seen to be.
const STAYS: usize = 16;
/// Records after which there is an average to go by.
const ENOUGH: u64 = 1024;

/// One use of a sampled block.
#[derive(Clone, Copy)]
pub(super) struct Record {
    /// When; 0 is a record that was thinned out.
    pub used: u64,
    /// When it was used again; 0 is not yet.
    pub again: u64,
    pub features: [u8; FEATURES],
    /// The bits of the block's key that sampling goes by.
    pub key: u8,
}

impl Record {
    /// How long it was watched, and whether the block was wanted again then.
    pub(super) fn watched(&self, now: u64) -> (u64, bool) {
        let is_back = self.again > 0;
        (if is_back { self.again } else { now }.saturating_sub(self.used), is_back)
    }
}

/// The latest records.
#[derive(Clone, Default)]
pub(super) struct Records {
    ring: Vec<Record>,
    /// Records ever made.
    pub(super) count: u64,
    /// Blocks are sampled whose keys have these bits 0: fewer and fewer, never more again.
    mask: u8,
    texts: u64,
    blocks: u64,
}

impl Records {
    /// For a pool of so many pages.
    pub(super) fn new(num_pages: usize) -> Self {
        let rate = (STAYS * num_pages / RECORDS).clamp(1, 256);
        Self { mask: ((1u64 << rate.ilog2()) - 1) as u8, ..Self::default() }
    }

    pub(super) fn is_sampled(&self, key: u64) -> bool {
        key as u8 & self.mask == 0
    }

    /// A text of so many blocks ended. Samples fewer blocks from now on where texts turn out long, and
    /// forgets what it would not have sampled: else the time when it sampled more would count for more.
    pub(super) fn note_text(&mut self, blocks: usize) {
        self.texts += 1;
        self.blocks += blocks as u64;
        let rate = (self.blocks / self.texts / RECORDS_A_TEXT).clamp(1, 256);
        let mask = ((1u64 << rate.ilog2()) - 1) as u8;
        if self.count >= ENOUGH && mask > self.mask {
            self.mask = mask;
            for record in self.ring.iter_mut().filter(|record| record.key & mask != 0) {
                record.used = 0;
            }
        }
    }

    /// Add a record and return its number.
    pub(super) fn push(&mut self, record: Record) -> u64 {
        let number = self.count;
        self.count += 1;
        if self.ring.len() < RECORDS {
            self.ring.push(record);
        } else {
            self.ring[number as usize % RECORDS] = record;
        }
        number
    }

    /// A record by its low 32 bits, unless it was overwritten.
    pub(super) fn get_mut(&mut self, low: u32) -> Option<&mut Record> {
        let behind = (self.count as u32).wrapping_sub(low) as usize;
        if behind == 0 || behind > self.ring.len() {
            return None;
        }
        let number = self.count - behind as u64;
        self.ring.get_mut(number as usize % RECORDS)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Record> {
        self.ring.iter().filter(|record| record.used > 0)
    }

    pub(super) fn bytes(&self) -> usize {
        self.ring.capacity() * size_of::<Record>()
    }
}
