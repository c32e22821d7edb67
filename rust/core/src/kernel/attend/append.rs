//! Writing a step's own K and V into its pages.

use super::layer::Layer;
use super::rows::Rows;

/// New K or V, `[rows][heads][tokens][width]` in the layer's format, by strides in numbers; a token's own numbers
/// are neighbours.
#[derive(Clone, Copy, Debug)]
pub struct New {
    /// The first number.
    pub data: *const u8,
    /// From row to row, head to head, token to token.
    pub strides: [usize; 3],
}

/// Write the new tokens of every row behind its past.
///
/// Returns the first page among those to be written that is no full one, and then has written nothing.
///
/// # Safety
/// Addresses and strides are true for all of `rows`, whose pages are the layer's, and nobody else reads or
/// writes those slots meanwhile.
pub unsafe fn append(layer: &Layer, rows: &Rows, keys: &New, values: &New) -> Result<(), u32> {
    let slots = |index: usize| {
        let row = rows.spans[index];
        let table = rows.table(index);
        (0..row.count).map(move |token| {
            let position = (row.past + token) as usize;
            (table[position / layer.block], position % layer.block, row, token as usize)
        })
    };
    for index in 0..rows.spans.len() {
        if let Some((page, ..)) = slots(index).find(|(page, ..)| *page >= layer.pages) {
            return Err(page);
        }
    }
    let size = layer.float.size();
    for index in 0..rows.spans.len() {
        for (page, slot, row, token) in slots(index) {
            for head in 0..layer.kv_heads {
                let to = (page as usize * layer.kv_heads + head) * layer.block + slot;
                for (new, pages, width) in [(keys, layer.keys, layer.dim), (values, layer.values, layer.value_dim)] {
                    let from = row.row * new.strides[0] + head * new.strides[1] + (row.column + token) * new.strides[2];
                    // SAFETY: the caller's.
                    unsafe {
                        let (from, to) = (new.data.add(from * size), pages.add(to * width * size));
                        std::ptr::copy_nonoverlapping(from, to, width * size);
                    }
                }
            }
        }
    }
    Ok(())
}
