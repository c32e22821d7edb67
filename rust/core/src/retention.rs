//! How long a page is wanted: what users say of texts, beside what is learned of them.

use crate::error::{Error, Result};

/// The lowest and the highest priority; 0 is that of all that nobody spoke of.
pub const PRIORITIES: std::ops::RangeInclusive<i32> = -100..=100;

/// What a user says of a text, or of a part of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// Lower ones leave before higher ones.
    pub priority: i32,
    /// Microseconds until it ends. Until then it leaves after all else of its priority that has no end.
    pub ttl: Option<u64>,
    /// At its end it is as any other; else it is of no use any more, and leaves before all others.
    pub lapses: bool,
}

impl Retention {
    /// Refuse a priority outside of the range.
    pub(crate) fn check(self) -> Result<()> {
        if PRIORITIES.contains(&self.priority) {
            return Ok(());
        }
        let (least, most) = (PRIORITIES.start(), PRIORITIES.end());
        Err(Error::Argument(format!("priority must lie in {least}..={most}, not {}", self.priority)))
    }

    pub(crate) fn level(self) -> Level {
        match self.ttl {
            Some(0) if self.lapses => Level::USUAL,
            Some(0) => Level::EXPIRED,
            ttl => Level((2 * (self.priority - PRIORITIES.start()) + 1) as u16 + u16::from(ttl.is_some())),
        }
    }
}

/// Which pages leave before which others: those of a lower level first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Level(u16);

impl Level {
    /// Its time is over.
    pub(crate) const EXPIRED: Self = Self(0);
    /// Nobody spoke of it.
    pub(crate) const USUAL: Self = Self(2 * (-*PRIORITIES.start()) as u16 + 1);

    /// Bits above the others in a key that orders by level first.
    pub(crate) fn above(self, key: u64) -> u64 {
        debug_assert!(key >> 54 == 0, "a stamp has grown into the level");
        u64::from(self.0) << 54 | key
    }
}

impl Default for Level {
    fn default() -> Self {
        Self::USUAL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(priority: i32, ttl: Option<u64>) -> Level {
        Retention { priority, ttl, lapses: false }.level()
    }

    #[test]
    fn what_has_an_end_leaves_last_of_its_priority_and_first_of_all_behind_it() {
        assert_eq!(Retention::default().level(), Level::USUAL);
        assert_eq!(level(7, Some(0)), Level::EXPIRED);
        let ascending = [level(0, Some(0)), level(-100, None), level(-1, Some(5)), level(0, None), level(0, Some(1))];
        assert!(ascending.is_sorted_by(|a, b| a < b));
        assert!(level(0, Some(1)) < level(1, None));
        assert!(level(100, Some(1)).above(3) > level(100, None).above(4));
    }
}
