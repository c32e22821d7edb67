//! Steps: planned, filled, and finished in one of three ways.

use super::*;

impl Model {
    pub(crate) fn plan(&mut self, rows: &[usize], counts: Option<Vec<usize>>, tokens: Option<u32>) {
        let mut chosen: Vec<usize> = rows.iter().filter_map(|of| self.pick(*of)).collect();
        chosen.sort_unstable();
        chosen.dedup();
        self.plan_rows(&chosen, counts, tokens);
    }

    pub(crate) fn plan_rows(&mut self, chosen: &[usize], counts: Option<Vec<usize>>, tokens: Option<u32>) {
        let ids: Vec<SequenceId> = chosen.iter().map(|of| self.texts[*of].id).collect();
        let more = usize::from(tokens.is_some());
        let pending = |of: &usize| self.texts[*of].tokens.len() - self.texts[*of].length + more;
        let counts: Option<Vec<usize>> =
            counts.map(|counts| chosen.iter().zip(counts).map(|(of, count)| count % (pending(of) + 1)).collect());
        let sizes = counts.clone().unwrap_or_else(|| chosen.iter().map(pending).collect());
        let counts: Option<Vec<i32>> = counts.map(|counts| counts.iter().map(|count| *count as i32).collect());
        let tokens: Option<Vec<u32>> = tokens.map(|token| vec![token; chosen.len()]);
        self.settle();
        let before = self.snapshot();
        let read: HashSet<u32> =
            self.texts.iter().filter(|text| text.is_planned).flat_map(|text| self.table(text)).collect();
        match self.pool.plan(&ids, counts.as_deref(), tokens.as_deref()) {
            Ok(plan) => {
                assert_eq!(plan.num_tokens(), sizes.iter().sum::<usize>());
                for (source, target) in plan.demotions() {
                    assert_eq!(self.class(target.0), self.class(source.0) + 1, "no step, or two at once");
                    assert!(!read.contains(&source.0), "a page was taken that another step reads");
                }
                let mut rows = Vec::new();
                for (row, of) in chosen.iter().enumerate() {
                    let text = &mut self.texts[*of];
                    if let Some(tokens) = &tokens {
                        text.tokens.push(tokens[row]);
                    }
                    let touched = sizes[row] > 0 || tokens.is_some();
                    assert!(!(touched && text.is_planned), "planned twice");
                    text.is_planned |= touched;
                    rows.push((*of, text.length, sizes[row]));
                }
                self.plans.push(Open { plan, rows, appended: tokens.is_some(), filled: false, tables: Vec::new() });
            }
            Err(error) => {
                match error {
                    Error::Capacity { needed, free, evictable, .. } => assert!(needed > free + evictable),
                    Error::Planned(_) => assert!(chosen.iter().any(|of| self.texts[*of].is_planned)),
                    error => panic!("{error}"),
                }
                assert_eq!(before, self.snapshot(), "a refused plan left a trace");
            }
        }
    }

    fn class(&self, page: u32) -> usize {
        let [full, quantized, _] = self.counts;
        usize::from(page as usize >= full) + usize::from(page as usize >= full + quantized)
    }

    /// The pages of a text that is not closed, or waits to be.
    pub(crate) fn table(&self, text: &Text) -> Vec<u32> {
        self.pool.block_table(text.id).map_or(Vec::new(), |table| table.iter().map(|page| page.0).collect())
    }

    /// Finish what pages are moving, as a lock around plan and fill would.
    pub(crate) fn settle(&mut self) {
        for of in 0..self.plans.len() {
            if !self.plans[of].filled && self.plans[of].plan.demotions().len() > 0 {
                self.fill(of);
            }
        }
    }

    /// Fill a plan and find that one of its pages cannot be quantized; or, not `for_good`, fail before any is.
    pub(crate) fn refuse(&mut self, of: usize, which: usize, for_good: bool) {
        let moving = |open: &Open| !open.filled && open.plan.demotions().len() > 0;
        let Some(of) =
            (0..self.plans.len()).cycle().skip(of).take(self.plans.len()).find(|of| moving(&self.plans[*of]))
        else {
            return;
        };
        let Open { mut plan, rows, appended, .. } = self.plans.swap_remove(of);
        let width = plan.max_pages();
        let (mut tables, mut slots) = (vec![-1; width * rows.len()], vec![-1; plan.num_tokens()]);
        self.pool.fill(&mut plan, &mut tables, width, &mut slots, &mut vec![-1; 2 * rows.len()]).unwrap();
        if for_good {
            let moves: Vec<(u32, u32)> = plan.demotions().map(|(source, target)| (source.0, target.0)).collect();
            let refused = which % moves.len();
            // What is written at once with the one that is refused is tried, too.
            let mut tried = refused + 1;
            let is_apart = |page: u32| moves[refused..tried].iter().all(|(a, b)| page != *a && page != *b);
            if moves.get(tried).is_some_and(|(a, b)| is_apart(*a) && is_apart(*b)) && which.is_multiple_of(2) {
                tried += 1;
            }
            for (index, (source, target)) in moves[..tried].iter().enumerate() {
                if index == refused {
                    // It means nothing now.
                    let start = *target as usize * self.block;
                    self.memory[start..start + self.block].fill(u64::MAX);
                } else {
                    self.copy(*source, *target);
                }
            }
            self.pool.refuse(plan, tried, &[refused]);
        } else {
            self.pool.abandon(plan);
        }
        self.give_back(rows, appended);
    }

    pub(crate) fn copy(&mut self, source: u32, target: u32) {
        let source = source as usize * self.block;
        self.memory.copy_within(source..source + self.block, target as usize * self.block);
    }

    pub(crate) fn fill(&mut self, of: usize) {
        let Open { plan, rows, filled, tables: filled_tables, .. } = &mut self.plans[of];
        let width = plan.max_pages() + 1;
        let mut tables = vec![-1; width * rows.len()];
        let mut slots = vec![-1; plan.num_tokens()];
        let mut lengths = vec![-1; 2 * rows.len()];
        self.pool.fill(plan, &mut tables, width, &mut slots, &mut lengths).unwrap();
        if !*filled {
            for (source, target) in plan.demotions() {
                let source = source.0 as usize * self.block;
                self.memory.copy_within(source..source + self.block, target.0 as usize * self.block);
            }
            for (source, target) in plan.copies() {
                let source = source.0 as usize * self.block;
                self.memory.copy_within(source..source + self.block, target.0 as usize * self.block);
            }
        }
        self.pool.moved(plan);
        *filled = true;
        let mut slot = slots.iter();
        for (row, (of, length, count)) in rows.iter().enumerate() {
            assert_eq!(lengths[2 * row..2 * row + 2], [*length as i32, *count as i32]);
            let text = &self.texts[*of];
            let table = &tables[row * width..(row + 1) * width];
            for position in *length..length + count {
                let slot = *slot.next().unwrap() as usize;
                assert!(slot < self.counts[0] * self.block, "a quantized page is written");
                assert_eq!(slot, table[position / self.block] as usize * self.block + position % self.block);
                self.memory[slot] = digest(text.namespace, &text.tokens[..=position]);
            }
            let used = if *count == 0 { 0 } else { (length + count).div_ceil(self.block) };
            assert!(table[used..].iter().all(|page| *page == -1), "wrote past a row's table");
            filled_tables.push(table[..used].to_vec());
        }
    }

    pub(crate) fn commit(&mut self, of: usize) {
        if !self.plans[of].filled {
            self.fill(of);
        }
        let Open { plan, rows, appended, .. } = self.plans.swap_remove(of);
        let alone: Vec<bool> = rows.iter().map(|(of, ..)| self.is_alone(*of)).collect();
        self.pool.commit(plan);
        for ((of, length, count), alone) in rows.into_iter().zip(alone) {
            if count == 0 && !appended {
                continue;
            }
            let text = &mut self.texts[of];
            text.is_planned = false;
            text.length = length + count;
            for end in (self.block..=text.length.min(text.shareable)).step_by(self.block) {
                let block = (text.namespace, text.tokens[..end].to_vec());
                if alone {
                    self.sealed.insert(block);
                    text.sealed = text.sealed.max(end);
                } else {
                    self.perhaps.insert(block);
                }
            }
        }
    }

    /// Whether no fork holds a page that this text alone would seal.
    pub(crate) fn is_alone(&self, of: usize) -> bool {
        let text = &self.texts[of];
        let Ok(table) = self.pool.block_table(text.id) else { return false };
        let private = &table[text.sealed / self.block..];
        self.texts.iter().filter(|other| other.id != text.id).all(|other| match self.pool.block_table(other.id) {
            Ok(theirs) => !private.iter().any(|page| theirs.contains(page)),
            Err(_) => !other.is_planned,
        })
    }

    pub(crate) fn abandon(&mut self, of: usize) {
        let Open { plan, rows, appended, .. } = self.plans.swap_remove(of);
        self.pool.abandon(plan);
        self.give_back(rows, appended);
    }

    pub(crate) fn give_back(&mut self, rows: Vec<(usize, usize, usize)>, appended: bool) {
        for (of, _, count) in rows {
            let text = &mut self.texts[of];
            if appended {
                text.tokens.pop();
            }
            if count > 0 || appended {
                text.is_planned = false;
            }
        }
    }
}
