//! Locks with ranks: a thread takes them in ascending order alone, which debug builds check.
//!
//! Two threads that take two locks in two orders may wait for each other for ever. With ranks no such pair can be written
//! without a test that comes by it noticing, whether the threads meet or not.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard};

use pyo3::PyResult;

use crate::errors::poisoned;

/// In which order locks are taken. What a pool is left has a rank of its own, the last, inside the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// Tokens of a buffer, which whoever works on them borrows.
    Tokens,
    /// Rows of a batch, a plan.
    Rows,
    /// A pool.
    Pool,
}

#[cfg(debug_assertions)]
mod held {
    use std::cell::RefCell;

    use super::Rank;

    thread_local! {
        static HELD: RefCell<Vec<Rank>> = const { RefCell::new(Vec::new()) };
    }

    /// One lock of this thread, from before it is waited for.
    pub struct Order(Rank);

    impl Order {
        pub fn enter(rank: Rank) -> Self {
            HELD.with_borrow_mut(|held| {
                assert!(held.iter().all(|other| *other < rank), "{rank:?} is taken while {held:?} are held");
                held.push(rank);
            });
            Self(rank)
        }
    }

    impl Drop for Order {
        fn drop(&mut self) {
            HELD.with_borrow_mut(|held| held.retain(|rank| *rank != self.0));
        }
    }
}

#[cfg(not(debug_assertions))]
mod held {
    use super::Rank;

    pub struct Order;

    impl Order {
        pub fn enter(_: Rank) -> Self {
            Self
        }
    }
}

pub use held::Order;

/// A lock with a rank.
pub struct Ordered<T> {
    rank: Rank,
    inner: Mutex<T>,
}

impl<T> Ordered<T> {
    pub fn new(rank: Rank, inner: T) -> Self {
        Self { rank, inner: Mutex::new(inner) }
    }

    pub fn lock(&self) -> PyResult<Guard<'_, T>> {
        let order = Order::enter(self.rank);
        Ok(Guard { inner: self.inner.lock().map_err(poisoned)?, _order: order })
    }

    pub fn get_mut(&mut self) -> Option<&mut T> {
        self.inner.get_mut().ok()
    }
}

/// What an ordered lock guards, for as long as this lives.
pub struct Guard<'a, T> {
    inner: MutexGuard<'a, T>,
    _order: Order,
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}
