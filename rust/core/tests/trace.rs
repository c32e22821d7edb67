//! What a trace makes of the runs of blocks that requests name.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kvhybrid_core::{Arrival, Trace};

const SHORT: Arrival = Arrival { time_ms: 0, prompt: 40, output: 1 };

#[test]
fn joined_blocks_are_named_by_their_last_and_leave_out_the_rest() {
    let mut trace = Trace::new(16, 2, false);
    let long = Arrival { prompt: 80, ..SHORT };
    trace.push(0, long, &[100, 5]).unwrap();
    trace.push(1, long, &[100, 3, 7, 1]).unwrap();
    assert_eq!(trace.request(0).0, [0, 1]);
    assert_eq!(trace.request(1).0, [0, 2]);
    assert_eq!((trace.num_references(), trace.num_unique(), trace.block_tokens()), (4, 3, 32));
}

#[test]
fn a_partly_filled_last_block_is_left_out_when_asked() {
    let mut trace = Trace::new(16, 1, true);
    trace.push(0, SHORT, &[0, 3]).unwrap();
    assert_eq!(trace.request(0).0, [0, 1]);
}

#[test]
fn what_is_no_path_is_refused_and_leaves_no_blocks() {
    let mut trace = Trace::new(16, 1, false);
    trace.push(0, SHORT, &[0, 3]).unwrap();
    for runs in [&[0i64, 1, 2, 1][..], &[1], &[-1, 2], &[i64::MAX, 2]] {
        assert_eq!(trace.push(9, SHORT, runs).unwrap_err().index, 9);
    }
    assert_eq!((trace.num_requests(), trace.num_references()), (1, 3));
}

#[test]
fn a_refused_request_leaves_no_names_behind() {
    let mut trace = Trace::new(16, 1, false);
    trace.push(0, SHORT, &[0, 2]).unwrap();
    for runs in [&[8i64, 1, 7, 1, 0, 1][..], &[7, 1, i64::MAX, 1], &[7, 4], &[7, i64::MAX, 8, i64::MAX]] {
        assert!(trace.push(1, SHORT, runs).is_err());
        assert_eq!((trace.num_requests(), trace.num_references(), trace.num_unique()), (1, 2, 2));
    }
    // Blocks that a refused request had named follow any other now.
    trace.push(1, SHORT, &[7, 1, 8, 1]).unwrap();
    assert_eq!((trace.num_requests(), trace.num_unique()), (2, 4));
}
