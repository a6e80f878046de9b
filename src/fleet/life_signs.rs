//! When a node was seen to run, and so by when it has taken in what was on its way to it.
//!
//! A process that was stopped and runs again answers at once what comes next, and may get to what waited in its sockets
//! only after that. So one answer says nothing about what was sent before it. Two that are [`LANDING`] apart do: at the
//! first the node ran, and until the second it has had the time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long a page may take from us until a Varnish that runs has made an object of it.
pub const LANDING: Duration = Duration::from_millis(100);

/// An answer that took longer does not say when in this time the node ran.
const QUICK: Duration = Duration::from_millis(50);

/// What a node has shown of itself. All times are from the start of the process.
#[derive(Debug, Default)]
pub struct LifeSigns {
    /// When the last sign was asked for, in ms. Signs that follow within [`QUICK`] and [`LANDING`] are left out.
    last: AtomicU64,
    /// The one before it.
    before: AtomicU64,
}

impl LifeSigns {
    /// The node has answered what was asked at this time, and took so long.
    pub fn answered(&self, asked: Duration, took: Duration) {
        let (last, asked) = (self.last.load(Ordering::Relaxed), asked.as_millis() as u64);
        let apart = (QUICK + LANDING).as_millis() as u64;
        if asked < last + apart || took > QUICK {
            return;
        }
        // Of two threads one is enough. One that comes late stores an earlier time, which is the safe side.
        if self.last.compare_exchange(last, asked, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.before.store(last, Ordering::Relaxed);
        }
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
        answers.iter().for_each(|&(asked, took)| signs.answered(ms(asked), ms(took)));
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
}
