//! What can go wrong, each case once.

use std::fmt;

/// The core's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call was refused. Nothing has changed when one is returned.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The pool cannot hold what was asked, even after evicting all that may leave.
    Capacity {
        /// Pages asked for.
        needed: usize,
        /// Pages that are free.
        free: usize,
        /// Pages that could be evicted.
        evictable: usize,
        /// Pages of the pool.
        total: usize,
    },
    /// Users would pin more pages than they may.
    Pinned {
        /// Pages of a class that are not pinned yet and would have to be.
        needed: usize,
        /// Pages of it that they pin.
        pinned: usize,
        /// Pages of it that they may pin.
        most: usize,
        /// Pages of it.
        total: usize,
    },
    /// The sequence was closed.
    Closed,
    /// The sequence in this row of a batch was closed.
    ClosedRow(usize),
    /// The sequence is in an open plan, so it cannot be planned, forked, truncated or appended to.
    Planned(SequenceLabel),
    /// A token id is outside `0..2**31`.
    Token {
        /// Where it stands in the argument.
        index: usize,
        /// Its 32 bits.
        value: u32,
    },
    /// An argument that cannot be meant.
    Argument(String),
    /// An invariant does not hold (only from `check`).
    Broken(String),
}

/// A sequence as a message names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceLabel(pub(crate) crate::SequenceId);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capacity { needed, free, evictable, total } => {
                write!(f, "needs {needed} pages, {free} free, {evictable} evictable of {total}")
            }
            Self::Pinned { needed, pinned, most, total } => {
                write!(f, "needs {needed} pages to pin, {pinned} pinned of at most {most} of {total}")
            }
            Self::Closed => f.write_str("the sequence is closed"),
            Self::ClosedRow(row) => write!(f, "the sequence in row {row} is closed"),
            Self::Planned(label) => write!(f, "sequence {} is in an open plan", label.0),
            Self::Token { index, value } => {
                write!(f, "token ids lie in 0..2147483648, and index {index} holds {value}")
            }
            Self::Argument(what) | Self::Broken(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Error {}
