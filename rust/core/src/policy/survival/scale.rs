//! Lengths, times and counts as the few values that a feature may take.

use super::score::VALUES;

/// The last value of a feature.
pub(super) const LAST: u8 = VALUES as u8 - 1;

/// How many of the ascending bounds are reached.
pub(super) fn step(value: usize, bounds: &[usize]) -> u8 {
    bounds.iter().filter(|bound| **bound <= value).count() as u8
}

/// Octaves of a value, `per` to each, from 2^`from` on.
pub(super) fn octave(value: f64, from: i32, per: i32) -> u8 {
    if value < 1.0 {
        return 0;
    }
    let octave = (value.log2() * f64::from(per)) as i32 - from * per + 1;
    octave.clamp(0, LAST.into()) as u8
}
