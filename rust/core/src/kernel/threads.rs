//! A team of its own: threads that wait for work and live as long as the process.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError, TryLockError};

use super::team::{Alone, Parts, Team};

/// What the threads are to do, by address: it lives until the caller has seen all of them finish.
#[derive(Clone, Copy)]
struct Work(*const Parts<'static>);
// SAFETY: `Parts` is shared between threads by design.
unsafe impl Send for Work {}

#[derive(Default)]
struct State {
    round: u64,
    work: Option<Work>,
    running: usize,
    has_failed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    begins: Condvar,
    ends: Condvar,
}

/// Threads that live on between calls. One caller at a time has them; another one works alone meanwhile.
pub struct Threads {
    shared: Arc<Shared>,
    callers: Mutex<()>,
    size: usize,
}

impl Threads {
    /// A team of `size`, the caller's thread included: starts the others, as many as the system grants.
    pub fn new(size: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let mut started = 1;
        for _ in 1..size {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name("kvhybrid-kernel".into());
            started += usize::from(thread.spawn(move || live(&shared)).is_ok());
        }
        Self { shared, callers: Mutex::new(()), size: started }
    }
}

fn live(shared: &Shared) {
    let mut seen = 0;
    let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let Some(work) = state.work.filter(|_| state.round != seen) else {
            state = shared.begins.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        seen = state.round;
        state.running += 1;
        drop(state);
        // SAFETY: the caller waits until nobody is running before the work goes away.
        let result = catch_unwind(AssertUnwindSafe(|| unsafe { &*work.0 }.drain()));
        state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.running -= 1;
        state.has_failed |= result.is_err();
        shared.ends.notify_all();
    }
}

impl Team for Threads {
    fn size(&self) -> usize {
        self.size
    }

    fn run(&self, parts: usize, work: &(dyn Fn(usize) + Sync)) {
        let _caller = match self.callers.try_lock() {
            Ok(guard) if parts > 1 && self.size > 1 => guard,
            Err(TryLockError::Poisoned(error)) if parts > 1 && self.size > 1 => error.into_inner(),
            _ => return Alone.run(parts, work),
        };
        let parts = Parts::new(parts, work);
        let lock = || self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut state = lock();
            state.round += 1;
            state.work = Some(Work((&raw const parts).cast()));
        }
        self.shared.begins.notify_all();
        let own = catch_unwind(AssertUnwindSafe(|| parts.drain()));
        let mut state = lock();
        state.work = None; // whoever wakes up late finds nothing
        while state.running > 0 {
            state = self.shared.ends.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let has_failed = std::mem::take(&mut state.has_failed);
        drop(state);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!has_failed, "a thread of the team panicked");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::{Team, Threads};

    #[test]
    fn every_part_is_done_once_and_panics_reach_the_caller() {
        let team = Threads::new(3);
        for parts in [0, 1, 2, 100] {
            let done: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
            team.run(parts, &|part| {
                done[part].fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
        let broken = || team.run(50, &|part| assert!(part != 20, "on purpose"));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(broken)).is_err());
        team.run(2, &|_| {});
    }

    #[test]
    fn callers_at_once_and_from_within_all_finish() {
        let team = Threads::new(2);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        team.run(3, &|_| {
                            team.run(2, &|_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 4 * 200 * 6);
    }
}
