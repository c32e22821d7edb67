//! Records held against the format's definition in float64, for every instruction set of this machine.

use proptest::prelude::*;

use super::*;
use crate::kernel::half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::kernel::team::Alone;
use crate::kernel::threads::Threads;

const FORMATS: [(Part, Bits); 4] =
    [(Part::Keys, Bits::Eight), (Part::Keys, Bits::Four), (Part::Values, Bits::Eight), (Part::Values, Bits::Four)];

/// Numbers as a page of `float` has them, and their bytes.
fn stored(numbers: &[f32], float: Float) -> (Vec<f32>, Vec<u8>) {
    let mut bytes = Vec::new();
    let mut exact = Vec::new();
    for x in numbers {
        match float {
            Float::F32 => bytes.extend(x.to_ne_bytes()),
            Float::F16 => bytes.extend(f32_to_f16(*x).to_ne_bytes()),
            Float::Bf16 => bytes.extend(f32_to_bf16(*x).to_ne_bytes()),
        }
        exact.push(read(&bytes, bytes.len() - float.size(), float));
    }
    (exact, bytes)
}

fn read(bytes: &[u8], at: usize, float: Float) -> f32 {
    let half = u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
    match float {
        Float::F32 => f32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes")),
        Float::F16 => f16_to_f32(half),
        Float::Bf16 => bf16_to_f32(half),
    }
}

/// A page of one head, through `quantize`: its record, or None when it was refused.
fn record_of(format: Format, page: &mut [u8], float: Float, isa: Isa) -> Option<Vec<u8>> {
    let mut record = vec![0xee; format.bytes()];
    // SAFETY: a page and a record, each as long as the format says.
    let refused = unsafe { quantize(&work(format, page, float, &mut record), isa, &Alone) };
    (!refused[0]).then_some(record)
}

fn work<'a>(format: Format, page: &mut [u8], float: Float, record: &mut [u8]) -> Work<'a> {
    assert!(page.len() == format.block * format.width * float.size() && record.len() == format.bytes());
    let by_token = (format.width * float.size()) as isize;
    Work {
        format,
        heads: 1,
        pages: Pages { start: page.as_mut_ptr(), float, strides: [0, 0, by_token] },
        page_ids: &[0],
        records: record.as_mut_ptr(),
        record_ids: &[0],
    }
}

/// The number and the step of one place, by the format's definition.
fn defined(format: &Format, record: &[u8], token: usize, channel: usize) -> (f64, f64) {
    let (group, member, members) = match format.part {
        Part::Keys => (channel, token, format.block),
        Part::Values => (token, channel, format.width),
    };
    let code = match format.bits {
        Bits::Eight => record[group * members + member],
        Bits::Four => {
            let row = members.div_ceil(2);
            let byte = record[group * row + member % row];
            if member < row { byte & 15 } else { byte >> 4 }
        }
    };
    let half = |at: usize| f64::from(f16_to_f32(u16::from_le_bytes([record[at], record[at + 1]])));
    let scale = half(format.codes() + 2 * group);
    let minimum = half(format.codes() + 2 * (format.groups() + group));
    let power = match format.part {
        Part::Keys => 1.0,
        Part::Values => 2_f64.powi(i32::from(record[format.codes() + 4 * format.groups() + channel].cast_signed())),
    };
    ((f64::from(code) * scale + minimum) * power, scale * power)
}

/// Quantize, check every number against its bound, dequantize, and check that against the definition.
fn check(format: Format, numbers: &[f32], float: Float) -> bool {
    let (exact, page) = stored(numbers, float);
    let mut first: Option<Option<Vec<u8>>> = None;
    for isa in Isa::available() {
        let record = record_of(format, &mut page.clone(), float, isa);
        // One instruction set's record is every other's.
        assert_eq!(first.get_or_insert_with(|| record.clone()), &record, "{isa:?}");
        let Some(mut record) = record else { continue };
        let mut back = vec![0; page.len()];
        // SAFETY: as in `record_of`.
        unsafe { dequantize(&work(format, &mut back, float, &mut record), isa, &Alone) };
        for (i, x) in exact.iter().enumerate() {
            let (number, step) = defined(&format, &record, i / format.width, i % format.width);
            let error = (number - f64::from(*x)).abs();
            let rounding = f64::from(x.abs()) * 2_f64.powi(-22) + 1e-44;
            assert!(error <= step * 0.5001 + rounding, "{x} became {number}, of step {step}, {format:?}");
            let largest = if float == Float::F16 { 65_504.0 } else { f64::MAX };
            let number = number.clamp(-largest, largest);
            let found = f64::from(read(&back, i * float.size(), float));
            let place = if float == Float::Bf16 { 2_f64.powi(-8) } else { 2_f64.powi(-11) };
            let place = if float == Float::F32 { 2_f64.powi(-21) } else { place };
            let cancelled = step * 2_f64.powi(-14) + 2_f64.powi(-25);
            assert!((found - number).abs() <= number.abs() * place + cancelled, "{found} is not {number}, {float:?}");
        }
    }
    first.is_some_and(|record| record.is_some())
}

/// Numbers that look random.
fn noise(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 - 0.5
    };
    (0..count).map(|_| (0..4).map(|_| next()).sum()).collect()
}

#[test]
fn pages_of_every_shape_come_back_within_half_a_step() {
    for (part, bits) in FORMATS {
        for (block, width) in [(16, 1), (16, 2), (16, 17), (32, 33), (64, 40), (64, 80), (16, 96), (64, 128), (128, 65)]
        {
            let format = Format { part, bits, block, width };
            assert!(format.is_sound());
            for float in [Float::F32, Float::F16, Float::Bf16] {
                let mut numbers = noise(block * width, 7);
                assert!(check(format, &numbers, float));
                for token in 0..block {
                    numbers[token * width + width / 2] *= 300.0;
                }
                assert!(check(format, &numbers, float));
            }
        }
    }
}

#[test]
fn what_is_constant_is_exact_where_float16_has_it() {
    for (part, bits) in FORMATS {
        let format = Format { part, bits, block: 16, width: 7 };
        for x in [0.0, -0.0, 1.5, -65_504.0, f32::from_bits(0x3380_0000)] {
            let (_, mut page) = stored(&[x; 112], Float::F32);
            let mut record = record_of(format, &mut page, Float::F32, Isa::best()).expect("finite");
            assert!(record[..format.codes()].iter().all(|code| *code == 0));
            // SAFETY: as in `record_of`.
            unsafe { dequantize(&work(format, &mut page, Float::F32, &mut record), Isa::best(), &Alone) };
            assert!((0..112).all(|i| read(&page, 4 * i, Float::F32) == x));
        }
        assert!(check(format, &[0.1; 112], Float::F32));
    }
}

#[test]
fn an_outlier_among_the_smallest_numbers_of_float32_is_not_lost() {
    for (part, bits) in FORMATS {
        let format = Format { part, bits, block: 16, width: 2 };
        let numbers: Vec<f32> = (0..32).map(|i| if i % 6 < 4 { 0.0 } else { [1.2e-38, 1e-45][i % 2] }).collect();
        assert!(check(format, &numbers, Float::F32));
    }
}

#[test]
fn one_number_that_is_none_refuses_its_page_wherever_it_stands() {
    for (part, bits) in FORMATS {
        let format = Format { part, bits, block: 16, width: 19 };
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in [0, 15, 18, 19, 150, 303] {
                for float in [Float::F32, Float::F16, Float::Bf16] {
                    let mut numbers = noise(16 * 19, 3);
                    numbers[place] = bad;
                    assert!(!check(format, &numbers, float));
                }
            }
        }
    }
}

#[test]
fn what_float16_cannot_scale_is_refused() {
    for (part, bits) in FORMATS {
        let format = Format { part, bits, block: 16, width: 4 };
        for (even, odd) in [(3e38, -3e38), (-1e5, -1e5), (f32::MAX, f32::MAX), (0.0, 1e30)] {
            let numbers: Vec<f32> = (0..64).map(|i| if i / 4 % 2 == 0 { even } else { odd }).collect();
            assert!(!check(format, &numbers, Float::F32));
        }
        let numbers: Vec<f32> = (0..64).map(|i| if i % 2 == 0 { 65_504.0 } else { -65_504.0 }).collect();
        assert!(check(format, &numbers, Float::F16));
    }
}

#[test]
fn an_outlier_channel_of_the_values_leaves_the_others_their_steps() {
    let format = Format { part: Part::Values, bits: Bits::Four, block: 32, width: 24 };
    let plain = noise(32 * 24, 11);
    let mut numbers = plain.clone();
    for token in 0..32 {
        numbers[token * 24 + 5] *= 100.0;
    }
    let step = |numbers: &[f32]| {
        let (_, mut page) = stored(numbers, Float::F32);
        let record = record_of(format, &mut page, Float::F32, Isa::best()).expect("finite");
        (0..32).map(|token| defined(&format, &record, token, 0).1).fold(0.0, f64::max)
    };
    assert!(step(&numbers) < 1.5 * step(&plain));
}

#[test]
fn pages_go_where_their_ids_say_whoever_does_the_work() {
    let format = Format { part: Part::Keys, bits: Bits::Eight, block: 16, width: 5 };
    let (heads, size, bytes) = (3, 16 * 5 * 4, format.bytes());
    let (_, mut pages) = stored(&noise(4 * heads * 80, 5), Float::F32);
    let mut records = vec![0xee; 5 * heads * bytes];
    let mut once = records.clone();
    for (records, team) in [(&mut records, &Threads::new(3) as &dyn Team), (&mut once, &Alone)] {
        let strides = [(heads * size) as isize, size as isize, 20];
        let work = Work {
            format,
            heads,
            pages: Pages { start: pages.as_mut_ptr(), float: Float::F32, strides },
            page_ids: &[3, 0],
            records: records.as_mut_ptr(),
            record_ids: &[1, 4],
        };
        // SAFETY: four pages and five records of three heads each.
        assert_eq!(unsafe { quantize(&work, Isa::best(), team) }, [false, false]);
    }
    assert_eq!(records, once);
    for (page, record) in [(3, 1), (0, 4)] {
        for head in 0..heads {
            let alone = record_of(format, &mut pages[(page * heads + head) * size..][..size], Float::F32, Isa::best());
            assert_eq!(alone.as_deref(), Some(&records[(record * heads + head) * bytes..][..bytes]));
        }
    }
    assert!(
        [0, 2, 3].iter().all(|record| records[record * heads * bytes..][..heads * bytes].iter().all(|b| *b == 0xee))
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 300 }))]

    #[test]
    fn whatever_is_accepted_comes_back_within_half_a_step(
        format in 0..4_usize,
        block in prop::sample::select(vec![16_usize, 32]),
        width in 1..40_usize,
        float in prop::sample::select(vec![Float::F32, Float::F16, Float::Bf16]),
        some in prop::collection::vec(prop_oneof![
            prop::num::f32::NORMAL | prop::num::f32::SUBNORMAL | prop::num::f32::ZERO,
            -1.0_f32..1.0,
            -7e4_f32..7e4,
            Just(1e-45), Just(6e-8), Just(65_504.0), Just(-65_504.0), Just(0.1),
        ], 1..200),
    ) {
        let (part, bits) = FORMATS[format];
        let format = Format { part, bits, block, width };
        let numbers: Vec<f32> = (0..block * width).map(|i| some[i % some.len()]).collect();
        let accepted = check(format, &numbers, float);
        prop_assert!(accepted || numbers.iter().any(|x| x.abs() > 30_000.0));
    }
}
