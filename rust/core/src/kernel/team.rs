//! Who runs the parts of a kernel.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Threads that live on between calls and take the parts of a piece of work as they come.
pub trait Team: Sync {
    /// Threads, the caller's included.
    fn size(&self) -> usize;

    /// Call `work` once for each part in `0..parts`, and return when all are done.
    fn run(&self, parts: usize, work: &(dyn Fn(usize) + Sync));
}

/// The caller's thread and no other.
pub struct Alone;

impl Team for Alone {
    fn size(&self) -> usize {
        1
    }

    fn run(&self, parts: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..parts).for_each(work);
    }
}

/// Parts that are left to do, handed out one by one: what each thread of a team asks.
pub struct Parts<'a> {
    next: AtomicUsize,
    total: usize,
    work: &'a (dyn Fn(usize) + Sync),
}

impl<'a> Parts<'a> {
    /// All of `0..parts`.
    pub fn new(parts: usize, work: &'a (dyn Fn(usize) + Sync)) -> Self {
        Self { next: AtomicUsize::new(0), total: parts, work }
    }

    /// Do parts until none is left.
    pub fn drain(&self) {
        loop {
            let part = self.next.fetch_add(1, Ordering::Relaxed);
            if part >= self.total {
                return;
            }
            (self.work)(part);
        }
    }
}
