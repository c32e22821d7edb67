//! Memory that will be read soon, and how it is asked for.

use crate::kernel::lanes::Arith;

/// Bytes that memory gives at once.
const LINE: usize = 64;

/// How far ahead of its reader a line of a full page is asked for: at 25 GB/s a core a third of a microsecond, a few
/// times what memory takes to answer, and a small part of the first level of cache.
const DISTANCE: usize = 8 * 1024;

/// What is read next: asked for while something else is computed, a few lines at a time. Many at once fill the
/// buffers of what the core waits for, and its loads of what is there already wait behind them.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// The page behind this one, of the same shape, or null.
    pub next: *const u8,
    /// False for all readers of a page but the first one.
    pub is_wanted: bool,
}

impl Ahead {
    /// Nothing.
    pub(super) const NONE: Self = Self { next: std::ptr::null(), is_wanted: false };

    /// What to ask for while `tokens` of `width` numbers each, from `own` on, are read: what lies `DISTANCE` further,
    /// a page at most.
    #[inline(always)]
    pub(super) fn walk<R>(self, own: *const R, tokens: usize, width: usize) -> Walk<R> {
        let next = self.next.cast::<R>();
        let steps = (DISTANCE / size_of::<R>() / width).max(1);
        if !self.is_wanted {
            Walk { at: std::ptr::null(), next: std::ptr::null(), left: 0 }
        } else if steps < tokens {
            Walk { at: own.wrapping_add(steps * width), next, left: tokens - steps }
        } else {
            Walk { at: next, next, left: usize::MAX }
        }
    }
}

/// Walks through the rest of a page and the beginning of the next.
pub(super) struct Walk<R> {
    /// Where to ask; null for nowhere.
    pub at: *const R,
    next: *const R,
    /// Tokens of the page before the next one's come.
    left: usize,
}

impl<R> Walk<R> {
    /// Go on by so many tokens.
    #[inline(always)]
    pub(super) fn step(&mut self, tokens: usize, width: usize) {
        if self.at.is_null() {
            return;
        }
        if self.left > tokens {
            self.left -= tokens;
            self.at = self.at.wrapping_add(tokens * width);
        } else {
            (self.at, self.left) = (self.next, usize::MAX);
        }
    }
}

/// Ask for `count` numbers, the first one `at` behind `from`, which will be read soon; nothing when that is null.
#[inline(always)]
pub(super) fn ask_for<A: Arith, R>(from: *const R, at: usize, count: usize) {
    if from.is_null() {
        return;
    }
    let mut line = 0;
    while line < count * size_of::<R>() {
        A::prefetch(from.wrapping_add(at).cast::<u8>().wrapping_add(line));
        line += LINE;
    }
}
