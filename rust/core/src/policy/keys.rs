//! Keys of blocks. A key is a hash of a block's tokens and of all before them, so it names a text in one
//! namespace.
//!
//! A collision costs a wrong count or a wrong explanation, never a wrong page: nothing is found by it.

use crate::ids::Namespace;

/// Tokens that are masked by one pass over the secrets.
const STRIPE: usize = 64;
/// Keys have 63 bits: whoever stores one may use the last for something else.
const KEY: u64 = u64::MAX >> 1;
const BEGIN: u64 = 0x9e37_79b9_7f4a_7c15;
const FOLLOW: u64 = 0xe703_7ed1_a0b4_28db;

/// Makes keys. Tokens are the users' choice: without the secrets nobody can choose two texts of one key.
pub(crate) struct Keys {
    secrets: [[u64; 2]; STRIPE / 4],
    seed: u64,
}

impl Keys {
    pub(crate) fn new(seed: u64) -> Self {
        let mut state = seed;
        let mut draw = || {
            state = state.wrapping_add(BEGIN);
            fold(state, state ^ FOLLOW) | 1
        };
        Self { secrets: std::array::from_fn(|_| [draw(), draw()]), seed }
    }

    /// The key of nothing: above a namespace's first block.
    pub(crate) fn root(&self, namespace: Namespace) -> u64 {
        fold(self.seed ^ BEGIN, namespace.0 ^ self.secrets[0][0]) & KEY
    }

    /// The key of the block that follows `key` and holds `tokens`.
    ///
    /// Only the last product waits for `key`: those of the tokens, four each, overlap with other blocks'.
    #[inline]
    pub(crate) fn follow(&self, key: u64, tokens: &[u32]) -> u64 {
        let sum = match <&[u32; 16]>::try_from(tokens) {
            Ok(usual) => self.sum(usual),
            Err(_) => self.sum_stripes(tokens),
        };
        fold(key ^ sum, FOLLOW ^ tokens.len() as u64) & KEY
    }

    fn sum_stripes(&self, tokens: &[u32]) -> u64 {
        let mut stripes = tokens.chunks(STRIPE);
        let first = self.sum(stripes.next().unwrap_or(&[]));
        stripes.fold(first, |sum, stripe| fold(sum ^ BEGIN, FOLLOW).wrapping_add(self.sum(stripe)))
    }

    #[inline]
    fn sum(&self, stripe: &[u32]) -> u64 {
        let (words, rest) = stripe.as_chunks::<4>();
        let masked = |word: &[u32; 4], secret: &[u64; 2]| {
            fold(pair(word[0], word[1]) ^ secret[0], pair(word[2], word[3]) ^ secret[1])
        };
        let sum = |sum: u64, (word, secret)| sum.wrapping_add(masked(word, secret));
        let whole = words.iter().zip(&self.secrets).fold(0, sum);
        if rest.is_empty() {
            return whole;
        }
        let mut word = [0; 4];
        word[..rest.len()].copy_from_slice(rest);
        whole.wrapping_add(masked(&word, &self.secrets[words.len()]))
    }
}

fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// Fold the 128-bit product: every input bit reaches both ends of the result.
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn texts_that_differ_anywhere_have_other_keys() {
        let keys = Keys::new(7);
        let root = keys.root(Namespace(1));
        let mut seen = HashSet::from([root, keys.root(Namespace(2)), Keys::new(8).root(Namespace(1))]);
        for length in [1, 2, 3, 4, 5, 7, 16, 63, 64, 65, 128, 200] {
            let text: Vec<u32> = (0..length).map(|token| token % 3).collect();
            assert!(seen.insert(keys.follow(root, &text)), "a text of {length}");
            for changed in 0..text.len() {
                for other in [5, 1 << 30] {
                    let mut text = text.clone();
                    text[changed] = other;
                    assert!(seen.insert(keys.follow(root, &text)), "token {changed} of {length}");
                }
            }
        }
        let block = keys.follow(root, &[1, 2, 3, 4]);
        assert!(seen.insert(keys.follow(block, &[1, 2, 3, 4])), "the same block, behind itself");
        assert!(seen.iter().all(|key| *key <= KEY));
    }

    #[test]
    fn sampling_by_any_bits_of_a_key_is_fair() {
        let keys = Keys::new(3);
        let mut key = keys.root(Namespace(0));
        let mut counts = [0u32; 63];
        for token in 0..4096 {
            key = keys.follow(key, &[token]);
            for (bit, count) in counts.iter_mut().enumerate() {
                *count += (key >> bit & 1) as u32;
            }
        }
        assert!(counts.iter().all(|count| (1850..2250).contains(count)), "{counts:?}");
    }
}
