//! Transposing words by shuffling two halves into one another, as often as the count of rows doubles from 1.
//!
//! Each round is a flat loop that every instruction set has shuffles for, whatever the width.

/// Turn `[rows][width]` into `[width][rows]`; `rows` is a power of two. The result is in the first; both are
/// `rows * width` long.
#[inline(always)]
pub fn to_columns<'a>(mut words: &'a mut [u32], mut other: &'a mut [u32], rows: usize) -> &'a mut [u32] {
    for _ in 0..rows.trailing_zeros() {
        shuffle(words, other);
        (words, other) = (other, words);
    }
    words
}

/// Undo `to_columns`.
#[inline(always)]
pub fn to_rows<'a>(mut words: &'a mut [u32], mut other: &'a mut [u32], rows: usize) -> &'a mut [u32] {
    for _ in 0..rows.trailing_zeros() {
        unshuffle(words, other);
        (words, other) = (other, words);
    }
    words
}

#[inline(always)]
fn shuffle(from: &[u32], to: &mut [u32]) {
    let (left, right) = from.split_at(from.len() / 2);
    for ((pair, a), b) in to.chunks_exact_mut(2).zip(left).zip(right) {
        pair[0] = *a;
        pair[1] = *b;
    }
}

#[inline(always)]
fn unshuffle(from: &[u32], to: &mut [u32]) {
    let (left, right) = to.split_at_mut(from.len() / 2);
    for ((pair, a), b) in from.chunks_exact(2).zip(left).zip(right) {
        *a = pair[0];
        *b = pair[1];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_columns_and_come_back() {
        for (rows, width) in [(1, 3), (2, 5), (4, 1), (16, 40), (32, 7)] {
            let start: Vec<u32> = (0..rows * width).map(|i| i as u32).collect();
            let (mut words, mut other) = (start.clone(), vec![0; start.len()]);
            let columns = to_columns(&mut words, &mut other, rows).to_vec();
            for (i, word) in columns.iter().enumerate() {
                assert_eq!(*word as usize, i % rows * width + i / rows);
            }
            let mut words = columns;
            assert_eq!(to_rows(&mut words, &mut other, rows), start);
        }
    }
}
