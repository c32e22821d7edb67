//! Who rules: the learned order, or recency, whichever would have hit more lately.

/// Lately is so many times what a shadow holds.
const TURNOVERS: f64 = 16.0;
/// And at least so many sampled blocks.
const LEAST: f64 = 4096.0;
/// By how much, as a share of the blocks asked for, the other one must be ahead to take over.
const MARGIN: f64 = 0.001;

/// Hits of the two shadows, older ones weighing less and less.
pub(super) struct Guard {
    recent: f64,
    learned: f64,
    asked: f64,
    window: f64,
    rules: bool,
    is_fixed: bool,
    pub(super) switches: u64,
}

impl Guard {
    pub(super) fn new(capacity: usize, is_fixed: bool) -> Self {
        let window = (TURNOVERS * capacity as f64).max(LEAST);
        Self { recent: 0.0, learned: 0.0, asked: 0.0, window, rules: is_fixed, is_fixed, switches: 0 }
    }

    /// Both shadows were asked for so many blocks and had these.
    pub(super) fn note(&mut self, asked: usize, [recent, learned]: [u32; 2]) {
        let kept = (-(asked as f64) / self.window).exp();
        self.asked = self.asked * kept + asked as f64;
        self.recent = self.recent * kept + f64::from(recent);
        self.learned = self.learned * kept + f64::from(learned);
        let ahead = self.learned - self.recent;
        let margin = MARGIN * self.asked;
        let needed = if self.rules { -margin } else { margin };
        let rules = self.is_fixed || ahead > needed;
        self.switches += u64::from(rules != self.rules);
        self.rules = rules;
    }

    /// True while the learned order rules.
    pub(super) fn rules(&self) -> bool {
        self.rules
    }

    /// Hit ratios of recency's and of the learned order's shadow, lately.
    pub(super) fn ratios(&self) -> (f64, f64) {
        let asked = self.asked.max(1.0);
        (self.recent / asked, self.learned / asked)
    }
}
