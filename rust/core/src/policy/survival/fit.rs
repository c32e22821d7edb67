//! Fitting the score to what became of blocks.
//!
//! At every age a block's hazard is taken to be the one common to all at that age times the factors of its
//! features' values. The factors are those for which, value by value, as many returns are expected as were
//! seen; each leans towards 1. A record counts for as long as it was watched, so nothing has to be waited
//! for, and every lesson goes over all records: what little there is at first is made the most of.

use super::curves::{AGES, LEAN, bin};
use super::record::{FEATURES, Record, Records};
use super::score::{Score, VALUES};

/// What a record says of returns within the horizon.
struct Row {
    features: [u8; FEATURES],
    /// The age until which it was watched; one past the horizon when it was watched longer.
    until: u8,
    returned: bool,
    /// Its factors' product.
    factor: f32,
}

impl Score {
    /// Fit the factors once more, feature by feature, to all records: they were near already.
    pub(super) fn learn(&mut self, records: &Records, horizon: u64, now: u64) {
        let last = bin(horizon);
        let row = |record: &Record| {
            let (age, is_back) = record.watched(now);
            let at = bin(age);
            let factor = self.factors(&record.features).exp();
            Row { features: record.features, until: at.min(last + 1) as u8, returned: is_back && at <= last, factor }
        };
        let mut rows: Vec<Row> = records.iter().map(row).collect();
        let expected = expected(&rows, last);
        self.bias = expected[last + 1].max(1e-6).ln();
        for (feature, weights) in self.weights.iter_mut().enumerate() {
            let (mut seen, mut awaited) = ([0.0f32; VALUES], [0.0f32; VALUES]);
            for row in &rows {
                let value = usize::from(row.features[feature]);
                seen[value] += f32::from(u8::from(row.returned));
                awaited[value] += row.factor * expected[usize::from(row.until)];
            }
            let mut change = [1.0f32; VALUES];
            for (value, weight) in weights.iter_mut().enumerate() {
                let before = weight.exp();
                let factor = (seen[value] + LEAN) / (awaited[value] / before + LEAN);
                change[value] = factor / before;
                *weight = factor.ln();
            }
            for row in &mut rows {
                row.factor *= change[usize::from(row.features[feature])];
            }
        }
    }
}

/// Returns that a block of factor 1 is expected to see until it reaches each age, and within the horizon, which
/// ends with `last`, behind that.
fn expected(rows: &[Row], last: usize) -> [f32; AGES + 1] {
    let (mut seen, mut ended) = ([0.0f32; AGES + 1], [0.0f32; AGES + 1]);
    for row in rows {
        seen[usize::from(row.until)] += f32::from(u8::from(row.returned));
        ended[usize::from(row.until)] += row.factor;
    }
    let mut watched: f32 = ended[last + 1..].iter().sum();
    let mut hazards = [0.0f32; AGES];
    for age in (0..=last).rev() {
        watched += ended[age];
        hazards[age] = (seen[age] + 0.01) / (watched - ended[age] / 2.0 + 1.0);
    }
    let (mut expected, mut sum) = ([0.0f32; AGES + 1], 0.0);
    for (age, hazard) in hazards.iter().enumerate() {
        expected[age] = sum + hazard / 2.0;
        sum += hazard;
    }
    expected[last + 1] = sum;
    expected
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000;

    /// Twice 500 records, alike but for one feature: of the first half one in two came back, of the other one in ten.
    fn records(watched_for: u64) -> (Records, u64) {
        let (mut records, now) = (Records::new(64), 1000 * SECOND);
        for number in 0..1000u64 {
            let (is_second, used) = (number >= 500, now - watched_for);
            let is_back = number % if is_second { 10 } else { 2 } == 0;
            let mut features = [0; FEATURES];
            features[0] = u8::from(is_second);
            let again = if is_back { used + SECOND } else { 0 };
            records.push(Record { used, again, features, key: 0 });
        }
        (records, now)
    }

    #[test]
    fn what_returns_more_often_scores_higher_and_what_tells_nothing_weighs_nothing() {
        let (records, now) = records(60 * SECOND);
        let mut score = Score::new();
        for _ in 0..8 {
            score.learn(&records, 10 * SECOND, now);
        }
        let ahead = score.weight(0, 0) - score.weight(0, 1);
        assert!((1.2..2.0).contains(&ahead), "{ahead} where the hazards are 0.69 and 0.105");
        for value in 1..VALUES as u8 {
            assert!(score.weight(3, value).abs() < 1e-6);
        }
    }

    #[test]
    fn outcomes_are_learned_from_before_the_horizon_is_over() {
        let (records, now) = records(2 * SECOND);
        let mut score = Score::new();
        score.learn(&records, 3600 * SECOND, now);
        assert!(score.weight(0, 0) > score.weight(0, 1) + 0.5);
    }
}
