//! How likely a block is wanted again soon: logistic regression over one-hot features, learned on line.

use super::record::{FEATURES, Record, Records};

/// Values a feature may take.
pub(super) const VALUES: usize = 16;
/// How far a weight first moves.
const RATE: f32 = 0.02;

/// Weights, and the sums of squared gradients that set each one's step.
#[derive(Clone)]
pub(super) struct Score {
    weights: [[f32; VALUES]; FEATURES],
    squares: [[f32; VALUES]; FEATURES],
    bias: f32,
    bias_square: f32,
}

impl Score {
    pub(super) fn new() -> Self {
        Self { weights: [[0.0; VALUES]; FEATURES], squares: [[0.0; VALUES]; FEATURES], bias: 0.0, bias_square: 0.0 }
    }

    /// The weight of one feature's value.
    pub(super) fn weight(&self, feature: usize, value: u8) -> f32 {
        self.weights[feature][usize::from(value)]
    }

    pub(super) fn bias(&self) -> f32 {
        self.bias
    }

    /// Log odds of being wanted again within the horizon.
    fn of(&self, features: &[u8; FEATURES]) -> f32 {
        features.iter().enumerate().map(|(feature, value)| self.weight(feature, *value)).sum::<f32>() + self.bias
    }

    /// Learn from every record whose outcome is known by `now` and that was not learned from yet.
    pub(super) fn learn(&mut self, records: &mut Records, horizon: u64, now: u64) {
        for record in records.iter_mut().filter(|record| !record.is_learned) {
            let Some(outcome) = outcome(record, horizon, now) else { continue };
            record.is_learned = true;
            let error = outcome - 1.0 / (1.0 + (-self.of(&record.features)).exp());
            for (feature, value) in record.features.iter().enumerate() {
                let value = usize::from(*value);
                let square = &mut self.squares[feature][value];
                *square += error * error;
                self.weights[feature][value] += RATE * error / (*square + 1.0).sqrt();
            }
            self.bias_square += error * error;
            self.bias += RATE * error / (self.bias_square + 1.0).sqrt();
        }
    }
}

/// 1 when wanted again within the horizon, 0 when not. None before the horizon, for returns, too: they
/// are known early, and learning them first would bend the score upwards.
fn outcome(record: &Record, horizon: u64, now: u64) -> Option<f32> {
    if now.saturating_sub(record.used) <= horizon {
        return None;
    }
    Some(if record.again > 0 && record.again - record.used <= horizon { 1.0 } else { 0.0 })
}
