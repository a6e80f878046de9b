//! The failures of a node in a row, as its requests see them.
//!
//! Each answer of each worker would write here, if successes were counted. So only failures are: a success of a node that is
//! well reads one word that nobody writes.
//!
//! How many failures came in a row says little at a node with many requests a second, when one client asks again and again for
//! a page that fails: by chance alone five of them meet. How long nothing but failures came does: every good answer to anybody
//! else ends the row. So the time of the first one is kept beside the number.
//!
//! The pure layer has no clock: times are milliseconds since any moment that all callers agree on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Failures in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Streak {
    /// How many.
    pub failures: u32,
    /// The time from the first to the last.
    pub lasts: Duration,
}

/// The number of failures since the last success, and the time of the first of them: one word, so that no reader sees one
/// without the other.
#[derive(Debug, Default)]
pub struct FailureStreak(AtomicU64);

impl FailureStreak {
    /// Ends the row.
    pub fn record_success(&self) {
        // Most often there is none.
        if self.0.load(Ordering::Relaxed) != 0 {
            self.0.store(0, Ordering::Relaxed);
        }
    }

    /// Counts a failure; returns the row with it.
    pub fn record_failure(&self, now_ms: u32) -> Streak {
        let another = |word| {
            let (failures, first_ms) = unpack(word);
            let first_ms = if failures == 0 { now_ms } else { first_ms };
            Some(u64::from(failures.saturating_add(1)) << 32 | u64::from(first_ms))
        };
        let before = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, another);
        let (failures, first_ms) = before.map_or((0, now_ms), unpack);
        let first_ms = if failures == 0 { now_ms } else { first_ms };
        // Workers read the clock before they write here: the first time may be a little later than this one.
        let lasts = (now_ms.wrapping_sub(first_ms) as i32).max(0).unsigned_abs();
        Streak { failures: failures.saturating_add(1), lasts: Duration::from_millis(lasts.into()) }
    }

    /// How many failures there are.
    pub fn failures(&self) -> u32 {
        unpack(self.0.load(Ordering::Relaxed)).0
    }
}

fn unpack(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, word as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streak(failures: u32, ms: u64) -> Streak {
        Streak { failures, lasts: Duration::from_millis(ms) }
    }

    #[test]
    fn failures_are_counted_with_their_time_until_a_success() {
        let row = FailureStreak::default();
        assert_eq!([5, 9, 1005].map(|at| row.record_failure(at)), [streak(1, 0), streak(2, 4), streak(3, 1000)]);
        assert_eq!(row.failures(), 3);
        row.record_success();
        assert_eq!((row.failures(), row.record_failure(2000)), (0, streak(1, 0)));
    }

    #[test]
    fn a_clock_that_wraps_or_goes_back_a_little_makes_no_row_long() {
        let row = FailureStreak::default();
        row.record_failure(u32::MAX - 10);
        assert_eq!(row.record_failure(u32::MAX - 20), streak(2, 0));
        assert_eq!(row.record_failure(9), streak(3, 20));
    }
}
