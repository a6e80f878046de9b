//! When a node was seen to run, and so by when it has taken in what was on its way to it.
//!
//! A process that was stopped and runs again answers at once what comes next, and may get to what waited in its sockets
//! only after that. So one answer says nothing about what was sent before it. Two that are [`LANDING`] apart do: at the
//! first the node ran, and until the second it has had the time.
//!
//! How long an answer takes says whether the node stood still meanwhile, but only next to what this node's answers
//! usually take: 110 ms are a hang next door, and nothing at all on another continent. So every duration is measured
//! against the shortest of the last few round trips, and a node that has become slower is soon measured against itself.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

/// How long a page may take from us until a Varnish that runs has made an object of it.
pub const LANDING: Duration = Duration::from_millis(100);

/// An answer that took longer than the shortest round trip by this does not say when in this time the node ran.
const QUICK: Duration = Duration::from_millis(50);

/// A round trip that took longer than the shortest one by this came from a node that stood still for a while.
const STALL: Duration = Duration::from_millis(100);

/// The round trips that a new one is measured against.
const REMEMBERED: usize = 8;

/// What a node has shown of itself. All times are from the start of the process.
#[derive(Debug, Default)]
pub struct LifeSigns {
    /// When the last sign was asked for, in ms. Signs that follow within a round trip and [`LANDING`] are left out.
    last: AtomicU64,
    /// The one before it.
    before: AtomicU64,
    /// The shortest of the remembered round trips, in µs; 0 before the first.
    shortest: AtomicU64,
    round_trips: Mutex<VecDeque<u64>>,
}

impl LifeSigns {
    /// The node has answered a question of ours (a probe, a purge) on a connection that stood already: asked at this
    /// time, answered so much later. Says whether it stood still meanwhile.
    pub fn measured(&self, asked: Duration, took: Duration) -> bool {
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

    /// The node has answered what was asked at this time, and took so long: any request, the data path's too.
    pub fn record_answer(&self, asked: Duration, took: Duration) {
        let quick = QUICK + self.round_trip();
        let (last, asked) = (self.last.load(Ordering::Relaxed), asked.as_millis() as u64);
        let apart = (quick + LANDING).as_millis() as u64;
        if asked < last + apart || took > quick {
            return;
        }
        // Of two threads one is enough. One that comes late stores an earlier time, which is the safe side.
        if self.last.compare_exchange(last, asked, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.before.store(last, Ordering::Relaxed);
        }
    }

    /// The shortest of the last few round trips; 0 before the first.
    pub fn round_trip(&self) -> Duration {
        Duration::from_micros(self.shortest.load(Ordering::Relaxed))
    }

    /// What was sent to the node before this time it has taken in; 0 where that is not known of anything.
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

    /// What is known after these answers, given with their times and how long they took.
    fn taken_in(answers: &[(u64, u64)]) -> Duration {
        let signs = LifeSigns::default();
        answers.iter().for_each(|&(asked, took)| signs.record_answer(ms(asked), ms(took)));
        signs.taken_in()
    }

    #[test]
    fn one_answer_says_nothing_about_what_was_sent_before_it() {
        assert_eq!(taken_in(&[]), ms(0));
        assert_eq!(taken_in(&[(5000, 1)]), ms(0));
        // Stopped until 5000, and asked twice at once.
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
        assert!(signs.measured(ms(1000), ms(110)), "nothing is known of it yet");
        for asked in [2000, 3000, 4000] {
            assert!(!signs.measured(ms(asked), ms(125)));
        }
        assert_eq!((signs.round_trip(), signs.taken_in()), (ms(110), ms(3000)));
        assert!(signs.measured(ms(5000), ms(250)));
    }

    #[test]
    fn a_node_that_became_slower_stands_still_for_as_long_as_its_past_is_remembered() {
        let signs = LifeSigns::default();
        signs.measured(ms(1000), ms(2));
        let stalls = (0..20).filter(|n| signs.measured(ms(2000 + n * 1000), ms(300))).count();
        assert_eq!(stalls, REMEMBERED);
        assert!(signs.taken_in() > ms(10_000));
    }
}
