//! Time as policies see it: microseconds since the pool was made, or whatever was injected.

use std::time::Instant;

/// Strictly increasing, so that a time is also an order; but for the last time that there is, where it stays.
pub(crate) struct Clock {
    began: Instant,
    injected: Option<u64>,
    last: u64,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self { began: Instant::now(), injected: None, last: 0 }
    }

    /// Stop following the machine's clock; from now on it is `microseconds`, until set again.
    pub(crate) fn set(&mut self, microseconds: u64) {
        self.injected = Some(microseconds);
    }

    /// The time, later than every one given out before.
    pub(crate) fn tick(&mut self) -> u64 {
        self.last = self.read().max(self.last.saturating_add(1));
        self.last
    }

    /// The time, not earlier than every one given out before.
    pub(crate) fn now(&self) -> u64 {
        self.read().max(self.last)
    }

    fn read(&self) -> u64 {
        self.injected.unwrap_or_else(|| self.began.elapsed().as_micros() as u64)
    }
}
