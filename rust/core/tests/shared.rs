//! Threads over one pool that leave handles behind, with the machine's own scheduler.

#![cfg(not(loom))]

use std::sync::Arc;
use std::thread;

use kvhybrid_core::{Left, Namespace, OpenOptions, Pool, Shared};

#[test]
fn pools_take_back_all_that_threads_leave_behind() {
    let shared = Arc::new(Shared::new(Pool::new(64, 8, true).expect("sound")));
    let tokens: Vec<u32> = (0..20).collect();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for turn in 0..200 {
                    let opened = shared
                        .lock()
                        .expect("sound")
                        .open(&tokens, OpenOptions { namespace: Namespace(0), reuse: true, share: true, align: 1 });
                    let Ok((id, _)) = opened else { continue };
                    let plan = shared.lock().expect("sound").plan(&[id], None, None);
                    match plan {
                        Ok(plan) if turn % 2 == 0 => shared.leave(Left::Plan(Box::new(plan))),
                        Ok(plan) => shared.lock().expect("sound").commit(plan),
                        Err(_) => {}
                    }
                    shared.leave(Left::Sequence(id));
                }
            });
        }
    });
    let pool = shared.lock().expect("sound");
    pool.check().expect("sound");
    let found = pool.statistics();
    assert_eq!((found.sequences, found.mutable_pages), (0, 0));
}
