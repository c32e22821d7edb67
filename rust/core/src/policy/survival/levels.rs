//! Ranks of what users retain: as `Ranking` does it, in every level for itself. There are few such levels and many
//! possible ones, so what nobody stands in costs nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::curves::Curves;
use super::ranking::{DEPTHS, Standing};
use crate::retention::Level;

/// Leaves by level, class and last use.
pub(super) struct Levels {
    classes: BTreeMap<(Level, u16), BTreeSet<(u64, u32)>>,
    places: HashMap<u32, (Level, Standing)>,
    weights: [f32; DEPTHS],
}

impl Levels {
    pub(super) fn new(weights: [f32; DEPTHS]) -> Self {
        Self { classes: BTreeMap::new(), places: HashMap::new(), weights }
    }

    /// Put a leaf where it stands, or take it out of that level.
    pub(super) fn set(&mut self, level: Level, leaf: u32, standing: Option<Standing>) {
        let before = match standing {
            Some(standing) => self.places.insert(leaf, (level, standing)),
            None => self.places.remove(&leaf),
        };
        if let Some((level, Standing { class, last })) = before
            && let Some(leaves) = self.classes.get_mut(&(level, class))
        {
            leaves.remove(&(last, leaf));
            if leaves.is_empty() {
                self.classes.remove(&(level, class));
            }
        }
        if let Some(Standing { class, last }) = standing {
            self.classes.entry((level, class)).or_default().insert((last, leaf));
        }
    }

    pub(super) fn get(&self, level: Level, leaf: u32) -> Option<Standing> {
        self.places.get(&leaf).filter(|(other, _)| *other == level).map(|(_, standing)| *standing)
    }

    /// The leaf of a level whose page is worth least at `now`: of each class, its oldest or its youngest.
    pub(super) fn lowest(&self, level: Level, curves: &Curves, now: u64) -> Option<u32> {
        let classes = self.classes.range((level, 0)..=(level, u16::MAX));
        let ends = classes.flat_map(|((_, class), leaves)| {
            let class = usize::from(*class);
            let index =
                move |last: u64| curves.index(class / DEPTHS, now.saturating_sub(last)) + self.weights[class % DEPTHS];
            [leaves.first(), leaves.last()].into_iter().flatten().map(move |(last, leaf)| (index(*last), *leaf))
        });
        ends.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, leaf)| leaf)
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// Bytes owned, a leaf of a set taken as 1.5 entries.
    pub(super) fn bytes(&self) -> usize {
        let place = size_of::<(u32, (Level, Standing))>();
        self.places.capacity() * place + self.len() * size_of::<(u64, u32)>() * 3 / 2
    }
}
