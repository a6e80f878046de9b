//! The rate of bans to one Varnish.
//!
//! Every ban costs Varnish a comparison per object until the ban lurker has been through the cache. A token bucket keeps a
//! storm of purges from becoming a storm of bans: while it is empty, purges gather and are sent as one batch. Nothing is
//! dropped, and an acknowledgement still means that the ban is in place.
//!
//! Waiting does not help if the purges cannot be folded (patterns that all differ). So a batch may overdraw the bucket, and
//! the debt is bounded: the next batch waits at most a given time, whatever the last one cost. A purge that waited for its
//! whole `ack_timeout` would fence the node, and a fenced node serves nobody.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

/// The token bucket of one Varnish. Full, it holds one second's worth.
#[derive(Debug)]
pub(super) struct Budget {
    /// Tokens earned per second.
    per_second: f64,
    /// The lower bound of `tokens`, which bounds the wait.
    least: f64,
    tokens: f64,
    counted: Instant,
}

impl Budget {
    /// A full bucket of this many bans per second. `longest_wait` bounds the wait of [`Budget::ready_at`].
    pub(super) fn new(per_second: NonZeroU32, longest_wait: Duration, now: Instant) -> Self {
        let per_second = f64::from(per_second.get());
        let least = 1.0 - per_second * longest_wait.as_secs_f64();
        Budget { per_second, least, tokens: per_second, counted: now }
    }

    /// When the next batch may be sent: now, or later.
    pub(super) fn ready_at(&mut self, now: Instant) -> Instant {
        self.refill(now);
        now + Duration::from_secs_f64((1.0 - self.tokens).max(0.0) / self.per_second)
    }

    /// Takes the tokens of a batch with this many bans.
    pub(super) fn spend(&mut self, bans: usize, now: Instant) {
        self.refill(now);
        self.tokens = (self.tokens - bans as f64).max(self.least);
    }

    fn refill(&mut self, now: Instant) {
        let earned = now.saturating_duration_since(self.counted).as_secs_f64() * self.per_second;
        self.tokens = (self.tokens + earned).min(self.per_second);
        self.counted = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_millis(250);

    fn milliseconds(wait: Duration) -> u128 {
        // A token earned in fractions may be a rounding error short.
        (wait + Duration::from_micros(1)).as_millis()
    }

    #[test]
    fn a_burst_of_one_second_goes_at_once_and_then_one_by_one() {
        let start = Instant::now();
        let mut budget = Budget::new(NonZeroU32::new(20).unwrap(), LONGEST, start);
        for _ in 0..20 {
            assert_eq!(budget.ready_at(start), start);
            budget.spend(1, start);
        }
        let mut now = start;
        for _ in 0..5 {
            let ready = budget.ready_at(now);
            assert_eq!(milliseconds(ready - now), 50);
            now = ready;
            budget.spend(1, now);
        }
    }

    #[test]
    fn an_unused_budget_grows_to_one_second_and_no_further() {
        let start = Instant::now();
        let mut budget = Budget::new(NonZeroU32::new(5).unwrap(), LONGEST, start);
        let later = start + Duration::from_secs(3600);
        budget.spend(5, later);
        assert_eq!(milliseconds(budget.ready_at(later) - later), 200);
    }

    #[test]
    fn a_batch_over_budget_makes_the_next_one_wait_but_not_for_ever() {
        let start = Instant::now();
        let mut budget = Budget::new(NonZeroU32::new(20).unwrap(), LONGEST, start);
        budget.spend(22, start);
        assert_eq!(milliseconds(budget.ready_at(start) - start), 150);
        budget.spend(1000, start);
        assert_eq!(milliseconds(budget.ready_at(start) - start), 250);
    }

    #[test]
    fn a_rate_below_what_the_longest_wait_allows_is_raised_to_it() {
        let start = Instant::now();
        let mut budget = Budget::new(NonZeroU32::new(1).unwrap(), LONGEST, start);
        budget.spend(1, start);
        assert_eq!(milliseconds(budget.ready_at(start) - start), 250);
    }
}
