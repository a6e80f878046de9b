//! When a node was seen to run, and so which data it must have processed.
//!
//! A process that was stopped and resumed may answer the next request at once, before it reads the older data in its
//! other sockets. So one answer proves nothing about data sent before it. Two answers that are [`FILL_LATENCY`] apart do: at
//! the first the node ran, and until the second it has had the time.
//!
//! The duration of an answer shows whether the node was stopped meanwhile, but only relative to its usual answers: 110
//! ms are a hang in the same rack, and normal on another continent. So every duration is compared with the shortest of
//! the last few round trips, and a node that has become slower is soon compared with itself.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

/// The most time for a page to travel from us to a running Varnish and become an object there.
pub const FILL_LATENCY: Duration = Duration::from_millis(100);

/// An answer slower than the shortest round trip by this does not tell when the node ran.
const QUICK: Duration = Duration::from_millis(50);

/// A round trip longer than the shortest one by this shows that the node was stopped for a while.
const STALL: Duration = Duration::from_millis(100);

/// The number of round trips to compare with.
const REMEMBERED: usize = 8;

/// The signs of life of a node. All times are since the start of the process.
#[derive(Debug, Default)]
pub struct LifeSigns {
    /// When the request of the last sign was sent, in ms. Signs within a round trip and [`FILL_LATENCY`] of it are ignored.
    last: AtomicU64,
    /// The sign before it.
    before: AtomicU64,
    /// The shortest of the recent round trips, in µs; 0 before the first.
    shortest: AtomicU64,
    round_trips: Mutex<VecDeque<u64>>,
}

impl LifeSigns {
    /// Records the answer to a probe or purge of ours on an existing connection: when it was sent, and how long the
    /// answer took. Returns whether the node was stopped meanwhile.
    pub fn record_round_trip(&self, asked: Duration, took: Duration) -> bool {
        let stood_still = took > STALL + self.round_trip();
        {
            let mut round_trips = self.round_trips.lock();
            if round_trips.len() == REMEMBERED {
                round_trips.pop_front();
            }
            round_trips.push_back(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
            self.shortest.store(round_trips.iter().copied().min().unwrap_or(0), Ordering::Relaxed);
        }
        self.record_answer(asked, took);
        stood_still
    }

    /// Records the answer to any request, including the data path's: when it was sent, and how long the answer took.
    pub fn record_answer(&self, asked: Duration, took: Duration) {
        let quick = QUICK + self.round_trip();
        let (last, asked) = (self.last.load(Ordering::Relaxed), asked.as_millis() as u64);
        let apart = (quick + FILL_LATENCY).as_millis() as u64;
        if asked < last + apart || took > quick {
            return;
        }
        // If two threads race, one result is enough. A late thread stores an earlier time, which is the safe side.
        if self.last.compare_exchange(last, asked, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.before.store(last, Ordering::Relaxed);
        }
    }

    /// The shortest of the recent round trips; 0 before the first.
    pub fn round_trip(&self) -> Duration {
        Duration::from_micros(self.shortest.load(Ordering::Relaxed))
    }

    /// The node has processed everything sent to it before this time; 0 if unknown.
    pub fn taken_in(&self) -> Duration {
        Duration::from_millis(self.before.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    /// The result after these answers, given as pairs of time and duration.
    fn taken_in(answers: &[(u64, u64)]) -> Duration {
        let signs = LifeSigns::default();
        answers.iter().for_each(|&(asked, took)| signs.record_answer(ms(asked), ms(took)));
        signs.taken_in()
    }

    #[test]
    fn one_answer_says_nothing_about_what_was_sent_before_it() {
        assert_eq!(taken_in(&[]), ms(0));
        assert_eq!(taken_in(&[(5000, 1)]), ms(0));
        // Stopped until 5000, with two requests at once.
        assert_eq!(taken_in(&[(1000, 1), (2000, 1), (5000, 1), (5001, 1), (5149, 1)]), ms(2000));
    }

    #[test]
    fn a_second_one_after_a_while_says_that_all_before_the_first_has_landed() {
        assert_eq!(taken_in(&[(1000, 1), (1150, 1)]), ms(1000));
        assert_eq!(taken_in(&[(1000, 1), (1100, 1), (1200, 1), (1400, 1)]), ms(1200));
    }

    #[test]
    fn an_answer_that_took_long_is_none() {
        assert_eq!(taken_in(&[(1000, 1), (2000, 60), (3000, 51)]), ms(0));
    }

    #[test]
    fn a_far_node_is_measured_against_itself() {
        let signs = LifeSigns::default();
        assert!(signs.record_round_trip(ms(1000), ms(110)), "nothing is known of it yet");
        for asked in [2000, 3000, 4000] {
            assert!(!signs.record_round_trip(ms(asked), ms(125)));
        }
        assert_eq!((signs.round_trip(), signs.taken_in()), (ms(110), ms(3000)));
        assert!(signs.record_round_trip(ms(5000), ms(250)));
    }

    #[test]
    fn a_slower_node_counts_as_stopped_until_old_round_trips_are_forgotten() {
        let signs = LifeSigns::default();
        signs.record_round_trip(ms(1000), ms(2));
        let stalls = (0..20).filter(|n| signs.record_round_trip(ms(2000 + n * 1000), ms(300))).count();
        assert_eq!(stalls, REMEMBERED);
        assert!(signs.taken_in() > ms(10_000));
    }
}
