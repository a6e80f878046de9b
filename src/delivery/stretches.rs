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
    /// The node was first told of all of it by then.
    pub(super) told: Instant,
    /// A page that it concerns was under way when the node was told last.
    pub(super) landing: bool,
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
    pub(super) fn push(&mut self, new: Stretch) {
        match self.waiting.back_mut() {
            Some(back) if new.due <= back.due + self.grain => {
                *back = Stretch {
                    after: back.after,
                    due: back.due.max(new.due),
                    landing: back.landing || new.landing,
                    ..new
                };
            }
            _ => self.waiting.push_back(new),
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

    /// The first one is to be told once more, at this time; `landing`: a page that it concerns is under way still.
    pub(super) fn postpone(&mut self, due: Instant, landing: bool) {
        if let Some(first) = self.waiting.front_mut() {
            (first.due, first.landing) = (due, landing);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRAIN: Duration = Duration::from_millis(25);

    fn stretch(after: Position, last: Position, due: Instant, now: Instant) -> Stretch {
        Stretch { after, last, due, told: now, landing: false }
    }

    #[test]
    fn what_is_due_at_nearly_the_same_time_is_one_stretch() {
        let now = Instant::now();
        let mut stretches = Stretches::new(GRAIN);
        stretches.push(stretch(0, 3, now, now));
        stretches.push(stretch(3, 5, now + GRAIN, now));
        stretches.push(stretch(5, 6, now, now));
        assert_eq!(stretches.first(), Some(stretch(0, 6, now + GRAIN, now)));
        stretches.push(stretch(6, 9, now + GRAIN * 3, now));
        stretches.postpone(now + GRAIN * 9, false);
        assert_eq!(stretches.first(), Some(stretch(0, 6, now + GRAIN * 9, now)));
        stretches.done();
        assert_eq!(stretches.first(), Some(stretch(6, 9, now + GRAIN * 3, now)));
        stretches.done();
        assert_eq!(stretches.first(), None);
    }

    #[test]
    fn a_stretch_that_grows_was_told_when_its_last_part_was_and_waits_for_what_any_part_waits_for() {
        let now = Instant::now();
        let mut stretches = Stretches::new(GRAIN);
        stretches.push(Stretch { landing: true, ..stretch(0, 3, now, now) });
        stretches.push(stretch(3, 5, now, now + GRAIN));
        assert_eq!(stretches.first(), Some(Stretch { landing: true, ..stretch(0, 5, now, now + GRAIN) }));
        stretches.postpone(now, false);
        assert_eq!(stretches.first(), Some(stretch(0, 5, now, now + GRAIN)));
    }

    #[test]
    fn a_storm_makes_no_more_stretches_than_its_time_has_grains() {
        let now = Instant::now();
        let mut stretches = Stretches::new(GRAIN);
        for purge in 0..100_000 {
            stretches.push(stretch(purge, purge + 1, now + Duration::from_micros(purge * 10), now));
        }
        assert!(stretches.waiting.len() <= 41, "{}", stretches.waiting.len());
    }
}
