//! Loops over registers.

/// Run the body for `i` in `0..n`, `n` a constant of at most 8, written out: sums that a loop indexes would live in
/// memory, for the compiler unrolls it too late or not at all.
macro_rules! each {
    ($i:ident < $n:expr, $body:block) => {{
        {
            let $i = 0_usize;
            if $i < $n $body
        }
        {
            let $i = 1_usize;
            if $i < $n $body
        }
        {
            let $i = 2_usize;
            if $i < $n $body
        }
        {
            let $i = 3_usize;
            if $i < $n $body
        }
        {
            let $i = 4_usize;
            if $i < $n $body
        }
        {
            let $i = 5_usize;
            if $i < $n $body
        }
        {
            let $i = 6_usize;
            if $i < $n $body
        }
        {
            let $i = 7_usize;
            if $i < $n $body
        }
    }};
}

pub(super) use each;
