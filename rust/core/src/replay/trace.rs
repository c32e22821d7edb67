//! A recorded workload: requests in order of arrival, each a time, two lengths and a path of blocks.
//!
//! Ids of blocks are whatever the recorder chose; here they are numbered from 0 in order of first
//! sight, so that they are token ids.

use std::collections::HashMap;
use std::fmt;

/// What a request says besides its blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrival {
    /// When it came, in milliseconds.
    pub time_ms: u64,
    /// Tokens of its prompt.
    pub prompt: u32,
    /// Tokens that were generated.
    pub output: u32,
}

/// Why a request is not one. Requests before it were added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceError {
    /// Where it stands in the call.
    pub index: usize,
    /// What is wrong with it.
    pub what: String,
}

impl fmt::Display for TraceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

/// No block: above the first of a prompt.
const ROOT: u32 = u32::MAX;
/// Blocks that a prompt may have: an id a token, and one token more.
const MOST_BLOCKS: i64 = i32::MAX as i64 - 1;

/// All requests of a workload.
pub struct Trace {
    block_tokens: u32,
    join: usize,
    full_blocks_only: bool,
    arrivals: Vec<Arrival>,
    /// Where each request's blocks end.
    ends: Vec<usize>,
    blocks: Vec<u32>,
    numbers: HashMap<i64, u32>,
    /// The block before each, by number.
    parents: Vec<u32>,
}

impl Trace {
    /// An empty trace of blocks of `block_tokens`. `join` makes one block of so many, leaving out what
    /// does not fill one; `full_blocks_only` leaves out a last block that a prompt fills in part.
    pub fn new(block_tokens: u32, join: usize, full_blocks_only: bool) -> Self {
        Self {
            block_tokens,
            join: join.max(1),
            full_blocks_only,
            arrivals: Vec::new(),
            ends: Vec::new(),
            blocks: Vec::new(),
            numbers: HashMap::new(),
            parents: Vec::new(),
        }
    }

    /// Add one request; `runs` are pairs of a first id and how many follow one another from it on.
    /// `index` is where it stands in the caller's call, for the error.
    pub fn push(&mut self, index: usize, arrival: Arrival, runs: &[i64]) -> Result<(), TraceError> {
        let refuse = |what: String| Err(TraceError { index, what });
        if !runs.len().is_multiple_of(2) {
            return refuse(format!("blocks come as pairs of first id and count, not as {} numbers", runs.len()));
        }
        // Before anything is written down for them: a short line may claim any number.
        let whole = i64::from(arrival.prompt.div_ceil(self.block_tokens));
        let claimed = runs.chunks_exact(2).try_fold(0i64, |sum, run| sum.checked_add(run[1].max(0)));
        if claimed.is_none_or(|claimed| claimed > whole) {
            return refuse(format!("more blocks than the {whole} of a prompt of {} tokens", arrival.prompt));
        }
        let most = if self.full_blocks_only { i64::from(arrival.prompt / self.block_tokens) } else { MOST_BLOCKS };
        let (begin, known) = (self.blocks.len(), self.parents.len());
        let mut fresh = Vec::new();
        let (mut parent, mut taken) = (ROOT, 0i64);
        let mut group = 0;
        for run in runs.chunks_exact(2) {
            let (first, count) = (run[0], run[1]);
            if first < 0 || count < 0 || first.checked_add(count).is_none() {
                self.take_back(begin, known, &fresh);
                return refuse(format!("no run of blocks: {count} from {first} on"));
            }
            for id in first..first + count.min(most - taken) {
                taken += 1;
                group += 1;
                if group < self.join {
                    continue;
                }
                group = 0;
                let number = self.number(id, parent, &mut fresh);
                if self.parents[number as usize] != parent || number == ROOT {
                    self.take_back(begin, known, &fresh);
                    return refuse(format!("block {id} follows another block than before: it is no prefix's id"));
                }
                self.blocks.push(number);
                parent = number;
            }
        }
        self.ends.push(self.blocks.len());
        self.arrivals.push(arrival);
        Ok(())
    }

    fn number(&mut self, id: i64, parent: u32, fresh: &mut Vec<i64>) -> u32 {
        let next = self.parents.len() as u32;
        let number = *self.numbers.entry(id).or_insert(next);
        if number == next {
            self.parents.push(parent);
            fresh.push(id);
        }
        number
    }

    /// Forget what a refused request has brought: its blocks, and those that were met for the first time.
    fn take_back(&mut self, begin: usize, known: usize, fresh: &[i64]) {
        self.blocks.truncate(begin);
        self.parents.truncate(known);
        for id in fresh {
            self.numbers.remove(id);
        }
    }

    /// Requests.
    pub fn num_requests(&self) -> usize {
        self.arrivals.len()
    }

    /// Blocks of all prompts.
    pub fn num_references(&self) -> usize {
        self.blocks.len()
    }

    /// Different blocks.
    pub fn num_unique(&self) -> usize {
        self.parents.len()
    }

    /// Tokens of a block, joined ones counted.
    pub fn block_tokens(&self) -> usize {
        (self.block_tokens as usize).saturating_mul(self.join)
    }

    /// Blocks and arrival of a request.
    pub fn request(&self, index: usize) -> (&[u32], Arrival) {
        let begin = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        (&self.blocks[begin..self.ends[index]], self.arrivals[index])
    }
}
