//! What callers do to texts between steps, done to the pool and to the model of it.

use super::*;

impl Model {
    pub(crate) fn new(counts: [usize; 3], block: usize, keep_tails: bool) -> Self {
        Self {
            pool: Pool::with_classes(counts, block, keep_tails).unwrap(),
            counts,
            block,
            texts: Vec::new(),
            plans: Vec::new(),
            memory: vec![0; counts.iter().sum::<usize>() * block],
            sealed: HashSet::new(),
            perhaps: HashSet::new(),
            keep_tails,
            pins: Vec::new(),
            now: 1,
        }
    }

    pub(crate) fn pick(&self, of: usize) -> Option<usize> {
        let open: Vec<usize> = (0..self.texts.len()).filter(|index| !self.texts[*index].is_closed).collect();
        (!open.is_empty()).then(|| open[of % open.len()])
    }

    pub(crate) fn step(&mut self, step: Step) {
        match step {
            Step::Open { namespace, stem, keep, tokens, reuse, share, align } => {
                let text = self.continued(stem, keep, tokens);
                self.open(namespace, text, reuse, share, align);
            }
            Step::Answer { namespace, stem, keep, tokens, close } => {
                // A whole request, or too few would ever get that far.
                let text = self.continued(stem, keep, tokens);
                self.open(namespace, text, true, true, 1);
                let (of, open) = (self.texts.len() - 1, self.plans.len());
                self.plan_rows(&[of], None, Some(1));
                if self.plans.len() > open {
                    self.commit(open);
                }
                if close {
                    self.close(of);
                }
            }
            Step::Append { of, tokens } => self.append(of, &tokens),
            Step::Plan { rows, counts, tokens } => self.plan(&rows, counts, tokens),
            Step::Fill { of } => {
                if !self.plans.is_empty() {
                    let of = of % self.plans.len();
                    self.fill(of);
                }
            }
            Step::Refuse { of, which, for_good } => self.refuse(of, which, for_good),
            Step::Freeze { of, length } => self.freeze(of, length),
            Step::Commit { of } => {
                if !self.plans.is_empty() {
                    self.commit(of % self.plans.len());
                }
            }
            Step::Abandon { of } => {
                if !self.plans.is_empty() {
                    self.abandon(of % self.plans.len());
                }
            }
            Step::PlanAndAbandon { rows } => {
                self.settle();
                let before = self.snapshot();
                let open = self.plans.len();
                self.plan(&rows, None, Some(1));
                if self.plans.len() > open {
                    self.abandon(open);
                    assert_eq!(before, self.snapshot(), "an abandoned plan left a trace");
                }
            }
            Step::Fork { of } => self.fork(of),
            Step::Truncate { of, length } => self.truncate(of, length),
            Step::Share { of, length } => self.share(of, length),
            Step::Close { of } => {
                let Some(of) = self.pick(of) else { return };
                self.close(of);
            }
            Step::Evict { pages } => {
                let could = self.pool.num_evictable();
                assert_eq!(self.pool.evict(pages), pages.min(could));
            }
            Step::Demote { pages } => {
                self.settle();
                let plan = self.pool.plan_demotion(pages).unwrap();
                self.plans.push(Open { plan, rows: Vec::new(), appended: false, filled: false, tables: Vec::new() });
                self.fill(self.plans.len() - 1);
                self.abandon(self.plans.len() - 1);
            }
            Step::Drop { namespace } => {
                self.pool.drop_namespace(Namespace(namespace));
                self.forget_pins(namespace);
            }
            Step::Say(saying) => self.say(&saying),
        }
    }

    pub(crate) fn append(&mut self, of: usize, tokens: &[u32]) {
        let Some(of) = self.pick(of) else { return };
        let text = &mut self.texts[of];
        match self.pool.append(text.id, tokens) {
            Ok(()) => text.tokens.extend(tokens),
            Err(error) => assert!(text.is_planned && matches!(error, Error::Planned(_))),
        }
    }

    pub(crate) fn freeze(&mut self, of: usize, length: usize) {
        let Some(of) = self.pick(of) else { return };
        let text = &self.texts[of];
        match self.pool.freeze(text.id, length) {
            Ok(()) => assert!(length <= text.length),
            Err(Error::Planned(_)) => assert!(text.is_planned),
            Err(error) => assert!(length > text.length, "{error}"),
        }
    }

    pub(crate) fn fork(&mut self, of: usize) {
        let Some(of) = self.pick(of) else { return };
        let text = &self.texts[of];
        match self.pool.fork(text.id) {
            Ok(id) => {
                let Text { namespace, length, shareable, sealed, .. } = *text;
                let tokens = text.tokens.clone();
                let fork =
                    Text { id, namespace, tokens, length, shareable, sealed, is_planned: false, is_closed: false };
                self.texts.push(fork);
            }
            Err(error) => assert!(text.is_planned && matches!(error, Error::Planned(_))),
        }
    }

    pub(crate) fn truncate(&mut self, of: usize, length: usize) {
        let Some(of) = self.pick(of) else { return };
        let text = &mut self.texts[of];
        match self.pool.truncate(text.id, length) {
            Ok(()) => {
                text.tokens.truncate(length);
                text.length = text.length.min(length);
                text.sealed = text.sealed.min(length / self.block * self.block);
            }
            Err(Error::Planned(_)) => assert!(text.is_planned),
            Err(error) => assert!(length > text.tokens.len(), "{error}"),
        }
    }

    pub(crate) fn share(&mut self, of: usize, length: usize) {
        let Some(of) = self.pick(of) else { return };
        let text = &mut self.texts[of];
        match self.pool.share_up_to(text.id, length) {
            Ok(()) => text.shareable = length,
            Err(error) => assert!(text.is_planned && matches!(error, Error::Planned(_))),
        }
    }

    /// Close a text. Its last, partly filled block stays when no fork holds the page, and when it is not what was
    /// left of a quantized one: the tree keeps those whole.
    pub(crate) fn close(&mut self, of: usize) {
        let Text { id, namespace, length, shareable, is_planned, .. } = self.texts[of];
        let tail = (namespace, self.texts[of].tokens[..length].to_vec());
        if !self.keep_tails {
        } else if is_planned {
            let tokens = &self.texts[of].tokens;
            self.perhaps.extend((0..=tokens.len()).map(|end| (namespace, tokens[..end].to_vec())));
        } else if length > 0 && length <= shareable {
            let page = self.pool.block_table(id).unwrap()[(length - 1) / self.block];
            let is_cut = length % self.block != 0 && page.0 as usize >= self.counts[0];
            let mut others = self.texts.iter().filter(|text| !text.is_closed && text.id != id);
            let mut copies = self.plans.iter().flat_map(|open| open.plan.copies());
            if is_cut
                || others.any(|text| self.pool.block_table(text.id).unwrap().contains(&page))
                || !self.is_alone(of)
                || copies.any(|(source, _)| *source == page)
                || self.texts.iter().any(|text| text.is_closed && text.is_planned)
            {
                self.perhaps.insert(tail);
            } else {
                self.sealed.insert(tail);
            }
        }
        self.pool.close(id);
        assert!(self.pool.is_closed(id));
        self.texts[of].is_closed = true;
    }

    pub(crate) fn open(&mut self, namespace: u64, tokens: Vec<u32>, reuse: bool, share: bool, align: usize) {
        let known = self.pool.matched(Namespace(namespace), &tokens).unwrap();
        let options = OpenOptions { namespace: Namespace(namespace), reuse, share, align };
        let (id, cached) = self.pool.open(&tokens, options).unwrap();
        let expected = if reuse { known.min(tokens.len().saturating_sub(1)) / align * align } else { 0 };
        assert_eq!(cached, expected);
        let length = cached;
        let (shareable, sealed) = (if share { usize::MAX } else { 0 }, 0);
        self.texts.push(Text { id, namespace, tokens, length, shareable, sealed, is_planned: false, is_closed: false });
    }

    /// The beginning of another text, and more.
    pub(crate) fn continued(&self, stem: usize, keep: usize, tokens: Vec<u32>) -> Vec<u32> {
        let mut text = self.pick(stem).map_or(Vec::new(), |stem| self.texts[stem].tokens.clone());
        text.truncate(keep);
        text.extend(tokens);
        text
    }
}
