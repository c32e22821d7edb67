//! One step: plan, fill, then commit or abandon.

use super::held::Held;
use super::{Pool, check_tokens};
use crate::error::{Error, Result, SequenceLabel};
use crate::ids::{PageId, SequenceId};
use crate::plan::{Plan, Row};
use crate::policy::Cause;
use crate::tree::Sealing;

/// Number slots one after the other from `first` on, eight at a time: one instruction or two.
#[inline]
fn number(slots: &mut [i32], first: u32) {
    let (eights, rest) = slots.as_chunks_mut::<8>();
    let mut next = first as i32;
    for eight in eights {
        *eight = std::array::from_fn(|offset| next.wrapping_add(offset as i32));
        next = next.wrapping_add(8);
    }
    for slot in rest {
        *slot = next;
        next = next.wrapping_add(1);
    }
}

impl Pool {
    /// Reserve pages for the next step of every row, all of them or none.
    ///
    /// `counts` says how many pending tokens of each row are computed (`None`: all); `tokens` appends
    /// one to each row first. Victims are out of sight from now on and gone once the plan is filled.
    pub fn plan(&mut self, rows: &[SequenceId], counts: Option<&[i32]>, tokens: Option<&[u32]>) -> Result<Plan> {
        let mut plan = self.spare.take().unwrap_or_default();
        match self.survey(&mut plan, rows, counts, tokens) {
            Ok((needed, held)) => {
                self.take_room(&mut plan, needed, held);
                self.hand_out(&mut plan, tokens);
                self.totals.plans += 1;
                Ok(plan)
            }
            Err(error) => {
                for row in plan.rows.iter().filter(|row| plan.touches(row)) {
                    if let Some(sequence) = self.sequences.find_mut(row.sequence) {
                        sequence.planned = false;
                    }
                }
                self.retire(plan);
                Err(error)
            }
        }
    }

    /// Ask every row what it needs, and mark it as planned. Returns the pages needed, and who in use gives some.
    fn survey(
        &mut self,
        plan: &mut Plan,
        rows: &[SequenceId],
        counts: Option<&[i32]>,
        tokens: Option<&[u32]>,
    ) -> Result<(usize, Held)> {
        for (name, length) in [("counts", counts.map(<[i32]>::len)), ("tokens", tokens.map(<[u32]>::len))] {
            if let Some(length) = length.filter(|length| *length != rows.len()) {
                return Err(Error::Argument(format!("{name} must hold one a row: {length} for {} rows", rows.len())));
            }
        }
        check_tokens(tokens.unwrap_or(&[]), 0)?;
        plan.appended = tokens.is_some();
        let mut needed = 0;
        for (index, id) in rows.iter().enumerate() {
            let sequence = self.sequences.get_mut(*id).map_err(|_| Error::ClosedRow(index))?;
            let pending = sequence.pending() + u32::from(plan.appended);
            let count = match counts {
                None => pending,
                Some(counts) => {
                    u32::try_from(counts[index]).ok().filter(|count| *count <= pending).ok_or_else(|| {
                        Error::Argument(format!("row {index} has {pending} pending tokens, not {}", counts[index]))
                    })?
                }
            };
            let (length, pages) = (sequence.length, sequence.table.len() as u32);
            let row = Row { sequence: *id, length, count, pages };
            if plan.touches(&row) {
                if sequence.planned {
                    return Err(Error::Planned(SequenceLabel(*id)));
                }
                sequence.planned = true;
            }
            if count > 0 {
                let end = ((length + count - 1) >> self.shift) + 1;
                let partly = length & ((1 << self.shift) - 1) != 0;
                let copies = partly && self.pages.must_copy(sequence.table[(length >> self.shift) as usize]);
                needed += (end - pages) as usize + usize::from(copies);
                plan.max_pages = plan.max_pages.max(end as usize);
                plan.num_tokens += count as usize;
            }
            plan.rows.push(row);
        }
        let held = self.find_room(plan, needed)?;
        Ok((needed, held))
    }

    /// Hand the reserved pages out in row order.
    fn hand_out(&mut self, plan: &mut Plan, tokens: Option<&[u32]>) {
        let mut next = 0;
        for (index, row) in plan.rows.iter().enumerate() {
            let Some(sequence) = self.sequences.find_mut(row.sequence) else { continue };
            if let Some(tokens) = tokens {
                sequence.tail.push(tokens[index]);
            }
            if row.count == 0 {
                continue;
            }
            let first = (row.length >> self.shift) as usize;
            if row.length & ((1 << self.shift) - 1) != 0 && self.pages.must_copy(sequence.table[first]) {
                let source = std::mem::replace(&mut sequence.table[first], plan.reserved[next]);
                sequence.replaced = Some(source);
                plan.copies.push((source, plan.reserved[next]));
                next += 1;
            }
            let end = ((row.length + row.count - 1) >> self.shift) + 1;
            let more = (end - row.pages) as usize;
            sequence.table.extend_from_slice(&plan.reserved[next..next + more]);
            next += more;
        }
    }

    /// Write block tables (rows of `width`), slots and lengths. The victims are gone from here on.
    ///
    /// Entries past a row's table, and rows of zero tokens, are left alone in `tables`.
    pub fn fill(
        &mut self,
        plan: &mut Plan,
        tables: &mut [i32],
        width: usize,
        slots: &mut [i32],
        lengths: &mut [i32],
    ) -> Result<()> {
        let rows = plan.rows.len();
        for (name, has, needs) in [
            ("tables rows", tables.len().checked_div(width).unwrap_or(rows), rows),
            ("tables width", width, plan.max_pages),
            ("slots", slots.len(), plan.num_tokens),
            ("lengths", lengths.len(), 2 * rows),
        ] {
            if has < needs {
                return Err(Error::Argument(format!("{name} must hold at least {needs}, not {has}")));
            }
        }
        self.settle(plan);
        let mut slots = slots;
        for (index, row) in plan.rows.iter().enumerate() {
            lengths[2 * index] = row.length as i32;
            lengths[2 * index + 1] = row.count as i32;
            if row.count == 0 {
                continue;
            }
            let Some(sequence) = self.sequences.find_mut(row.sequence) else { continue };
            let target = &mut tables[index * width..index * width + sequence.table.len()];
            for (entry, page) in target.iter_mut().zip(&sequence.table) {
                *entry = page.0 as i32;
            }
            let (own, rest) = slots.split_at_mut(row.count as usize);
            slots = rest;
            let (first, offset) = (row.length >> self.shift, row.length & ((1 << self.shift) - 1));
            let pages = &sequence.table[first as usize..];
            let (begun, rest) = own.split_at_mut(own.len().min(((1 << self.shift) - offset) as usize));
            number(begun, (pages[0].0 << self.shift) + offset);
            for (block, page) in rest.chunks_mut(1 << self.shift).zip(&pages[1..]) {
                number(block, page.0 << self.shift);
            }
        }
        Ok(())
    }

    /// Let the victims go. From here on the targets of demotions may be written.
    fn settle(&mut self, plan: &mut Plan) {
        if std::mem::replace(&mut plan.is_filled, true) {
            return;
        }
        if plan.victim_pages.is_empty() {
            return;
        }
        self.totals.evicted_pages += plan.num_evicted as u64;
        self.forget(plan, plan.cause.unwrap_or(Cause::Asked));
        self.tree.finish(&mut plan.victims);
        // Those of full precision are reserved, and of the others some take demotions.
        let spare = plan.victim_pages.iter().filter(|page| self.pages.is_set_aside(**page));
        let spare: Vec<PageId> = spare.copied().collect();
        self.pages.free(&spare);
        plan.victim_pages.clear();
    }

    /// Make the step true: lengths move on, full blocks are sealed, and private ones are final, too.
    pub fn commit(&mut self, plan: Plan) {
        self.finish(plan, true);
    }

    /// Make the step true for a caller who writes its pages later: `freeze` says how far they are final.
    pub fn commit_unwritten(&mut self, plan: Plan) {
        self.finish(plan, false);
    }

    fn finish(&mut self, mut plan: Plan, is_final: bool) {
        self.settle(&mut plan);
        self.moved(&mut plan);
        self.totals.demoted_pages += plan.demotions.len() as u64;
        self.totals.lowered_pages += (plan.demotions.len() - plan.num_given) as u64;
        for row in plan.rows.iter().filter(|row| plan.touches(row)) {
            let Some(sequence) = self.sequences.find_mut(row.sequence) else { continue };
            sequence.planned = false;
            sequence.length += row.count;
            if is_final {
                sequence.frozen = sequence.length;
            }
            if let Some(source) = sequence.replaced.take() {
                self.totals.copied_pages += 1;
                self.pages.release(source);
            }
            if row.count > 0 {
                // A borrowed page was copied, or a split moved the anchor deeper than what is used.
                sequence.anchor = self.tree.lift(sequence.anchor, sequence.sealed);
            }
            self.seal(row.sequence);
            self.close_if_closing(row.sequence);
        }
        self.retire(plan);
    }

    fn seal(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.find_mut(id) else { return };
        let first = (sequence.sealed >> self.shift) as usize;
        let end = (sequence.length.min(sequence.sealable()) >> self.shift) as usize;
        if first >= end {
            return;
        }
        // Past a bound on sharing, forks may hold full pages together: private until one is left.
        let alone = sequence.table[first..end].iter().take_while(|page| self.pages.is_mutable(**page)).count();
        if alone == 0 {
            return;
        }
        let end = first + alone;
        self.name_blocks(id, first, alone << self.shift);
        let Some(sequence) = self.sequences.find_mut(id) else { return };
        let pages = &mut sequence.table[first..end];
        for page in &*pages {
            self.pages.seal(*page);
        }
        let sealed = self.tree.num_sealed();
        sequence.anchor = self.tree.seal(Sealing {
            anchor: sequence.anchor,
            from: sequence.sealed,
            count: (end - first) << self.shift,
            tail: &mut sequence.tail,
            pages,
            duplicates: &mut self.duplicates,
        });
        sequence.sealed = (end as u32) << self.shift;
        self.note_entered(id, first);
        self.count_sealed(sealed);
    }

    /// Leave the partly filled last block of a sequence behind, unless the tree has it or others hold
    /// its page. What was computed of a short prompt, or since the last full block, is found again.
    /// Returns the page that it left.
    pub(super) fn seal_tail(&mut self, id: SequenceId) -> Option<PageId> {
        let sequence = self.sequences.find_mut(id)?;
        if sequence.length > sequence.sealable() {
            return None;
        }
        // A split may have moved the anchor deeper than what is used.
        sequence.anchor = self.tree.lift(sequence.anchor, sequence.sealed);
        // Full blocks are left over where the bound on sharing was raised since the last commit.
        self.seal(id);
        let sequence = self.sequences.find_mut(id)?;
        let (first, count) = ((sequence.sealed >> self.shift) as usize, (sequence.length - sequence.sealed) as usize);
        if count >> self.shift != 0 {
            return None;
        }
        let is_ours = |page: &PageId| self.pages.is_mutable(*page) && !self.pages.classes().is_quantized(*page);
        let page = sequence.table.get(first).copied().filter(is_ours)?;
        if self.tree.contains(sequence.anchor, sequence.sealed, &sequence.tail[..count]) {
            return None;
        }
        self.name_blocks(id, first, count);
        let sequence = self.sequences.find_mut(id)?;
        self.pages.seal(page);
        let sealed = self.tree.num_sealed();
        sequence.anchor = self.tree.seal(Sealing {
            anchor: sequence.anchor,
            from: sequence.sealed,
            count,
            tail: &mut sequence.tail,
            pages: &mut sequence.table[first..],
            duplicates: &mut self.duplicates,
        });
        let stays = !self.duplicates.contains(&page);
        if stays {
            self.note_entered(id, first);
        }
        // Sealed or freed: either way the page is no longer ours to release.
        if let Some(sequence) = self.sequences.find_mut(id) {
            sequence.table.truncate(first);
        }
        self.count_sealed(sealed);
        stays.then_some(page)
    }

    /// Count what entered the tree since it held `before` pages, and free what it had already.
    fn count_sealed(&mut self, before: usize) {
        self.totals.sealed_pages += (self.tree.num_sealed().saturating_sub(before)) as u64;
        self.totals.duplicate_pages += self.duplicates.len() as u64;
        self.pages.free(&self.duplicates);
        self.duplicates.clear();
    }

    pub(super) fn close_if_closing(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.find_mut(id)
            && sequence.closing
            && !sequence.planned
        {
            sequence.closing = false;
            self.close(id);
        }
    }
}
