//! What users say of texts while all else goes on: pins hold what they said they hold, as it was.

use super::*;

/// A pin, and the pages that it was given on.
pub(crate) struct Pinned {
    id: PinId,
    namespace: u64,
    tokens: Vec<u32>,
    /// Ends by itself.
    ends: bool,
    is_hint: bool,
}

impl Model {
    pub(crate) fn say(&mut self, saying: &Saying) {
        match *saying {
            Saying::Retain { of, from, to, retention } => {
                let Some(of) = self.pick(of) else { return };
                let Text { namespace, ref tokens, .. } = self.texts[of];
                let tokens = tokens.clone();
                let known = self.pool.matched(Namespace(namespace), &tokens[..to.min(tokens.len())]).unwrap();
                match self.pool.retain(Namespace(namespace), &tokens, from..to, retention) {
                    Ok(reached) => assert!(reached <= known && reached + self.block > known),
                    Err(Error::Argument(_)) => assert!(from > to.min(tokens.len())),
                    Err(error) => panic!("{error}"),
                }
            }
            Saying::RetainText { of, from, retention } => {
                let Some(of) = self.pick(of) else { return };
                self.pool.retain_sequence(self.texts[of].id, retention, from).unwrap();
            }
            Saying::Pin { of, length, ttl } => self.pin(of, length, ttl),
            Saying::Hint { of } => {
                let Some(of) = self.pick(of) else { return };
                let Text { namespace, ref tokens, .. } = self.texts[of];
                let most = self.pool.num_pages() / 4;
                if let Some((id, known)) = self.pool.hint(Namespace(namespace), tokens, most).unwrap() {
                    let tokens = tokens[..known].to_vec();
                    self.pins.push(Pinned { id, namespace, tokens, ends: false, is_hint: true });
                }
            }
            Saying::Unpin { of } => {
                if !self.pins.is_empty() {
                    let pinned = self.pins.swap_remove(of % self.pins.len());
                    self.pool.unpin(pinned.id);
                }
            }
            Saying::Wait { microseconds } => {
                self.now += microseconds;
                self.pool.set_time(self.now);
            }
        }
    }

    fn pin(&mut self, of: usize, length: usize, ttl: Option<u64>) {
        let Some(of) = self.pick(of) else { return };
        let Text { namespace, ref tokens, .. } = self.texts[of];
        let tokens = &tokens[..length.min(tokens.len())];
        let known = self.pool.matched(Namespace(namespace), tokens).unwrap();
        let before = self.pool.statistics();
        match self.pool.pin(Namespace(namespace), tokens, ttl) {
            Ok((id, held)) => {
                assert_eq!(held, known);
                let tokens = tokens[..held].to_vec();
                self.pins.push(Pinned { id, namespace, tokens, ends: ttl.is_some(), is_hint: false });
            }
            Err(Error::Pinned { needed, pinned, most, .. }) => {
                assert!(needed + pinned > most);
                // Fewer where another's time is over.
                assert!(self.pool.statistics().user_pinned_pages <= before.user_pinned_pages);
            }
            Err(error) => panic!("{error}"),
        }
    }

    pub(crate) fn check_pins(&mut self) {
        let Self { pins, pool, .. } = self;
        pins.retain(|pinned| pool.is_pinned(pinned.id) || !pinned.ends);
        let now = pool.statistics();
        let users = pins.iter().filter(|pinned| !pinned.is_hint).count();
        assert_eq!(now.user_pins as usize, users);
        assert!(now.user_pinned_pages <= now.pinned_pages);
        for Pinned { namespace, tokens, .. } in pins {
            let found = pool.matched(Namespace(*namespace), tokens).unwrap();
            assert_eq!(found, tokens.len(), "a pinned text has left");
        }
        let causes = now.evicted_lru_pages
            + now.evicted_survival_pages
            + now.evicted_ttl_pages
            + now.evicted_priority_pages
            + now.evicted_asked_pages;
        assert_eq!(causes, now.evicted_pages);
    }

    /// A namespace was dropped, and with it what was pinned there.
    pub(crate) fn forget_pins(&mut self, namespace: u64) {
        let pool = &self.pool;
        self.pins.retain(|pinned| {
            assert!(pinned.namespace != namespace || !pool.is_pinned(pinned.id));
            pinned.namespace != namespace
        });
    }

    pub(crate) fn unpin_all(&mut self) {
        for pinned in self.pins.drain(..) {
            self.pool.unpin(pinned.id);
        }
    }
}

pub(crate) fn sayings() -> impl Strategy<Value = Saying> {
    let retention = || {
        let ttl = prop::option::of(prop_oneof![Just(0u64), 1..50u64]);
        (-2..3i32, ttl, any::<bool>()).prop_map(|(priority, ttl, lapses)| Retention { priority, ttl, lapses })
    };
    prop_oneof![
        4 => (0..8usize, 0..40usize, 0..60usize, retention())
            .prop_map(|(of, from, to, retention)| Saying::Retain { of, from, to, retention }),
        4 => (0..8usize, 0..20usize, prop::option::weighted(0.9, retention()))
            .prop_map(|(of, from, retention)| Saying::RetainText { of, from, retention }),
        3 => (0..8usize, 0..60usize, prop::option::weighted(0.3, 0..50u64))
            .prop_map(|(of, length, ttl)| Saying::Pin { of, length, ttl }),
        1 => (0..8usize).prop_map(|of| Saying::Hint { of }),
        2 => (0..8usize).prop_map(|of| Saying::Unpin { of }),
        3 => (1..40u64).prop_map(|microseconds| Saying::Wait { microseconds }),
    ]
}
