//! Leaves ranked by the index, without looking at all of them.
//!
//! Leaves of one class share a curve that rises and then falls with age, so the lowest of a class is its
//! oldest or its youngest: the lowest of all is found among two leaves a class, exactly, whatever the
//! number of leaves.

use std::collections::BTreeSet;

use super::curves::{CURVES, Curves};

/// Classes of depth: what computing a block again costs grows with what stands before it.
pub(super) const DEPTHS: usize = 4;
/// Classes of leaves.
pub(super) const CLASSES: usize = CURVES * DEPTHS;
/// Ages move slowly on their logarithmic scale: scores are kept for this many microseconds.
const STALE: u64 = 10_000;

/// Curve, depth and last use of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Standing {
    pub class: u16,
    pub last: u64,
}

/// Leaves by class and last use. Leaves are numbered from 0; the caller says what a number means.
pub(super) struct Ranking {
    classes: Vec<BTreeSet<(u64, u32)>>,
    places: Vec<Option<Standing>>,
    scores: Vec<f32>,
    /// Classes whose ends changed since they were scored.
    changed: Vec<u16>,
    scored: u64,
    version: u64,
    weights: [f32; DEPTHS],
}

impl Ranking {
    /// `weights` are added to the index of each class of depth.
    pub(super) fn new(weights: [f32; DEPTHS]) -> Self {
        Self {
            classes: vec![BTreeSet::new(); CLASSES],
            places: Vec::new(),
            scores: vec![f32::INFINITY; CLASSES],
            changed: Vec::new(),
            scored: 0,
            version: u64::MAX,
            weights,
        }
    }

    /// Put a leaf where it stands, or take it out.
    pub(super) fn set(&mut self, leaf: u32, standing: Option<Standing>) {
        let index = leaf as usize;
        if index >= self.places.len() {
            if standing.is_none() {
                return;
            }
            self.places.resize((index + 1).next_power_of_two(), None);
        }
        let before = std::mem::replace(&mut self.places[index], standing);
        if before == standing {
            return;
        }
        if let Some(Standing { class, last }) = before {
            self.classes[usize::from(class)].remove(&(last, leaf));
            self.note(class);
        }
        if let Some(Standing { class, last }) = standing {
            self.classes[usize::from(class)].insert((last, leaf));
            self.note(class);
        }
    }

    /// Remember a changed class, until there are so many that all are scored anew.
    fn note(&mut self, class: u16) {
        if self.changed.len() <= CLASSES {
            self.changed.push(class);
        }
    }

    pub(super) fn get(&self, leaf: u32) -> Option<Standing> {
        self.places.get(leaf as usize).copied().flatten()
    }

    /// The leaf whose page is worth least at `now`.
    pub(super) fn lowest(&mut self, curves: &Curves, now: u64) -> Option<u32> {
        if self.version != curves.version || now >= self.scored.saturating_add(STALE) || self.changed.len() > CLASSES {
            (self.version, self.scored) = (curves.version, now);
            self.changed.clear();
            for class in 0..CLASSES {
                self.scores[class] = self.score(class, curves, now).0;
            }
        } else {
            while let Some(class) = self.changed.pop() {
                let class = usize::from(class);
                self.scores[class] = self.score(class, curves, self.scored).0;
            }
        }
        let (mut best, mut least) = (0, f32::INFINITY);
        for (class, score) in self.scores.iter().enumerate() {
            if *score < least {
                (best, least) = (class, *score);
            }
        }
        self.score(best, curves, self.scored).1
    }

    /// The lower end of a class.
    fn score(&self, class: usize, curves: &Curves, now: u64) -> (f32, Option<u32>) {
        let (Some(oldest), Some(youngest)) = (self.classes[class].first(), self.classes[class].last()) else {
            return (f32::INFINITY, None);
        };
        let weight = self.weights[class % DEPTHS];
        let index = |last: u64| curves.index(class / DEPTHS, now.saturating_sub(last)) + weight;
        let (old, young) = (index(oldest.0), index(youngest.0));
        if young < old { (young, Some(youngest.1)) } else { (old, Some(oldest.1)) }
    }

    /// The leaf that was used least recently.
    pub(super) fn oldest(&self) -> Option<u32> {
        self.classes.iter().filter_map(BTreeSet::first).min().map(|(_, leaf)| *leaf)
    }

    pub(super) fn len(&self) -> usize {
        self.classes.iter().map(BTreeSet::len).sum()
    }

    /// Bytes owned, a leaf of a set taken as 1.5 entries.
    pub(super) fn bytes(&self) -> usize {
        self.places.capacity() * size_of::<Option<Standing>>()
            + self.len() * size_of::<(u64, u32)>() * 3 / 2
            + CLASSES * (size_of::<BTreeSet<(u64, u32)>>() + size_of::<f32>())
    }
}
