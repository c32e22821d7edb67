//! Every order in which threads can come by a shared thing: `RUSTFLAGS="--cfg loom" cargo test --test loom`.

#![cfg(loom)]

use kvhybrid_core::{Settle, Shared};
use loom::sync::Arc;
use loom::thread;

/// Counts what was done by holders, and what was left and carried out.
#[derive(Default)]
struct Books {
    done: u32,
    settled: Vec<u32>,
}

impl Settle for Books {
    type Left = u32;

    fn settle(&mut self, left: u32) {
        self.settled.push(left);
    }
}

#[test]
fn nothing_that_was_left_stays_behind() {
    loom::model(|| {
        let shared = Arc::new(Shared::new(Books::default()));
        let threads: Vec<_> = (0..2)
            .map(|id| {
                let shared = shared.clone();
                thread::spawn(move || {
                    shared.leave(id);
                    shared.lock().expect("sound").done += 1;
                })
            })
            .collect();
        for thread in threads {
            thread.join().expect("sound");
        }
        // Without a call that would carry it out: it was done by whoever came last.
        let books = shared.lock().expect("sound");
        assert_eq!((books.done, books.settled.len()), (2, 2));
    });
}

#[test]
fn whoever_holds_the_lock_may_leave_something_themselves() {
    loom::model(|| {
        let shared = Arc::new(Shared::new(Books::default()));
        let other = shared.clone();
        let thread = thread::spawn(move || {
            let held = other.lock().expect("sound");
            other.leave(7); // a finalizer, in the middle of a call
            assert!(!held.settled.contains(&7));
        });
        shared.leave(8);
        thread.join().expect("sound");
        let mut settled = shared.lock().expect("sound").settled.clone();
        settled.sort_unstable();
        assert_eq!(settled, [7, 8]);
    });
}
