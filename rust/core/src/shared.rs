//! A lock whose holder carries out what others leave behind: whoever must not wait leaves word instead.
//!
//! Finalizers run in the middle of whatever their thread does, maybe while it holds this very lock. Knows nothing of what
//! it guards. `tests/loom.rs` tries every order in which threads can come by.

use std::ops::{Deref, DerefMut};

#[cfg(loom)]
use loom::sync::{Mutex, MutexGuard};
#[cfg(not(loom))]
use std::sync::{Mutex, MutexGuard};

/// What can be left behind for a shared thing, and how it is carried out.
pub trait Settle {
    /// What is left behind.
    type Left;
    /// Carry it out.
    fn settle(&mut self, left: Self::Left);
}

/// A holder panicked: what the lock guards can no longer be trusted.
#[derive(Debug)]
pub struct Poisoned;

/// Something behind a lock, and what was left for it.
pub struct Shared<T: Settle> {
    inner: Mutex<T>,
    /// Taken for a push or a move of a vector, inside which no finalizer can run.
    left: Mutex<Vec<T::Left>>,
}

impl<T: Settle> Shared<T> {
    /// Share `inner`.
    pub fn new(inner: T) -> Self {
        Self { inner: Mutex::new(inner), left: Mutex::new(Vec::new()) }
    }

    /// Wait for the lock; all is done then that was left before.
    pub fn lock(&self) -> Result<Held<'_, T>, Poisoned> {
        let mut inner = self.inner.lock().map_err(|_| Poisoned)?;
        self.settle(&mut inner);
        Ok(Held { inner: Some(inner), shared: self })
    }

    /// Have something carried out: now, if nobody holds the lock, or as soon as they let go of it. Never waits for them.
    /// Nothing is done in a poisoned one.
    pub fn leave(&self, what: T::Left) {
        if let Ok(mut left) = self.left.lock() {
            left.push(what);
        }
        self.settle_if_free();
    }

    fn taken(&self) -> Vec<T::Left> {
        self.left.lock().map(|mut left| std::mem::take(&mut *left)).unwrap_or_default()
    }

    fn settle(&self, inner: &mut T) {
        loop {
            let left = self.taken();
            if left.is_empty() {
                return;
            }
            for each in left {
                inner.settle(each);
            }
        }
    }

    fn settle_if_free(&self) {
        // Whoever has the lock looks again after letting go of it, and whoever finds it held has left word before:
        // nothing stays behind.
        while self.left.lock().is_ok_and(|left| !left.is_empty()) {
            let Ok(mut inner) = self.inner.try_lock() else { return };
            self.settle(&mut inner);
        }
    }
}

/// The lock, for as long as this lives.
pub struct Held<'a, T: Settle> {
    inner: Option<MutexGuard<'a, T>>,
    shared: &'a Shared<T>,
}

impl<T: Settle> Deref for Held<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.inner.as_ref().expect("held until dropped")
    }
}

impl<T: Settle> DerefMut for Held<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.inner.as_mut().expect("held until dropped")
    }
}

impl<T: Settle> Drop for Held<'_, T> {
    fn drop(&mut self) {
        self.inner = None;
        self.shared.settle_if_free();
    }
}
