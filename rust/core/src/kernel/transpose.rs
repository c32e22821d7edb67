//! Transposing words by shuffling two halves into one another, as often as the count of rows doubles from 1.
//!
//! Flat loops, whatever the width; two rounds at once where there are two left.

use crate::kernel::lanes::Words;

/// Turn `[rows][width]` into `[width][rows]`: `rows` is a power of two, `width` a multiple of `LANES`.
///
/// Both slices are `rows * width` long; returned is the one that holds the result.
#[inline(always)]
pub fn to_columns<'a, A: Words>(mut words: &'a mut [u32], mut other: &'a mut [u32], rows: usize) -> &'a mut [u32] {
    let mut rounds = rows.trailing_zeros();
    while rounds > 0 {
        let step = if rounds == 1 { 2 } else { 4 };
        let part = words.len() / step;
        assert!(other.len() == words.len() && part.is_multiple_of(A::LANES) && part * step == words.len());
        let (from, to) = (words.as_ptr(), other.as_mut_ptr());
        for at in (0..part).step_by(A::LANES) {
            // SAFETY: reads end with the last part, writes with the last vector.
            unsafe {
                let (a, b) = (A::load_words(from.add(at)), A::load_words(from.add(at + part)));
                if step == 2 {
                    store::<A>(to.add(2 * at), A::zip(a, b));
                } else {
                    let (c, d) = (A::load_words(from.add(at + 2 * part)), A::load_words(from.add(at + 3 * part)));
                    let (even, odd) = (A::zip(a, c), A::zip(b, d));
                    store::<A>(to.add(4 * at), A::zip(even.0, odd.0));
                    store::<A>(to.add(4 * at + 2 * A::LANES), A::zip(even.1, odd.1));
                }
            }
        }
        (words, other) = (other, words);
        rounds -= step as u32 / 2;
    }
    words
}

/// Undo `to_columns`.
#[inline(always)]
pub fn to_rows<'a, A: Words>(mut words: &'a mut [u32], mut other: &'a mut [u32], rows: usize) -> &'a mut [u32] {
    let mut rounds = rows.trailing_zeros();
    while rounds > 0 {
        let step = if rounds == 1 { 2 } else { 4 };
        let part = words.len() / step;
        assert!(other.len() == words.len() && part.is_multiple_of(A::LANES) && part * step == words.len());
        let (from, to) = (words.as_ptr(), other.as_mut_ptr());
        for at in (0..part).step_by(A::LANES) {
            // SAFETY: reads end with the last vector, writes with the last part.
            unsafe {
                let from = from.add(step * at);
                let left = A::unzip(A::load_words(from), A::load_words(from.add(A::LANES)));
                if step == 2 {
                    A::store_words(to.add(at), left.0);
                    A::store_words(to.add(at + part), left.1);
                } else {
                    let from = from.add(2 * A::LANES);
                    let right = A::unzip(A::load_words(from), A::load_words(from.add(A::LANES)));
                    let (even, odd) = (A::unzip(left.0, right.0), A::unzip(left.1, right.1));
                    A::store_words(to.add(at), even.0);
                    A::store_words(to.add(at + part), odd.0);
                    A::store_words(to.add(at + 2 * part), even.1);
                    A::store_words(to.add(at + 3 * part), odd.1);
                }
            }
        }
        (words, other) = (other, words);
        rounds -= step as u32 / 2;
    }
    words
}

/// Store two vectors side by side.
///
/// # Safety
/// There is room for them.
#[inline(always)]
unsafe fn store<A: Words>(to: *mut u32, (a, b): (A::W, A::W)) {
    // SAFETY: the caller's.
    unsafe {
        A::store_words(to, a);
        A::store_words(to.add(A::LANES), b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::isa::{Body, Isa};

    struct There(usize, usize);

    impl Body for There {
        type Out = ();

        #[inline(always)]
        fn run<A: Words>(self) {
            let There(rows, width) = self;
            let start: Vec<u32> = (0..rows * width).map(|i| i as u32).collect();
            let (mut words, mut other) = (start.clone(), vec![0; start.len()]);
            let mut columns = to_columns::<A>(&mut words, &mut other, rows).to_vec();
            for (i, word) in columns.iter().enumerate() {
                assert_eq!(*word as usize, i % rows * width + i / rows);
            }
            assert_eq!(to_rows::<A>(&mut columns, &mut other, rows), start);
        }
    }

    #[test]
    fn columns_are_columns_and_come_back() {
        for isa in Isa::available() {
            for (rows, width) in [(1, 16), (2, 48), (4, 16), (8, 32), (16, 128), (32, 16)] {
                isa.run(There(rows, width));
            }
        }
    }
}
