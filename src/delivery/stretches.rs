//! Stretches of the journal that a Varnish is to be told once more, and when.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::journal::Position;

/// What follows `after` up to `last`, to be told again when it is `due`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) after: Position,
    pub(super) last: Position,
    pub(super) due: Instant,
}

/// Stretches in the order of the journal, each following the one before it. Those that are due at nearly the same time
/// become one, so there are never more of them than `longest / grain`, however many purges come.
#[derive(Debug)]
pub(super) struct Stretches {
    waiting: VecDeque<Stretch>,
    grain: Duration,
}

impl Stretches {
    /// None yet. Two that are due within `grain` of each other are told as one, when the later one is due.
    pub(super) fn new(grain: Duration) -> Self {
        Stretches { waiting: VecDeque::new(), grain }
    }

    /// Adds what follows the last stretch, or begins anew where there is none.
    pub(super) fn push(&mut self, after: Position, last: Position, due: Instant) {
        match self.waiting.back_mut() {
            Some(back) if due <= back.due + self.grain => {
                back.last = last;
                back.due = back.due.max(due);
            }
            _ => self.waiting.push_back(Stretch { after, last, due }),
        }
    }

    /// The next to be told.
    pub(super) fn first(&self) -> Option<Stretch> {
        self.waiting.front().copied()
    }

    /// The first one was told.
    pub(super) fn done(&mut self) {
        self.waiting.pop_front();
    }

    /// The first one is to be told once more, at this time.
    pub(super) fn postpone(&mut self, due: Instant) {
        if let Some(first) = self.waiting.front_mut() {
            first.due = due;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRAIN: Duration = Duration::from_millis(25);

    #[test]
    fn what_is_due_at_nearly_the_same_time_is_one_stretch() {
        let now = Instant::now();
        let mut stretches = Stretches::new(GRAIN);
        stretches.push(0, 3, now);
        stretches.push(3, 5, now + GRAIN);
        stretches.push(5, 6, now);
        assert_eq!(stretches.first(), Some(Stretch { after: 0, last: 6, due: now + GRAIN }));
        stretches.push(6, 9, now + GRAIN * 3);
        stretches.postpone(now + GRAIN * 9);
        assert_eq!(stretches.first(), Some(Stretch { after: 0, last: 6, due: now + GRAIN * 9 }));
        stretches.done();
        assert_eq!(stretches.first(), Some(Stretch { after: 6, last: 9, due: now + GRAIN * 3 }));
        stretches.done();
        assert_eq!(stretches.first(), None);
    }

    #[test]
    fn a_storm_makes_no_more_stretches_than_its_time_has_grains() {
        let now = Instant::now();
        let mut stretches = Stretches::new(GRAIN);
        for purge in 0..100_000 {
            stretches.push(purge, purge + 1, now + Duration::from_micros(purge * 10));
        }
        assert!(stretches.waiting.len() <= 41, "{}", stretches.waiting.len());
    }
}
