//! Channels of the values that tower above the others: found, and said by how many powers of two.

/// A channel this far above the median channel is an outlier.
const OUTLIER_RATIO: f32 = 4.0;
/// Far beyond any model, and small enough that nothing a record can say overflows float32.
const MOST_EXPONENT: f32 = 60.0;

/// Find the channels' exponents from their largest magnitudes, which `sorted` may bring into another order;
/// false when all are zero.
#[inline(always)]
pub fn find(magnitudes: &[f32], sorted: &mut [f32], exponents: &mut [i8]) -> bool {
    exponents.fill(0);
    // Most pages have none, and counting says so: the median is at least a quarter of the greatest when so
    // many channels are. The order of positive numbers is that of their bits, which are quickly compared.
    let bits = |x: f32| x.to_bits().cast_signed();
    let greatest = magnitudes.iter().map(|x| bits(*x)).max().unwrap_or(0);
    let quarter = bits(f32::from_bits(greatest.cast_unsigned()) / OUTLIER_RATIO);
    let middle = (magnitudes.len() - 1) / 2;
    let above: u32 = magnitudes.iter().map(|x| u32::from(bits(*x) >= quarter)).sum();
    if above as usize >= magnitudes.len() - middle {
        return false;
    }
    sorted.copy_from_slice(magnitudes);
    let median = *sorted.select_nth_unstable_by(middle, f32::total_cmp).1;
    if median <= 0.0 {
        return false;
    }
    for (exponent, magnitude) in exponents.iter_mut().zip(magnitudes) {
        let ratio = magnitude / median;
        if ratio > OUTLIER_RATIO {
            *exponent = ratio.log2().round_ties_even().min(MOST_EXPONENT) as i8;
        }
    }
    true
}

/// Two to a power between -126 and 127.
#[inline(always)]
pub fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exponents(magnitudes: &[f32]) -> Vec<i8> {
        let (mut sorted, mut found) = (magnitudes.to_vec(), vec![9; magnitudes.len()]);
        assert_eq!(find(magnitudes, &mut sorted, &mut found), found.iter().any(|exponent| *exponent != 0));
        found
    }

    #[test]
    fn outliers_are_what_lies_far_above_the_median() {
        assert_eq!(exponents(&[1.0, 2.0, 3.0, 4.0]), [0, 0, 0, 0]);
        assert_eq!(exponents(&[1.0, 1.0, 1.0, 4.0]), [0, 0, 0, 0]);
        assert_eq!(exponents(&[1.0, 1.0, 16.0, 1.0, 4.1]), [0, 0, 4, 0, 2]);
        assert_eq!(exponents(&[1.0, 1e30, 1.0]), [0, 60, 0]);
        assert_eq!(exponents(&[0.0, 0.0, 5.0]), [0, 0, 0]);
        assert_eq!(exponents(&[0.0, 1.0, 5.0]), [0, 0, 2]);
        assert_eq!(exponents(&[7.0]), [0]);
        assert_eq!(exponents(&[0.0]), [0]);
        assert_eq!(power_of_two(-3), 0.125);
        assert_eq!(power_of_two(60), 2_f32.powi(60));
    }
}
