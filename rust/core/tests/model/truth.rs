//! What must be true at any moment.

use super::*;

impl Model {
    /// What an undone plan must leave as it was.
    pub(crate) fn snapshot(&self) -> (Vec<u64>, Vec<usize>, Vec<(usize, usize, Vec<u32>)>) {
        let now = self.pool.statistics();
        let numbers =
            vec![now.free_pages, now.mutable_pages, now.sealed_pages, now.shared_pages, now.pinned_pages, now.nodes];
        let mut prefixes: Vec<_> = self.sealed.iter().collect();
        prefixes.sort_unstable();
        let found = prefixes
            .iter()
            .map(|(namespace, tokens)| self.pool.matched(Namespace(*namespace), tokens).unwrap())
            .collect();
        let open = self.texts.iter().filter(|text| !text.is_closed);
        let texts = open.map(|text| {
            let table = self.pool.block_table(text.id).unwrap().iter().map(|page| page.0).collect();
            (self.pool.length(text.id).unwrap(), self.pool.pending(text.id).unwrap(), table)
        });
        (numbers, found, texts.collect())
    }

    pub(crate) fn check(&self) {
        self.pool.check().unwrap();
        let now = self.pool.statistics();
        assert_eq!(now.free_pages + now.mutable_pages + now.sealed_pages, now.num_pages);
        // Until a plan is filled, what its demotions move still lies where it was.
        let unfilled = self.plans.iter().filter(|open| !open.filled);
        let mut moving: HashMap<u32, u32> = HashMap::new();
        for (source, target) in unfilled.flat_map(|open| open.plan.demotions()) {
            moving.insert(target.0, moving.get(&source.0).copied().unwrap_or(source.0));
        }
        for open in self.plans.iter().filter(|open| open.filled) {
            for ((of, length, count), table) in open.rows.iter().zip(&open.tables).filter(|(row, _)| row.2 > 0) {
                let text = &self.texts[*of];
                for position in 0..length + count {
                    let slot = table[position / self.block] as usize * self.block + position % self.block;
                    let expected = digest(text.namespace, &text.tokens[..=position]);
                    assert_eq!(self.memory[slot], expected, "a step reads {position} of {:?}", text.tokens);
                }
            }
        }
        let mut writers: HashMap<u32, usize> = HashMap::new();
        for text in self.texts.iter().filter(|text| !text.is_closed) {
            assert_eq!(self.pool.tokens(text.id).unwrap(), text.tokens);
            assert_eq!(self.pool.length(text.id).unwrap(), text.length);
            let table = self.pool.block_table(text.id).unwrap();
            if !text.is_planned {
                for position in 0..text.length {
                    let page = table[position / self.block].0;
                    let page = moving.get(&page).copied().unwrap_or(page);
                    let slot = page as usize * self.block + position % self.block;
                    let expected = digest(text.namespace, &text.tokens[..=position]);
                    assert_eq!(self.memory[slot], expected, "position {position} of {:?}", text.tokens);
                }
            } else if let Some(open) =
                self.plans.iter().find(|open| open.rows.iter().any(|row| row.2 > 0 && self.texts[row.0].id == text.id))
            {
                let row = open.rows.iter().find(|row| self.texts[row.0].id == text.id).unwrap();
                for page in &table[row.1 / self.block..] {
                    *writers.entry(page.0).or_default() += 1;
                }
            }
        }
        assert!(writers.values().all(|count| *count == 1), "two plans write into one page: {writers:?}");
        let condemned = self.plans.iter().any(|open| open.plan.num_evicted() > 0);
        for text in self.texts.iter().filter(|text| !text.tokens.is_empty()) {
            let matched = self.pool.matched(Namespace(text.namespace), &text.tokens).unwrap();
            let known = self.sealed.iter().filter(|(namespace, _)| *namespace == text.namespace);
            let naive = known.map(|(_, tokens)| shared(tokens, &text.tokens)).max().unwrap_or(0);
            let tails = self.perhaps.iter().filter(|(namespace, _)| *namespace == text.namespace);
            let most = tails.map(|(_, tokens)| shared(tokens, &text.tokens)).max().unwrap_or(0).max(naive);
            assert!(matched <= most, "found {matched} of {most} tokens ever stored");
            if now.evicted_pages == 0 && !condemned {
                assert!(matched >= naive, "found {matched} of {naive} and nothing was evicted");
            }
            if !text.is_closed {
                assert!(matched >= text.sealed, "a pinned prefix was lost");
            }
        }
    }

    /// Let everything go and see that every page comes back.
    pub(crate) fn finish(mut self) {
        while let Some(open) = self.plans.len().checked_sub(1) {
            if open % 2 == 0 {
                self.abandon(open);
            } else {
                self.commit(open);
            }
            self.check();
        }
        for of in 0..self.texts.len() {
            if !self.texts[of].is_closed {
                self.close(of);
            }
        }
        self.unpin_all();
        self.check();
        let pages = self.pool.num_pages();
        assert_eq!(self.pool.num_free() + self.pool.num_evictable(), pages);
        self.pool.evict(pages);
        assert_eq!(self.pool.num_free(), pages);
        assert_eq!(self.pool.statistics().nodes, 0);
        self.pool.check().unwrap();
    }
}
