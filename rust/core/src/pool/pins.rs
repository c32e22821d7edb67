//! Pins by id: whose, on what, and until when.

use std::collections::BTreeSet;

use crate::ids::{Namespace, NodeId};

/// A pin on a text. The generation tells one that ended from the next one in its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PinId {
    index: u32,
    generation: u32,
}

pub(super) struct Pin {
    pub anchor: NodeId,
    pub namespace: Namespace,
    /// When it ends by itself; 0 is never.
    pub expires: u64,
    /// A user holds it: its pages are counted, and never step down. Else it is a hint, and given up for room.
    pub is_users: bool,
}

/// Pins by id.
#[derive(Default)]
pub(super) struct Pins {
    slots: Vec<(u32, Option<Pin>)>,
    vacant: Vec<u32>,
    expiring: BTreeSet<(u64, PinId)>,
    num_users: usize,
}

impl Pins {
    /// Pins that users hold.
    pub(super) fn len(&self) -> usize {
        self.num_users
    }

    /// Deepest pinned nodes of users' pins, or of the others.
    pub(super) fn anchors(&self, users: bool) -> impl Iterator<Item = NodeId> + Clone + '_ {
        let pins = self.slots.iter().filter_map(|(_, pin)| pin.as_ref());
        pins.filter(move |pin| pin.is_users == users).map(|pin| pin.anchor)
    }

    pub(super) fn bytes(&self) -> usize {
        self.slots.capacity() * size_of::<(u32, Option<Pin>)>() + self.vacant.capacity() * size_of::<u32>()
    }

    pub(super) fn insert(&mut self, pin: Pin) -> PinId {
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            self.slots.len() as u32 - 1
        });
        self.num_users += usize::from(pin.is_users);
        let slot = &mut self.slots[index as usize];
        let id = PinId { index, generation: slot.0 };
        if pin.expires > 0 {
            self.expiring.insert((pin.expires, id));
        }
        slot.1 = Some(pin);
        id
    }

    pub(super) fn remove(&mut self, id: PinId) -> Option<Pin> {
        let slot = self.slots.get_mut(id.index as usize).filter(|slot| slot.0 == id.generation)?;
        let pin = slot.1.take()?;
        slot.0 = slot.0.wrapping_add(1);
        self.vacant.push(id.index);
        self.expiring.remove(&(pin.expires, id));
        self.num_users -= usize::from(pin.is_users);
        Some(pin)
    }

    pub(super) fn contains(&self, id: PinId) -> bool {
        let slot = self.slots.get(id.index as usize);
        slot.is_some_and(|(generation, pin)| *generation == id.generation && pin.is_some())
    }

    pub(super) fn has_expiring(&self) -> bool {
        !self.expiring.is_empty()
    }

    /// A pin that ends by `now`.
    pub(super) fn first_to_end(&self, now: u64) -> Option<PinId> {
        self.expiring.first().filter(|(at, _)| *at <= now).map(|(_, id)| *id)
    }

    /// Those on texts of a namespace.
    pub(super) fn of(&self, namespace: Namespace) -> Vec<PinId> {
        let pins = (0..).zip(&self.slots).filter_map(|(index, (generation, pin))| {
            let pin = pin.as_ref().filter(|pin| pin.namespace == namespace)?;
            Some((PinId { index, generation: *generation }, pin))
        });
        pins.map(|(id, _)| id).collect()
    }
}
