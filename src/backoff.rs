//! How long to wait after failures, for everybody who tries again.
//!
//! Pure: randomness is an argument. What all have in common is the bound, which doubles with each failure in a row; how
//! much of it a pause lasts is drawn by the caller, as one rule does not fit all. Many clients of one server that died
//! spread best over the whole of it (full jitter); who must not ask too soon draws from the upper part.

use std::time::Duration;

/// A bound for pauses that doubles from `min` to `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// The bound after the first failure.
    pub min: Duration,
    /// The bound that no number of failures exceeds.
    pub max: Duration,
}

impl Backoff {
    /// The longest pause after this many failures in a row; 0 counts as 1.
    pub fn bound(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        self.min.saturating_mul(1 << doublings).min(self.max)
    }

    /// The pause after this many failures in a row: this share of the bound, from 0 to 1.
    pub fn pause(&self, failures: u32, share: f64) -> Duration {
        self.bound(failures).mul_f64(share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff = Backoff { min: Duration::from_secs(1), max: Duration::from_secs(6) };

    #[test]
    fn the_bound_doubles_up_to_the_longest_however_many_fail() {
        assert_eq!([0, 1, 2, 3, 4, 40, u32::MAX].map(|n| BACKOFF.bound(n).as_secs()), [1, 1, 2, 4, 6, 6, 6]);
    }

    #[test]
    fn a_pause_is_a_share_of_the_bound() {
        assert_eq!([0.0, 0.5, 1.0].map(|share| BACKOFF.pause(3, share).as_secs()), [0, 2, 4]);
    }
}
