//! The traffic of the last quarter of an hour, so that a page that has just been opened shows what led to now.
//!
//! Everything is worked out from counters that exist anyway, so it costs the traffic nothing. The memory is bounded: one
//! sample for each step.

use std::collections::VecDeque;
use std::time::Duration;

use serde::Serialize;

use crate::telemetry::Durations;

/// The time between two samples.
pub(super) const STEP: Duration = Duration::from_secs(5);

/// The number of samples: a quarter of an hour.
const SAMPLES: usize = 180;

/// The counters of the edge at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct EdgeReading {
    /// All requests.
    pub(super) durations: Durations,
    /// Requests that were answered with a 5xx.
    pub(super) server_errors: u64,
    /// Answers of caches: hits, misses, passes.
    pub(super) cache_results: [u64; 3],
}

/// The traffic of one step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Sample {
    /// Its end, in milliseconds since 1970.
    at: u64,
    requests_per_second: f64,
    /// The share of requests that were answered with a 5xx, from 0 to 1.
    errors: f64,
    /// The time that half of the requests needed at most; absent without requests.
    p50_ms: Option<f64>,
    /// The same of 99 in 100.
    p99_ms: Option<f64>,
    /// The share of answers that a cache had, from 0 to 1; absent if none told.
    hit_rate: Option<f64>,
}

/// The samples, the oldest first.
#[derive(Debug, Default)]
pub(super) struct History {
    samples: VecDeque<Sample>,
    last: Option<EdgeReading>,
}

impl History {
    /// Takes a reading, `elapsed` after the last one. Returns the sample that came of it; none of the first.
    pub(super) fn record(&mut self, at_ms: u64, elapsed: Duration, now: EdgeReading) -> Option<Sample> {
        let sample = self.last.as_ref().map(|last| Sample::between(last, &now, at_ms, elapsed));
        self.last = Some(now);
        if let Some(sample) = &sample {
            if self.samples.len() == SAMPLES {
                self.samples.pop_front();
            }
            self.samples.push_back(sample.clone());
        }
        sample
    }

    pub(super) fn samples(&self) -> &VecDeque<Sample> {
        &self.samples
    }
}

impl Sample {
    fn between(last: &EdgeReading, now: &EdgeReading, at_ms: u64, elapsed: Duration) -> Self {
        let requests = now.durations.count.saturating_sub(last.durations.count);
        // The series of a node that left are gone from the sum, so it may fall.
        let errors = now.server_errors.saturating_sub(last.server_errors);
        let cached: [u64; 3] = std::array::from_fn(|at| now.cache_results[at].saturating_sub(last.cache_results[at]));
        let percentile = |share| percentile(&last.durations, &now.durations, share).map(|seconds| seconds * 1000.0);
        Sample {
            at: at_ms,
            requests_per_second: requests as f64 / elapsed.as_secs_f64().max(0.001),
            errors: ratio(errors, requests).unwrap_or(0.0).min(1.0),
            p50_ms: percentile(0.5),
            p99_ms: percentile(0.99),
            hit_rate: ratio(cached[0], cached.iter().sum()),
        }
    }
}

/// A part of a whole; `None` of nothing.
pub(super) fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// The time in seconds that this share of the requests between two readings needed at most, as exactly as the buckets
/// allow.
fn percentile(last: &Durations, now: &Durations, share: f64) -> Option<f64> {
    let total = now.count.checked_sub(last.count).filter(|&total| total > 0)?;
    let wanted = share * total as f64;
    let mut below = (0.0, 0);
    for (index, &(bound, count)) in now.buckets.iter().enumerate() {
        let count = count.saturating_sub(last.buckets.get(index).map_or(0, |&(_, before)| before));
        if count as f64 >= wanted {
            let within = (wanted - below.1 as f64) / (count - below.1).max(1) as f64;
            return Some(below.0 + (bound - below.0) * within.clamp(0.0, 1.0));
        }
        below = (bound, count);
    }
    Some(below.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(fast: u64, slow: u64, errors: u64, cache_results: [u64; 3]) -> EdgeReading {
        let durations = Durations { count: fast + slow, buckets: vec![(0.01, fast), (0.1, fast), (1.0, fast + slow)] };
        EdgeReading { durations, server_errors: errors, cache_results }
    }

    #[test]
    fn a_sample_is_what_came_between_two_readings() {
        let mut history = History::default();
        assert_eq!(history.record(0, STEP, reading(1000, 0, 7, [5, 5, 5])), None);
        let sample = history.record(5000, STEP, reading(1080, 20, 12, [65, 25, 15])).unwrap();
        assert_eq!((sample.requests_per_second, sample.errors), (20.0, 0.05));
        assert_eq!(sample.hit_rate, Some(60.0 / 90.0));
        assert_eq!(sample.p50_ms, Some(6.25));
        let p99 = sample.p99_ms.unwrap();
        assert!((950.0..1000.0).contains(&p99), "{p99}");
    }

    #[test]
    fn without_requests_there_is_no_latency_and_no_hit_rate() {
        let mut history = History::default();
        history.record(0, STEP, reading(9, 0, 1, [1, 1, 1]));
        let sample = history.record(5000, STEP, reading(9, 0, 0, [0, 0, 0])).unwrap();
        assert_eq!((sample.requests_per_second, sample.errors), (0.0, 0.0));
        assert_eq!((sample.p50_ms, sample.p99_ms, sample.hit_rate), (None, None, None));
    }

    #[test]
    fn what_is_kept_is_a_quarter_of_an_hour() {
        let mut history = History::default();
        for step in 0..1000 {
            history.record(step, STEP, reading(step, 0, 0, [0; 3]));
        }
        assert_eq!(history.samples().len() as u64 * STEP.as_secs(), 15 * 60);
        assert_eq!(history.samples().back().map(|sample| sample.at), Some(999));
    }
}
