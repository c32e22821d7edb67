//! The threads that kernels run on: torch's own OpenMP team where its address is known, else one of ours.

use std::ffi::{c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use kvhybrid_core::kernel::team::{Alone, Parts, Team};
use kvhybrid_core::kernel::threads::Threads;

/// `GOMP_parallel`: call the function in every thread of a team, and return when all are done.
type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

/// The team that torch's own kernels run on. Between them its threads wait awake, so that threads of ours
/// would have to fight them for the cores.
struct OpenMp {
    parallel: Parallel,
    threads: usize,
}

struct Job<'a> {
    parts: Parts<'a>,
    has_failed: AtomicBool,
}

extern "C" fn enter(job: *mut c_void) {
    // SAFETY: `run` passes its job, and outlives the team's work on it.
    let job = unsafe { &*job.cast::<Job<'_>>() };
    if catch_unwind(AssertUnwindSafe(|| job.parts.drain())).is_err() {
        job.has_failed.store(true, Ordering::Relaxed);
    }
}

impl Team for OpenMp {
    fn size(&self) -> usize {
        self.threads
    }

    fn run(&self, parts: usize, work: &(dyn Fn(usize) + Sync)) {
        if parts <= 1 {
            return Alone.run(parts, work);
        }
        let job = Job { parts: Parts::new(parts, work), has_failed: AtomicBool::new(false) };
        // Always the same number of threads: a smaller team would be made, and torch's made again.
        let threads = self.threads as c_uint;
        // SAFETY: the address is that of the function (the caller of `with_team` says so).
        unsafe { (self.parallel)(enter, (&raw const job).cast_mut().cast(), threads, 0) };
        assert!(!job.has_failed.load(Ordering::Relaxed), "a thread of the team panicked");
    }
}

/// Call `work` with a team of `threads`. `parallel`: the address of `GOMP_parallel` in this process, or 0.
///
/// # Safety
/// The address is what it is said to be.
pub unsafe fn with_team<T>(threads: usize, parallel: usize, work: impl FnOnce(&dyn Team) -> T) -> T {
    if threads <= 1 {
        return work(&Alone);
    }
    if parallel != 0 {
        // SAFETY: the caller's.
        let parallel = unsafe { std::mem::transmute::<usize, Parallel>(parallel) };
        return work(&OpenMp { parallel, threads });
    }
    work(own_team(threads))
}

/// A team of ours; made once for each size that is asked for, which is torch's number of threads.
fn own_team(threads: usize) -> &'static Threads {
    static TEAMS: Mutex<Vec<(usize, &'static Threads)>> = Mutex::new(Vec::new());
    let mut teams = TEAMS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, team)) = teams.iter().find(|(known, _)| *known == threads) {
        return team;
    }
    let team: &'static Threads = Box::leak(Box::new(Threads::new(threads)));
    teams.push((threads, team));
    team
}
