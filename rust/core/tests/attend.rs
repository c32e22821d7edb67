//! Attention over pages against its definition in float64: shapes, formats, tables, windows, caps and sinks.

#![allow(unsafe_code)] // the kernel takes addresses
#![allow(clippy::float_cmp, clippy::cast_precision_loss, clippy::print_stdout)] // figures are printed

use kvhybrid_core::kernel::attend::{Answer, Layer, Query, Row, Rows, Scoring, attend};
use kvhybrid_core::kernel::half::{Float, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use kvhybrid_core::kernel::isa::Isa;
use kvhybrid_core::kernel::quant::{Bits, Format, Part};
use kvhybrid_core::kernel::team::{Alone, Parts, Team};

/// Cases a run; `KVHYBRID_ATTEND_CASES` asks for more.
const CASES: u64 = 500;

/// Small, seeded, and good enough for test data (`SplitMix64`).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// Roughly normal.
    fn normal(&mut self) -> f32 {
        (0..4).map(|_| self.next() as f64 / u64::MAX as f64 - 0.5).sum::<f64>() as f32 * 1.7
    }
}

/// Two threads that are started for each call: what is shared between pieces would race here.
struct Pair;

impl Team for Pair {
    fn size(&self) -> usize {
        2
    }

    fn run(&self, parts: usize, work: &(dyn Fn(usize) + Sync)) {
        let parts = Parts::new(parts, work);
        std::thread::scope(|scope| {
            scope.spawn(|| parts.drain());
            parts.drain();
        });
    }
}

/// Numbers of a format, with the values that they stand for.
struct Buffer {
    bytes: Vec<u8>,
    values: Vec<f32>,
}

fn encoded(float: Float, values: impl Iterator<Item = f32>) -> Buffer {
    let (mut bytes, mut kept) = (Vec::new(), Vec::new());
    for value in values {
        let (raw, value) = match float {
            Float::F32 => (value.to_le_bytes().to_vec(), value),
            Float::F16 => (f32_to_f16(value).to_le_bytes().to_vec(), f16_to_f32(f32_to_f16(value))),
            Float::Bf16 => (f32_to_bf16(value).to_le_bytes().to_vec(), bf16_to_f32(f32_to_bf16(value))),
        };
        bytes.extend(raw);
        kept.push(value);
    }
    Buffer { bytes, values: kept }
}

struct Shape {
    kv_heads: usize,
    group: usize,
    block: usize,
    dim: usize,
    value_dim: usize,
    pages: usize,
    cold_pages: usize,
    pool: Float,
    asked: Float,
}

/// Random records, and what they stand for: `[page][head][token][dim]`.
fn records(shape: &Shape, numbers: &mut Numbers, bits: Bits, values: bool) -> Buffer {
    let (block, dim) = (shape.block, if values { shape.value_dim } else { shape.dim });
    let part = if values { Part::Values } else { Part::Keys };
    let size = Format { part, bits, block, width: dim }.bytes();
    let mut buffer = Buffer { bytes: vec![0; shape.cold_pages * shape.kv_heads * size], values: Vec::new() };
    for record in buffer.bytes.chunks_exact_mut(size) {
        for byte in record.iter_mut() {
            *byte = numbers.next() as u8;
        }
        let four = bits == Bits::Four;
        let half = dim.div_ceil(2);
        let codes = match (values, four) {
            (_, false) => dim * block,
            (false, true) => dim * block / 2,
            (true, true) => block * half,
        };
        let fields = if values { block } else { dim };
        let step = if four { 0.2 } else { 0.0125 };
        for index in 0..fields {
            let scale = f32_to_f16(step * (0.5 + numbers.below(100) as f32 / 100.0));
            let minimum = f32_to_f16(-1.0 - numbers.normal().abs());
            record[codes + 2 * index..][..2].copy_from_slice(&scale.to_le_bytes());
            record[codes + 2 * (fields + index)..][..2].copy_from_slice(&minimum.to_le_bytes());
        }
        if values {
            for byte in &mut record[codes + 4 * fields..][..dim] {
                *byte = numbers.of(&[-3_i8, 0, 0, 0, 2]) as u8;
            }
        }
        let at = |index: usize| f16_to_f32(u16::from_le_bytes([record[index], record[index + 1]]));
        for token in 0..block {
            for d in 0..dim {
                let field = if values { token } else { d };
                let code = match (values, four) {
                    (false, false) => record[d * block + token],
                    (false, true) => record[d * block / 2 + token % (block / 2)] >> (4 * (token / (block / 2))) & 15,
                    (true, false) => record[token * dim + d],
                    (true, true) => record[token * half + d % half] >> (4 * (d / half)) & 15,
                };
                let plain = f32::from(code) * at(codes + 2 * field) + at(codes + 2 * (fields + field));
                let exponent = if values { record[codes + 4 * fields + d] as i8 } else { 0 };
                buffer.values.push(plain * 2_f32.powi(i32::from(exponent)));
            }
        }
    }
    buffer
}

fn pages(shape: &Shape, dim: usize, numbers: &mut Numbers, spoiled: bool) -> Buffer {
    let count = shape.pages * shape.kv_heads * shape.block * dim;
    encoded(shape.pool, (0..count).map(|_| if spoiled { f32::NAN } else { numbers.normal() }))
}

/// The largest error of one random call, relative to the answer's own size.
#[allow(clippy::too_many_lines)] // one case from its shape to its answer
fn case(seed: u64) -> (Float, Vec<Bits>, f64) {
    let mut numbers = Numbers(seed);
    let n = &mut numbers;
    let has_cold = n.below(2) == 0;
    let widths = [1, 3, 8, 16, 20, 32, 40, 64, 64, 80, 96, 128, 130];
    let shape = Shape {
        kv_heads: n.of(&[1, 2, 3]),
        group: n.of(&[1, 2, 3, 4, 5, 8]),
        block: if has_cold { n.of(&[16, 32, 64, 128]) } else { n.of(&[1, 2, 4, 16, 64]) },
        dim: n.of(&widths),
        value_dim: n.of(&widths),
        pages: 12,
        cold_pages: 9,
        pool: n.of(&[Float::F32, Float::F16, Float::Bf16]),
        asked: n.of(&[Float::F32, Float::F16, Float::Bf16]),
    };
    let (keys, values) = (pages(&shape, shape.dim, n, false), pages(&shape, shape.value_dim, n, false));
    // Slots that nobody wrote hold anything: NaN must not be read.
    let (mut raw_keys, mut raw_values) =
        (pages(&shape, shape.dim, n, true).bytes, pages(&shape, shape.value_dim, n, true).bytes);
    let mut layer = Layer {
        keys: raw_keys.as_mut_ptr(),
        values: raw_values.as_mut_ptr(),
        pages: shape.pages as u32,
        float: shape.pool,
        kv_heads: shape.kv_heads,
        block: shape.block,
        dim: shape.dim,
        value_dim: shape.value_dim,
        cold: [None; 2],
    };
    let eight_and_four = [Bits::Eight, Bits::Four];
    let formats: &[Bits] =
        if has_cold { n.of(&[&eight_and_four[..1], &eight_and_four[1..], &eight_and_four]) } else { &[] };
    let colds: Vec<[Buffer; 2]> =
        formats.iter().map(|bits| [false, true].map(|values| records(&shape, n, *bits, values))).collect();
    let plain = layer;
    for ((place, [keys, values]), bits) in layer.cold.iter_mut().zip(&colds).zip(formats) {
        let (keys, values) = (keys.bytes.as_ptr(), values.bytes.as_ptr());
        *place = Some(plain.quantized(keys, values, shape.cold_pages as u32, *bits));
    }
    let all_pages = shape.pages + formats.len() * shape.cold_pages;
    assert!(!layer.has(all_pages as u32));

    let num_rows = 1 + n.below(4);
    let width = 1 + n.below(6);
    let shared: Vec<u32> = (0..width).map(|_| n.below(all_pages) as u32).collect();
    let alike = n.below(width + 1);
    let (mut rows, mut tables) = (Vec::new(), Vec::new());
    let deepest = 1 + n.below(5);
    for row in 0..num_rows {
        let total = 1 + n.below(width * shape.block);
        let count = (1 + n.below(deepest)).min(total) as u32;
        rows.push(Row { row, column: n.below(2), past: total as u32 - count, count });
        let own = |n: &mut Numbers| n.below(all_pages) as u32;
        let table: Vec<u32> = (0..width).map(|at| if at < alike { shared[at] } else { own(n) }).collect();
        for token in 0..total {
            let page = table[token / shape.block] as usize;
            if page < shape.pages {
                for head in 0..shape.kv_heads {
                    let slot = (page * shape.kv_heads + head) * shape.block + token % shape.block;
                    let size = shape.pool.size();
                    let (k, v) = (slot * shape.dim * size, slot * shape.value_dim * size);
                    let (kn, vn) = (shape.dim * size, shape.value_dim * size);
                    raw_keys[k..k + kn].copy_from_slice(&keys.bytes[k..k + kn]);
                    raw_values[v..v + vn].copy_from_slice(&values.bytes[v..v + vn]);
                }
            }
        }
        tables.extend(table);
    }
    let (heads, tokens) = (shape.kv_heads * shape.group, deepest + 1);
    let query = encoded(shape.asked, (0..num_rows * heads * tokens * shape.dim).map(|_| n.normal()));
    let strides = [heads * tokens * shape.dim, tokens * shape.dim, shape.dim];
    let asked = Query { data: query.bytes.as_ptr(), float: shape.asked, strides, heads };
    let out = num_rows * tokens * heads * shape.value_dim;
    let untouched = vec![0xa5_u8; out * shape.asked.size()];
    let mut found = untouched.clone();
    let out_strides = [tokens * heads * shape.value_dim, shape.value_dim, heads * shape.value_dim];
    let answer = Answer { data: found.as_mut_ptr(), strides: out_strides };
    let sinks: Vec<f32> = (0..heads).map(|_| 3.0 * n.normal()).collect();
    let scoring = Scoring {
        scale: (shape.dim as f32).powf(-0.5) * n.of(&[1.0, 1.0, 4.0]),
        window: n.of(&[None, None, Some(1), Some(3), Some(50)]),
        soft_cap: n.of(&[None, None, Some(2.0), Some(50.0)]),
        sinks: n.of(&[None, Some(&sinks[..])]),
    };
    let sets: Vec<Isa> = Isa::available().collect();
    let isa = n.of(&sets);
    let team: &dyn Team = if n.below(3) == 0 { &Pair } else { &Alone };
    let known = Rows::new(rows.clone(), tables.clone(), width, shape.block).expect("tables are long enough");
    assert!(known.last_page(shape.block).is_some_and(|page| layer.has(page)));
    // SAFETY: everything lies in the vectors above and is as long as was said.
    unsafe { attend(isa, team, &layer, &known, &asked, &answer, &scoring) };

    let number = |index: usize| {
        let bytes = &found[index * shape.asked.size()..][..shape.asked.size()];
        f64::from(match shape.asked {
            Float::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            Float::F16 => f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]])),
            Float::Bf16 => bf16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]])),
        })
    };
    let mut touched = vec![false; out];
    let mut worst = 0.0_f64;
    for (index, row) in rows.iter().enumerate() {
        for token in 0..row.count as usize {
            for head in 0..heads {
                let at = |part: usize, full: &Buffer, dim: usize, position: usize, d: usize| {
                    let page = tables[index * width + position / shape.block] as usize;
                    let place = |page: usize| {
                        ((page * shape.kv_heads + head / shape.group) * shape.block + position % shape.block) * dim + d
                    };
                    f64::from(if page < shape.pages {
                        full.values[place(page)]
                    } else {
                        let record = page - shape.pages;
                        colds[record / shape.cold_pages][part].values[place(record % shape.cold_pages)]
                    })
                };
                let end = row.past as usize + token + 1;
                let start = scoring.window.map_or(0, |window| end.saturating_sub(window as usize));
                let q = &query.values[row.row * strides[0] + head * strides[1] + (row.column + token) * strides[2]..];
                let scores: Vec<f64> = (start..end)
                    .map(|position| {
                        let dot = |d: usize| f64::from(q[d]) * at(0, &keys, shape.dim, position, d);
                        let score = (0..shape.dim).map(dot).sum::<f64>() * f64::from(scoring.scale);
                        scoring.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                    })
                    .collect();
                let sink = scoring.sinks.map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[head]));
                let largest = scores.iter().copied().fold(sink, f64::max);
                let total: f64 =
                    scores.iter().map(|score| (score - largest).exp()).sum::<f64>() + (sink - largest).exp();
                let expected: Vec<f64> = (0..shape.value_dim)
                    .map(|d| {
                        let part = |(score, position): (&f64, usize)| {
                            (score - largest).exp() * at(1, &values, shape.value_dim, position, d)
                        };
                        scores.iter().zip(start..end).map(part).sum::<f64>() / total
                    })
                    .collect();
                let size = expected.iter().map(|x| x.abs()).fold(1e-1, f64::max);
                for (d, expected) in expected.iter().enumerate() {
                    let place =
                        row.row * out_strides[0] + head * out_strides[1] + (row.column + token) * out_strides[2] + d;
                    touched[place] = true;
                    let error = (number(place) - expected).abs() / size;
                    assert!(!error.is_nan(), "seed {seed}: NaN");
                    worst = worst.max(error);
                }
            }
        }
    }
    for (index, touched) in touched.iter().enumerate() {
        let bytes = index * shape.asked.size()..(index + 1) * shape.asked.size();
        assert!(*touched || found[bytes.clone()] == untouched[bytes], "seed {seed}: wrote beside its rows");
    }
    (shape.asked, formats.to_vec(), worst)
}

#[test]
fn it_is_what_float64_says_for_any_shape() {
    let cases = std::env::var("KVHYBRID_ATTEND_CASES").map_or(CASES, |n| n.parse().expect("a number"));
    let mut worst = [0.0_f64; 3];
    let (mut cold, mut both) = (0, 0);
    for seed in 0..cases {
        let (asked, bits, error) = case(seed);
        cold += usize::from(!bits.is_empty());
        both += usize::from(bits.len() == 2);
        let (index, bound) = match asked {
            Float::F32 => (0, 1e-4), // large scores carry the rounding of their sums into the weights
            Float::F16 => (1, 1e-3),
            Float::Bf16 => (2, 8e-3),
        };
        assert!(error < bound, "seed {seed}: {asked:?} {bits:?} is off by {error:.2e}");
        worst[index] = worst[index].max(error);
    }
    println!(
        "{cases} cases, {cold} with quantized pages, {both} of both formats; largest error f32 {:.1e}, f16 {:.1e}, bf16 {:.1e}",
        worst[0], worst[1], worst[2]
    );
}
