//! How long a node takes to begin an answer: the mean of the last ten seconds, but a longer time counts at once.
//!
//! Finagle's "peak EWMA". A plain mean notices a node that stalls when many requests have waited for it; here the first
//! one is enough, and what it says fades with the time in which nothing new is known, so that the node is asked again.
//!
//! **A failure costs** [`FAILURE_COST`], however quick it was. A node that fails at once is the quickest of all and would
//! draw all traffic (kubernetes/ingress-nginx#5540, #9882; mosn/mosn#2252), as a PHP server without its database does.
//! If all fail alike, all cost the same, and nothing changes. **A client that does not wait any longer** has shown that
//! the node takes at least that long; without that, one that never answers would be as quick as its last answer.
//!
//! The pure layer has no clock: times are milliseconds since any moment that all callers agree on. They wrap after 49 days, and workers read
//! the clock before they write here, so that a time may be a little earlier than the last one: it counts as the same.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How fast the past fades: to a third in this time. That of Finagle and linkerd.
const FADES_IN: Duration = Duration::from_secs(10);

/// What a failed request counts as at least. That of linkerd's load biaser.
pub const FAILURE_COST: Duration = Duration::from_secs(5);

/// Seconds as the bits of an `f32`, and the time of the last change: one word, so that no reader sees one without the other.
#[derive(Debug, Default)]
pub struct PeakLatency(AtomicU64);

impl PeakLatency {
    /// Counts an answer that took this long to begin.
    pub fn record_answer(&self, now_ms: u32, took: Duration) {
        self.change(now_ms, |faded, kept| {
            let took = took.as_secs_f32();
            if took > faded { took } else { faded + took * (1.0 - kept) }
        });
    }

    /// Counts a failure after this time.
    pub fn record_failure(&self, now_ms: u32, took: Duration) {
        self.record_at_least(now_ms, took.max(FAILURE_COST));
    }

    /// Counts a request that was given up after this time, without a word of the node.
    pub fn record_at_least(&self, now_ms: u32, took: Duration) {
        self.change(now_ms, |faded, _| faded.max(took.as_secs_f32()));
    }

    /// The seconds that an answer is expected to take. `None` if nothing is known.
    pub fn expected(&self, now_ms: u32) -> Option<f32> {
        let (seconds, at) = unpack(self.0.load(Ordering::Relaxed));
        (seconds > 0.0).then(|| seconds * kept(at, now_ms))
    }

    /// `next` is told what is left of the value, and which part of it that is.
    fn change(&self, now_ms: u32, next: impl Fn(f32, f32) -> f32) {
        let changed = |word| {
            let (seconds, at) = unpack(word);
            let kept = kept(at, now_ms);
            let at = if is_later(now_ms, at) || word == 0 { now_ms } else { at };
            Some(u64::from(next(seconds * kept, kept).to_bits()) << 32 | u64::from(at))
        };
        // It never says no.
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, changed).ok();
    }
}

fn unpack(word: u64) -> (f32, u32) {
    (f32::from_bits((word >> 32) as u32), word as u32)
}

/// Workers do not note in the order of their clocks, which wrap: only a small step back is one.
fn is_later(now: u32, than: u32) -> bool {
    const STEP_BACK: u32 = 60_000;
    (1..u32::MAX - STEP_BACK).contains(&now.wrapping_sub(than))
}

/// The part of a value that is left.
fn kept(at: u32, now: u32) -> f32 {
    if !is_later(now, at) {
        return 1.0;
    }
    (-(now.wrapping_sub(at) as f32) / FADES_IN.as_millis() as f32).exp()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// After one answer of 100 ms every 10 ms, for a minute.
    fn steady() -> (PeakLatency, u32) {
        let latency = PeakLatency::default();
        let times = (0..6000).map(|n| n * 10);
        times.for_each(|at| latency.record_answer(at, 100 * MS));
        (latency, 60_000)
    }

    fn near(got: f32, wanted: f32) -> bool {
        (got / wanted - 1.0).abs() < 0.05
    }

    #[test]
    fn it_is_the_mean_of_what_is_steady_and_the_peak_at_once() {
        assert_eq!(PeakLatency::default().expected(5), None);
        let (latency, now) = steady();
        assert!(near(latency.expected(now).unwrap(), 0.1));
        latency.record_answer(now, 800 * MS);
        assert!(near(latency.expected(now).unwrap(), 0.8));
        // It is forgotten as others come.
        (0..3000).for_each(|n| latency.record_answer(now + n * 10, 100 * MS));
        assert!(near(latency.expected(now + 30_000).unwrap(), 0.1 + 0.7 * (-3.0_f32).exp()));
    }

    #[test]
    fn a_failure_costs_however_quick_it_was_and_is_forgotten_in_time() {
        let (latency, now) = steady();
        latency.record_failure(now, MS);
        assert!(near(latency.expected(now).unwrap(), 5.0));
        latency.record_failure(now, 30_000 * MS);
        assert!(near(latency.expected(now).unwrap(), 30.0));
        // It is asked again some time.
        assert!(latency.expected(now + 60_000).unwrap() < 0.1);
    }

    #[test]
    fn who_gives_up_early_says_nothing_and_who_gives_up_late_does() {
        let (latency, now) = steady();
        latency.record_at_least(now, 20 * MS);
        assert!(near(latency.expected(now).unwrap(), 0.1));
        latency.record_at_least(now, 9000 * MS);
        assert!(near(latency.expected(now).unwrap(), 9.0));
    }

    #[test]
    fn a_clock_that_wraps_or_goes_back_a_little_changes_nothing() {
        let latency = PeakLatency::default();
        latency.record_answer(u32::MAX - 10, 100 * MS);
        assert!(near(latency.expected(u32::MAX - 500).unwrap(), 0.1));
        assert!(near(latency.expected(10).unwrap(), 0.1));
        latency.record_answer(u32::MAX - 20, 50 * MS);
        assert!(near(latency.expected(9_989).unwrap(), 0.1 * (-1.0_f32).exp()));
    }

    #[test]
    fn of_a_node_without_work_for_weeks_nothing_is_known() {
        let (latency, now) = steady();
        latency.record_failure(now, MS);
        let month = now + 30 * 24 * 3_600_000;
        assert!(latency.expected(month).unwrap() < 0.001);
        latency.record_answer(month, 100 * MS);
        assert!(near(latency.expected(month).unwrap(), 0.1));
    }

    proptest! {
        #[test]
        fn it_stays_between_nothing_and_the_longest_time(
            answers in prop::collection::vec((0_u32..60_000, 0_u64..60_000), 1..50),
        ) {
            let (latency, mut now) = (PeakLatency::default(), 0_u32);
            let longest = answers.iter().map(|answer| answer.1).max().unwrap();
            for (after, took) in answers {
                now = now.wrapping_add(after);
                latency.record_answer(now, Duration::from_millis(took));
                let expected = latency.expected(now).unwrap_or(0.0);
                prop_assert!((0.0..=longest as f32 / 1000.0 * 1.001).contains(&expected));
            }
        }
    }
}
