//! What a use of a block looks like: of the text, and of the block in it.

use super::Mark;
use super::record::FEATURES;
use super::scale::{LAST, octave, step};
use super::score::Score;
use crate::ids::PageId;
use crate::policy::History;

/// Where the block's own features stand among all; the others are the text's.
pub(super) const OWN: [usize; 3] = [5, 6, 7];
/// A block that so many different ones followed belongs to a prompt that an application gives to all.
const SHARED_BY: u8 = 4;

/// The lengths of a text that ended.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Turn {
    /// Tokens of the prompt.
    pub prompt: u32,
    /// Tokens made after it.
    pub output: u32,
}

/// A text's features.
pub(super) struct Request {
    features: [u8; FEATURES],
    num_blocks: usize,
}

impl Request {
    /// Read a text's features off its path, and note on the path that a prompt ended there.
    ///
    /// Turn, length, new tokens since the last turn's end, time since then, tokens generated, tokens
    /// never seen, time from the turn before to the last, and which prompt it shares with others: those of one
    /// application fare alike.
    pub(super) fn read(
        history: &History,
        marks: &mut [Mark],
        path: &[PageId],
        turn: Turn,
        block_tokens: u32,
        now: u64,
    ) -> Self {
        let full = path.len().min((turn.prompt / block_tokens) as usize);
        let (mut turns, mut last, mut known) = (0, None::<(usize, u64)>, 0);
        let mut pause = None;
        for (position, page) in path[..full].iter().enumerate() {
            let mark = &marks[page.index()];
            if mark.uses > 0 {
                known = position + 1;
            }
            if mark.ended > 0 {
                turns += 1;
                pause = last.map(|(_, before)| mark.ended.saturating_sub(before));
                last = Some((position, mark.ended));
            }
        }
        let prompt = f64::from(turn.prompt);
        let reached = last.map_or(0, |(position, _)| position + 1);
        let tokens_after = |blocks: usize| prompt - blocks as f64 * f64::from(block_tokens);
        let seconds = |time: Option<u64>| time.map_or(0, |time| (1 + octave(time as f64 / 1e6, 0, 1)).min(LAST));
        let mut features = [0; FEATURES];
        features[0] = step(turns, &[1, 2, 3, 4, 5, 6, 10, 20, 40]);
        features[1] = octave(prompt, 8, 2);
        features[2] = octave(tokens_after(reached), 4, 1);
        features[3] = seconds(last.map(|(_, ended)| now.saturating_sub(ended)));
        features[4] = octave(f64::from(turn.output), 1, 1);
        features[8] = octave(tokens_after(known), 4, 1);
        features[9] = seconds(pause);
        let shared = path[..full].iter().rposition(|page| marks[page.index()].kids >= SHARED_BY);
        if let Some(shared) = shared {
            let key = history.key(path[shared]);
            // Twice, by other bits each: two of a value rarely share both.
            for (feature, bits) in [(10, key >> 40), (11, key >> 52)] {
                features[feature] = 1 + (bits % u64::from(LAST)) as u8;
            }
        }
        if let Some(end) = full.checked_sub(1) {
            marks[path[end].index()].ended = now;
        }
        let branch = path.windows(2).find(|pair| marks[pair[1].index()].uses == 0);
        if let Some(pair) = branch {
            let mark = &mut marks[pair[0].index()];
            mark.kids = mark.kids.saturating_add(1);
        }
        Self { features, num_blocks: path.len() }
    }

    /// Score before the block's own features are added.
    pub(super) fn base(&self, score: &Score) -> f32 {
        let features = self.features.iter().enumerate().filter(|(feature, _)| !OWN.contains(feature));
        features.map(|(feature, value)| score.weight(feature, *value)).sum::<f32>() + score.bias()
    }

    /// A block's own features: its uses so far, how far from the end it is, what has followed it.
    pub(super) fn own(&self, mark: &Mark, position: usize) -> [u8; 3] {
        let behind = self.num_blocks - 1 - position;
        [
            step(usize::from(mark.uses), &[1, 2, 3, 4, 8, 16, 64]),
            step(behind, &[1, 2, 4, 8, 16, 32, 64]),
            mark.kids.min(4),
        ]
    }

    /// All features together.
    pub(super) fn features(&self, own: [u8; 3]) -> [u8; FEATURES] {
        let mut features = self.features;
        for (feature, value) in OWN.into_iter().zip(own) {
            features[feature] = value;
        }
        features
    }
}
