//! Survival curves of the time to the next use, and the index made of them.
//!
//! Per curve (own uses, and how likely the score finds a return) the hazard of being wanted again is
//! estimated by age, Kaplan and Meier's way: blocks not wanted again yet count as long as they were
//! watched. Thin curves lean on those of their number of uses, and these on all together. The index at
//! an age is the best reachable rate of hits per time held from there on (Gittins'): a leaf with the
//! lowest index is the one whose page is worth least.

use super::features::OWN;
use super::record::Records;
use super::scale::step;
use super::score::Score;

/// Classes of own uses.
pub(super) const USES: usize = 5;
/// Buckets of the score.
pub(super) const BUCKETS: usize = 16;
/// Curves.
pub(super) const CURVES: usize = USES * BUCKETS;
/// Ages: half octaves of milliseconds.
pub(super) const AGES: usize = 60;
/// Observations that what a curve leans on counts for, and that a factor is 1.
pub(super) const LEAN: f32 = 30.0;
/// How much the index falls with each half octave where nothing is known: as recency would have it.
const FALL: f32 = 0.35;
/// Share of all returns that lie within the horizon.
const WITHIN: f32 = 0.6;

type Hazards = [f32; AGES];

/// The index by curve and age.
#[derive(Clone)]
pub(super) struct Curves {
    index: Vec<[f32; AGES + 1]>,
    /// The age, in microseconds, by which `WITHIN` of all returns have happened.
    pub(super) horizon: u64,
    /// Times learned.
    pub(super) version: u64,
}

#[derive(Clone, Copy)]
struct Counts {
    returned: Hazards,
    watched: Hazards,
}

const NONE: Counts = Counts { returned: [0.0; AGES], watched: [0.0; AGES] };

impl Counts {
    fn add(&mut self, other: &Self) {
        for age in 0..AGES {
            self.returned[age] += other.returned[age];
            self.watched[age] += other.watched[age];
        }
    }

    /// Returns at each age over those still away then, leaning on `prior` as on `weight` observations.
    fn hazards(&self, prior: &Hazards, weight: f32) -> Hazards {
        let (mut at_risk, mut hazards) = (0.0, [0.0; AGES]);
        for age in (0..AGES).rev() {
            at_risk += self.returned[age] + self.watched[age];
            let exposed = at_risk - self.watched[age] / 2.0;
            hazards[age] = ((self.returned[age] + weight * prior[age]) / (exposed + weight)).min(0.999);
        }
        hazards
    }
}

impl Curves {
    /// Before anything is learned every curve is recency's.
    pub(super) fn new() -> Self {
        let row = std::array::from_fn(|age| -FALL * age as f32);
        Self { index: vec![row; CURVES], horizon: 60_000_000, version: 0 }
    }

    /// The index of a curve at an age in microseconds.
    pub(super) fn index(&self, curve: usize, age: u64) -> f32 {
        let at = position(age).min(AGES as f32 - 1.0);
        let (whole, row) = (at as usize, &self.index[curve]);
        let part = at - whole as f32;
        row[whole] * (1.0 - part) + row[whole + 1] * part
    }

    /// Set the horizon by what was seen until `now`.
    pub(super) fn look(&mut self, records: &Records) {
        let mut returned = [0.0f32; AGES];
        for record in records.iter().filter(|record| record.again > 0) {
            returned[bin(record.again - record.used)] += 1.0;
        }
        let total: f32 = returned.iter().sum();
        let mut seen = 0.0;
        let age = returned.iter().position(|count| {
            seen += count;
            seen >= WITHIN * total
        });
        self.horizon = (edge(age.unwrap_or(AGES - 1).min(AGES - 1) + 1) * 1000.0) as u64;
    }

    /// Estimate every curve anew from the records, each counted where the score puts it now.
    pub(super) fn learn(&mut self, records: &Records, score: &Score, now: u64) {
        let mut counts = vec![NONE; CURVES];
        for record in records.iter() {
            let counts = &mut counts[curve(record.features[OWN[0]], score.of(&record.features))];
            let (age, is_back) = record.watched(now);
            let outcome = if is_back { &mut counts.returned } else { &mut counts.watched };
            outcome[bin(age)] += 1.0;
        }
        let mut by_uses = [NONE; USES];
        let mut all = NONE;
        for (curve, counts) in counts.iter().enumerate() {
            by_uses[curve / BUCKETS].add(counts);
            all.add(counts);
        }
        let pooled = all.hazards(&[0.01; AGES], 1.0);
        let peak_by = bin(self.horizon);
        for (uses, of_uses) in by_uses.iter().enumerate() {
            let prior = of_uses.hazards(&pooled, LEAN);
            for bucket in 0..BUCKETS {
                let curve = uses * BUCKETS + bucket;
                self.index[curve] = index_of(&counts[curve].hazards(&prior, LEAN), peak_by);
            }
        }
        self.version += 1;
    }

    pub(super) fn bytes(&self) -> usize {
        self.index.capacity() * size_of::<[f32; AGES + 1]>()
    }
}

/// The curve of a block: by its feature of own uses, and by its score.
pub(super) fn curve(uses: u8, score: f32) -> usize {
    let bucket = ((score + 4.0) * 2.0).clamp(0.0, BUCKETS as f32 - 1.0) as usize;
    usize::from(step(uses.into(), &[1, 2, 4, 5])) * BUCKETS + bucket
}

/// The index by age, forced to rise up to its peak and to fall from there on, or from `peak_by` on when
/// that comes first: past it a few late returns would keep pages for hours. So it is lowest at an end.
fn index_of(hazards: &Hazards, peak_by: usize) -> [f32; AGES + 1] {
    let mut index = [0.0f32; AGES + 1];
    for (from, value) in index[..AGES].iter_mut().enumerate() {
        let (mut away, mut returns, mut held, mut best) = (1.0f32, 0.0f32, 0.0f32, 0.0f32);
        for (age, hazard) in hazards.iter().enumerate().skip(from) {
            held += away * (1.0 - hazard / 2.0) * (edge(age + 1) - edge(age));
            returns += away * hazard;
            away *= 1.0 - hazard;
            best = best.max(returns / held);
        }
        *value = (best + 1e-30).ln();
    }
    let mut peak = 0;
    for age in 1..AGES {
        if index[age] > index[peak] {
            peak = age;
        }
    }
    let peak = peak.min(peak_by);
    for age in (0..peak).rev() {
        index[age] = index[age].min(index[age + 1]);
    }
    for age in peak + 1..AGES {
        index[age] = index[age].min(index[age - 1] - 0.01);
    }
    index[AGES] = index[AGES - 1] - FALL;
    index
}

/// Where an age in microseconds lies among the half octaves of milliseconds.
fn position(age: u64) -> f32 {
    let milliseconds = age as f32 / 1000.0;
    if milliseconds < std::f32::consts::SQRT_2 { 0.0 } else { 2.0 * milliseconds.log2() }
}

pub(super) fn bin(age: u64) -> usize {
    (position(age) as usize).min(AGES - 1)
}

/// The lower edge of a half octave, in milliseconds.
fn edge(age: usize) -> f32 {
    if age == 0 { 0.0 } else { (age as f32 / 2.0).exp2() }
}
