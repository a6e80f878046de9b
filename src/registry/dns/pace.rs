//! When a name is asked for again.
//!
//! Pure; `random` is from 0 to 1. The TTL of a record counts within bounds: a name is asked for at most once a
//! second, and a TTL counts for at most a minute, since defaults (Docker: 600 s) are rarely meant for a fleet that
//! comes and goes. The random part keeps replicas, and the names of one, from asking together.

use std::time::Duration;

use crate::backoff::Backoff;

const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);

/// The largest random addition, as a share of the TTL. It is only added, so that the record has always expired.
const JITTER: f64 = 0.1;

/// The bound of the pauses while a name is not answered; none is shorter than [`SHORTEST`].
const BACKOFF: Backoff = Backoff { min: Duration::from_secs(2), max: Duration::from_secs(30) };

/// The pause after an answer with this TTL.
pub(super) fn after_answer(ttl: Duration, random: f64) -> Duration {
    ttl.clamp(SHORTEST, LONGEST).mul_f64(1.0 + JITTER * random)
}

/// The pause after this many failures in a row, at least one: random, up to a bound that doubles each time.
pub(super) fn after_failure(failures: u32, random: f64) -> Duration {
    SHORTEST + (BACKOFF.bound(failures) - SHORTEST).mul_f64(random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_asked_for_when_its_life_is_over_and_within_bounds() {
        let seconds = |ttl, random| after_answer(Duration::from_secs(ttl), random).as_secs_f64();
        assert_eq!([seconds(0, 0.0), seconds(1, 0.0), seconds(30, 0.0), seconds(600, 0.0)], [1.0, 1.0, 30.0, 60.0]);
        assert_eq!([seconds(0, 1.0), seconds(30, 1.0), seconds(u64::MAX, 1.0)], [1.1, 33.0, 66.0]);
    }

    #[test]
    fn the_pause_after_failures_grows_to_half_a_minute_and_is_never_short() {
        let bounds = |failures| [0.0, 1.0].map(|random| after_failure(failures, random).as_secs());
        assert_eq!([1, 2, 3, 4, 5, 100].map(bounds), [[1, 2], [1, 4], [1, 8], [1, 16], [1, 30], [1, 30]]);
    }
}
