//! How likely a block is wanted again soon: factors of the hazard, one for each value of each feature.

use super::record::FEATURES;

/// Values a feature may take.
pub(super) const VALUES: usize = 16;

/// Logarithms of the factors.
#[derive(Clone)]
pub(super) struct Score {
    pub(super) weights: [[f32; VALUES]; FEATURES],
    /// Of the returns within the horizon that a block of factor 1 is expected to see.
    pub(super) bias: f32,
}

impl Score {
    pub(super) fn new() -> Self {
        Self { weights: [[0.0; VALUES]; FEATURES], bias: 0.0 }
    }

    /// The weight of one feature's value.
    pub(super) fn weight(&self, feature: usize, value: u8) -> f32 {
        self.weights[feature][usize::from(value)]
    }

    pub(super) fn bias(&self) -> f32 {
        self.bias
    }

    /// Logarithm of the returns expected within the horizon.
    pub(super) fn of(&self, features: &[u8; FEATURES]) -> f32 {
        self.bias + self.factors(features)
    }

    /// Logarithm of the factors' product.
    pub(super) fn factors(&self, features: &[u8; FEATURES]) -> f32 {
        features.iter().enumerate().map(|(feature, value)| self.weight(feature, *value)).sum()
    }
}
