//! Sequences: what a running text holds beyond the tree, and the slab they live in.

use crate::error::{Error, Result, SequenceLabel};
use crate::ids::{NodeId, PageId, STEPS, SequenceId};
use crate::policy::Turn;
use crate::retention::Retention;

/// Capacity that a closed sequence's vectors may keep for the next one in its slot.
const KEPT_CAPACITY: usize = 1 << 14;

/// A running text. Tokens before `sealed` are read from the tree; a fully cached prompt copies none.
///
/// The page at `length / block_size` is borrowed from the tree when the match or a truncation ended
/// inside it, and private otherwise; every page from `sealed / block_size` on is private but that.
#[derive(Default)]
pub(crate) struct Sequence {
    /// Pages in order, those reserved by an open plan included.
    pub table: Vec<PageId>,
    /// Tokens from `sealed` on: computed but not sealed, then pending.
    pub tail: Vec<u32>,
    /// Deepest pinned node.
    pub anchor: NodeId,
    /// Tokens in the tree, a multiple of the block size.
    pub sealed: u32,
    /// Tokens with K and V in pages.
    pub length: u32,
    /// The page that an open plan copies from, held until it is finished.
    pub replaced: Option<PageId>,
    /// Tokens from the beginning on that may be sealed, so that others find them.
    pub shareable: u32,
    /// Tokens from the beginning on whose K and V are known to be what their namespace says. Only these are sealed,
    /// and only where the caller has asked to be the one who says so: `None` takes every computed token as verified.
    pub verified: Option<u32>,
    /// Tokens from the beginning on that are written in every layer: pages of whole blocks of them may be
    /// quantized, though nobody else finds them.
    pub frozen: u32,
    /// Private blocks from the beginning on that have nothing to give to the class below: the codec refused one.
    pub cooled: [u32; STEPS],
    /// The key of nothing in its namespace.
    pub root_key: u64,
    /// Tokens it was opened with.
    pub prompt: u32,
    /// Lengths that it stands for, where they are not its own: in replays.
    pub turn: Option<Turn>,
    /// As what its text is to be retained once it closes, and from which position on.
    pub retention: Option<(Retention, usize)>,
    /// In an open plan.
    pub planned: bool,
    /// Closed while in an open plan: leaves when that is finished.
    pub closing: bool,
}

impl Sequence {
    /// All tokens, pending ones included.
    pub(crate) fn known(&self) -> u32 {
        self.sealed + self.tail.len() as u32
    }

    pub(crate) fn pending(&self) -> u32 {
        self.known() - self.length
    }

    /// Tokens from the beginning on that others may find once they are computed.
    pub(crate) fn sealable(&self) -> u32 {
        self.verified.map_or(self.shareable, |verified| verified.min(self.shareable))
    }
}

struct Slot {
    generation: u32,
    is_open: bool,
    sequence: Sequence,
}

/// Open sequences by id.
#[derive(Default)]
pub(crate) struct Sequences {
    slots: Vec<Slot>,
    vacant: Vec<u32>,
}

impl Sequences {
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.vacant.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        let tables: usize = self.slots.iter().map(|slot| slot.sequence.table.capacity()).sum();
        self.slots.capacity() * size_of::<Slot>()
            + tables * size_of::<PageId>()
            + self.vacant.capacity() * size_of::<u32>()
    }

    /// Open an empty sequence.
    pub(crate) fn insert(&mut self) -> (SequenceId, &mut Sequence) {
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, is_open: false, sequence: Sequence::default() });
            self.slots.len() as u32 - 1
        });
        let slot = &mut self.slots[index as usize];
        slot.is_open = true;
        (SequenceId { index, generation: slot.generation }, &mut slot.sequence)
    }

    /// Close a sequence whose pages and pins were given back.
    pub(crate) fn remove(&mut self, id: SequenceId) {
        let slot = &mut self.slots[id.index as usize];
        let Sequence { mut table, mut tail, .. } = std::mem::take(&mut slot.sequence);
        table.clear();
        table.shrink_to(KEPT_CAPACITY);
        tail.clear();
        tail.shrink_to(KEPT_CAPACITY);
        slot.sequence = Sequence { table, tail, ..Sequence::default() };
        slot.is_open = false;
        slot.generation = slot.generation.wrapping_add(1);
        self.vacant.push(id.index);
    }

    /// Any sequence still there, one that waits for its plan to be finished included.
    pub(crate) fn find_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        let slot = self.slots.get_mut(id.index as usize)?;
        (slot.is_open && slot.generation == id.generation).then_some(&mut slot.sequence)
    }

    pub(crate) fn get(&self, id: SequenceId) -> Result<&Sequence> {
        let slot = self.slots.get(id.index as usize).ok_or(Error::Closed)?;
        let is_open = slot.is_open && slot.generation == id.generation && !slot.sequence.closing;
        is_open.then_some(&slot.sequence).ok_or(Error::Closed)
    }

    pub(crate) fn get_mut(&mut self, id: SequenceId) -> Result<&mut Sequence> {
        self.find_mut(id).filter(|sequence| !sequence.closing).ok_or(Error::Closed)
    }

    /// A sequence that is in no open plan.
    pub(crate) fn at_rest(&mut self, id: SequenceId) -> Result<&mut Sequence> {
        let sequence = self.get_mut(id)?;
        if sequence.planned {
            return Err(Error::Planned(SequenceLabel(id)));
        }
        Ok(sequence)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (SequenceId, &Sequence)> {
        let open = (0..).zip(&self.slots).filter(|(_, slot)| slot.is_open);
        open.map(|(index, slot)| (SequenceId { index, generation: slot.generation }, &slot.sequence))
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Sequence> {
        self.slots.iter_mut().filter(|slot| slot.is_open).map(|slot| &mut slot.sequence)
    }
}
