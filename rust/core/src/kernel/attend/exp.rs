//! The exponential function over a row of scores.

use crate::kernel::lanes::Arith;

/// Rounds to an integer when added to a float32 of moderate size.
const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
/// Below this the result is no normal number; it counts as zero.
const LOWEST: f32 = -87.33;

/// `e^x` for `x <= 88`, to two units in the last place; 0 where it would be subnormal, NaN for NaN.
///
/// Cody and Waite's reduction to `|r| <= ln 2 / 2` and the minimax polynomial of Cephes' `expf`.
#[inline(always)]
#[allow(clippy::excessive_precision)] // the coefficients as published
pub(super) fn exp<A: Arith>(x: f32) -> f32 {
    let shifted = A::mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = A::mul_add(n, 2.121_944_4e-4, A::mul_add(n, -0.693_359_375, x));
    let p = A::mul_add(r, 1.987_569_15e-4, 1.398_199_950_7e-3);
    let p = A::mul_add(p, r, 8.333_451_907_3e-3);
    let p = A::mul_add(p, r, 4.166_579_589_4e-2);
    let p = A::mul_add(p, r, 1.666_666_545_9e-1);
    let p = A::mul_add(p, r, 5.000_000_120_1e-1);
    let p = A::mul_add(p * r, r, r + 1.0);
    // The integer sits in the lowest bits of `shifted`; adding it to the exponent multiplies by two to it.
    let scaled = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    let known = if x < LOWEST { 0.0 } else { scaled };
    if x.is_nan() { x } else { known }
}

/// `cap * tanh(x / cap)`.
#[inline(always)]
pub(super) fn soft_cap<A: Arith>(x: f32, cap: f32) -> f32 {
    // tanh through e^-2|y|, which neither overflows nor loses the sign.
    let y = x / cap;
    let e = exp::<A>(-2.0 * y.abs());
    let magnitude = (1.0 - e) / (1.0 + e);
    // Near zero the difference above has few digits left, and the series needs two terms.
    let small = y.abs() * A::mul_add(y * y, -1.0 / 3.0, 1.0);
    let found = if y.abs() < 0.02 { small } else { magnitude };
    cap * found.copysign(y)
}

#[cfg(test)]
mod tests {
    use super::{exp, soft_cap};
    use crate::kernel::isa::{Arith, Body, Isa};

    struct Errors;

    impl Body for Errors {
        type Out = (f64, f64);

        #[inline(always)]
        fn run<A: Arith>(self) -> (f64, f64) {
            let (mut worst, mut worst_cap) = (0.0_f64, 0.0_f64);
            for i in 0..200_000 {
                let x = -87.0 + 1e-3 * i as f32 * 0.87;
                let x = x.min(88.0);
                worst = worst.max((f64::from(exp::<A>(x)) / f64::from(x).exp() - 1.0).abs());
                let y = (i as f32 - 100_000.0) * 1e-2;
                let truth = 30.0 * (f64::from(y) / 30.0).tanh();
                worst_cap = worst_cap.max((f64::from(soft_cap::<A>(y, 30.0)) - truth).abs() / truth.abs().max(1e-3));
            }
            assert_eq!(exp::<A>(f32::NEG_INFINITY), 0.0);
            assert_eq!(exp::<A>(-1e30), 0.0);
            assert_eq!(exp::<A>(0.0), 1.0);
            assert!(exp::<A>(f32::NAN).is_nan());
            (worst, worst_cap)
        }
    }

    #[test]
    fn it_is_exact_to_two_units_in_the_last_place() {
        for isa in Isa::available() {
            let (plain, capped) = isa.run(Errors);
            assert!(plain < 2.0 * f64::from(f32::EPSILON), "{isa:?}: {plain}");
            assert!(capped < 1e-5, "{isa:?}: {capped}");
        }
    }
}
