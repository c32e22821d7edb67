//! Replaying a recorded workload through a real pool, to see what a size and a policy are worth.
//!
//! A block of the trace is one token of the tree and one page of the pool (`block_size` 1), so
//! matching, sealing, pinning and eviction are those of every other pool. A request opens a sequence
//! over its blocks with one token more behind them: an open never matches its last token, and here
//! the last block of a prompt counts. That token is never computed, so it costs no page.

mod trace;

pub use trace::{Arrival, Trace, TraceError};

use crate::error::Result;
use crate::ids::Namespace;
use crate::pool::{MAX_TOKEN, OpenOptions, Pool};

const OPTIONS: OpenOptions = OpenOptions { namespace: Namespace(0), reuse: true, share: true, align: 1 };

/// A trace on its way through a pool.
pub struct Replay {
    pool: Pool,
    next: usize,
    hits: u64,
    references: u64,
    text: Vec<u32>,
}

impl Replay {
    /// Begin with an empty pool, whose blocks must be those of the trace: `block_size` 1, no tails.
    pub fn new(pool: Pool) -> Self {
        Self { pool, next: 0, hits: 0, references: 0, text: Vec::new() }
    }

    /// Replay up to `count` more requests, in order of arrival. Returns how many are done in all.
    ///
    /// Requests never overlap, and what they generate enters the cache only with a later prompt. A
    /// prompt larger than the pool keeps its first blocks only.
    pub fn advance(&mut self, trace: &Trace, count: usize) -> Result<usize> {
        let end = trace.num_requests().min(self.next.saturating_add(count));
        for request in self.next..end {
            let (blocks, arrival) = trace.request(request);
            self.pool.set_time(arrival.time_ms.saturating_mul(1000));
            self.serve(blocks, arrival)?;
            self.next = request + 1;
        }
        Ok(self.next)
    }

    fn serve(&mut self, blocks: &[u32], arrival: Arrival) -> Result<()> {
        self.references += blocks.len() as u64;
        let kept = &blocks[..blocks.len().min(self.pool.num_pages())];
        self.text.clear();
        self.text.extend_from_slice(kept);
        self.text.push(MAX_TOKEN);
        let (id, cached) = self.pool.open(&self.text, OPTIONS)?;
        self.hits += cached as u64;
        if cached < kept.len() {
            let missing = (kept.len() - cached) as i32;
            let plan = self.pool.plan(&[id], Some(&[missing]), None)?;
            self.pool.commit(plan);
        }
        self.pool.describe(id, arrival.prompt, arrival.output)?;
        self.pool.close(id);
        Ok(())
    }

    /// Requests done.
    pub fn num_done(&self) -> usize {
        self.next
    }

    /// Blocks that were cached when a prompt asked for them.
    pub fn hits(&self) -> u64 {
        self.hits
    }

    /// Blocks that prompts asked for.
    pub fn references(&self) -> u64 {
        self.references
    }

    /// The pool it goes through.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }
}
