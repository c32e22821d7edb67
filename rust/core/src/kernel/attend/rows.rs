//! The rows of a step: their block tables, and which pages several of them share.

use std::ops::Range;

/// One row: `count` new tokens behind `past`, from `(row, column)` of the query on.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Row of the query.
    pub row: usize,
    /// Column of its first new token.
    pub column: usize,
    /// Tokens before the new ones.
    pub past: u32,
    /// New tokens.
    pub count: u32,
}

/// Pages that the same rows read, and so are read once for all of them.
#[derive(Debug)]
pub(super) struct Segment {
    /// The rows that read them.
    pub members: Vec<usize>,
    /// Queries of the members before each one, in tokens; the last entry is the total.
    pub offsets: Vec<usize>,
    /// Blocks.
    pub blocks: Range<usize>,
}

impl Segment {
    pub(super) fn num_queries(&self) -> usize {
        self.offsets[self.members.len()]
    }
}

/// The rows of a step and their block tables.
pub struct Rows {
    pub(super) spans: Vec<Row>,
    tables: Vec<u32>,
    width: usize,
    pub(super) segments: Vec<Segment>,
    /// For each row, the segments that it reads, in order, and its place among their members.
    pub(super) path: Vec<Vec<(usize, usize)>>,
}

impl Rows {
    /// `tables`: `width` page ids a row; those of the first `past + count` tokens are read. `block_size`:
    /// tokens a page. Returns None when a table is too short for its row, or a row is too long.
    pub fn new(rows: Vec<Row>, tables: Vec<u32>, width: usize, block_size: usize) -> Option<Self> {
        let fits = |row: &Row| {
            let total = row.past.checked_add(row.count)?;
            (row.count > 0 && i32::try_from(total).is_ok() && (total as usize).div_ceil(block_size) <= width)
                .then_some(())
        };
        if tables.len() != rows.len().checked_mul(width)? || !rows.iter().all(|row| fits(row).is_some()) {
            return None;
        }
        let path = vec![Vec::new(); rows.len()];
        let mut it = Self { spans: rows, tables, width, segments: Vec::new(), path };
        let all: Vec<usize> = (0..it.spans.len()).collect();
        it.divide(&all, 0, block_size);
        Some(it)
    }

    /// Blocks that a row reads.
    fn blocks(&self, row: usize, block_size: usize) -> usize {
        let row = self.spans[row];
        ((row.past + row.count) as usize).div_ceil(block_size)
    }

    pub(super) fn table(&self, row: usize) -> &[u32] {
        &self.tables[row * self.width..(row + 1) * self.width]
    }

    /// The largest page id that is read.
    pub fn last_page(&self, block_size: usize) -> Option<u32> {
        (0..self.spans.len())
            .filter_map(|row| self.table(row)[..self.blocks(row, block_size)].iter().max())
            .max()
            .copied()
    }

    /// Cut the blocks of `members` from `start` on into segments: what all of them share, then each group
    /// that goes on alike.
    fn divide(&mut self, members: &[usize], start: usize, block_size: usize) {
        let Some(shortest) = members.iter().map(|row| self.blocks(*row, block_size)).min() else { return };
        let first = self.table(members[0]);
        let is_shared = |block: &usize| members[1..].iter().all(|row| self.table(*row)[*block] == first[*block]);
        let end = (start..shortest).find(|block| !is_shared(block)).unwrap_or(shortest);
        if end > start {
            let mut offsets = vec![0];
            for (place, row) in members.iter().enumerate() {
                offsets.push(offsets[place] + self.spans[*row].count as usize);
                self.path[*row].push((self.segments.len(), place));
            }
            self.segments.push(Segment { members: members.to_vec(), offsets, blocks: start..end });
        }
        let mut groups: Vec<(u32, Vec<usize>)> = Vec::new();
        for row in members.iter().filter(|row| self.blocks(**row, block_size) > end) {
            let page = self.table(*row)[end];
            match groups.iter_mut().find(|(known, _)| *known == page) {
                Some((_, group)) => group.push(*row),
                None => groups.push((page, vec![*row])),
            }
        }
        for (_, group) in groups {
            self.divide(&group, end, block_size);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Row, Rows};

    fn rows(tables: &[&[u32]], tokens: &[u32]) -> Option<Rows> {
        let row = |(row, tokens): (usize, &u32)| Row { row, column: 0, past: tokens - 1, count: 1 };
        Rows::new(tokens.iter().enumerate().map(row).collect(), tables.concat(), tables[0].len(), 4)
    }

    #[test]
    fn what_rows_share_is_one_segment_and_every_block_is_read_once_a_row() {
        let tables: [&[u32]; 4] = [&[1, 2, 3, 9], &[1, 2, 4, 0], &[1, 2, 4, 5], &[7, 0, 0, 0]];
        let found = rows(&tables, &[13, 12, 16, 2]).expect("they fit");
        let seen: Vec<_> = found.segments.iter().map(|it| (it.members.clone(), it.blocks.clone())).collect();
        assert_eq!(
            seen,
            [(vec![0, 1, 2], 0..2), (vec![0], 2..4), (vec![1, 2], 2..3), (vec![2], 3..4), (vec![3], 0..1)]
        );
        assert_eq!(found.path[2], [(0, 2), (2, 1), (3, 0)]);
        assert_eq!(found.last_page(4), Some(9));
    }

    #[test]
    fn a_table_too_short_for_its_row_is_refused() {
        assert!(rows(&[&[1, 2]], &[9]).is_none());
        assert!(rows(&[&[1, 2]], &[8]).is_some());
        let row = Row { row: 0, column: 0, past: u32::MAX, count: 1 };
        assert!(Rows::new(vec![row], vec![0], 1, 4).is_none());
        assert!(Rows::new(vec![Row { past: 0, count: 0, ..row }], vec![0], 1, 4).is_none());
        assert!(Rows::new(vec![Row { past: 0, ..row }], vec![0, 1], 1, 4).is_none());
    }
}
