//! RedeliveryQueue of the journal that a Varnish is to be told once more, and when.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::journal::Position;

/// What follows `after` up to `last`, to be told again when it is `due`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RedeliveryRange {
    pub(super) after: Position,
    pub(super) last: Position,
    pub(super) due: Instant,
}

/// RedeliveryQueue in the order of the journal, each following the one before it. Those that are due at nearly the same time
/// become one, so there are never more of them than `longest / grain`, however many purges come; and so do those that
/// have become due behind another one. No purge puts off what came before it by more than the grain.
#[derive(Debug)]
pub(super) struct RedeliveryQueue {
    waiting: VecDeque<Waiting>,
    grain: Duration,
}

#[derive(Debug)]
struct Waiting {
    range: RedeliveryRange,
    /// What follows and is due by then is added. `None`: nothing is any more.
    takes_until: Option<Instant>,
}

impl RedeliveryQueue {
    /// None yet. Two that are due within `grain` of each other are told as one, when the later one is due.
    pub(super) fn new(grain: Duration) -> Self {
        RedeliveryQueue { waiting: VecDeque::new(), grain }
    }

    /// Adds what follows the last range, or begins anew where there is none.
    pub(super) fn push(&mut self, after: Position, last: Position, due: Instant) {
        match self.waiting.back_mut() {
            Some(Waiting { range, takes_until: Some(until) }) if due <= *until => {
                (range.last, range.due) = (last, range.due.max(due));
            }
            _ => {
                let range = RedeliveryRange { after, last, due };
                self.waiting.push_back(Waiting { range, takes_until: Some(due + self.grain) });
            }
        }
    }

    /// The next to be told.
    pub(super) fn first(&self) -> Option<RedeliveryRange> {
        self.waiting.front().map(|first| first.range)
    }

    /// The first one was told. Those that are due behind it become one.
    pub(super) fn complete_first(&mut self, now: Instant) {
        self.waiting.pop_front();
        while let (Some(first), Some(second)) = (self.waiting.front(), self.waiting.get(1))
            && first.range.due.max(second.range.due) <= now
        {
            let after = first.range.after;
            self.waiting.pop_front();
            if let Some(second) = self.waiting.front_mut() {
                second.range.after = after;
            }
        }
    }

    /// The first one is to be told at this time.
    pub(super) fn postpone(&mut self, due: Instant) {
        if let Some(first) = self.waiting.front_mut() {
            first.range.due = due;
        }
    }

    /// Nothing is added to the first one any more.
    pub(super) fn close(&mut self) {
        if let Some(first) = self.waiting.front_mut() {
            first.takes_until = None;
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
        let mut queue = RedeliveryQueue::new(GRAIN);
        queue.push(0, 3, now);
        queue.push(3, 5, now + GRAIN);
        queue.push(5, 6, now);
        assert_eq!(queue.first(), Some(RedeliveryRange { after: 0, last: 6, due: now + GRAIN }));
        queue.push(6, 9, now + GRAIN * 3);
        queue.postpone(now + GRAIN * 9);
        assert_eq!(queue.first(), Some(RedeliveryRange { after: 0, last: 6, due: now + GRAIN * 9 }));
        queue.complete_first(now);
        assert_eq!(queue.first(), Some(RedeliveryRange { after: 6, last: 9, due: now + GRAIN * 3 }));
        queue.complete_first(now);
        assert_eq!(queue.first(), None);
    }

    #[test]
    fn a_storm_does_not_put_off_the_first_one() {
        let now = Instant::now();
        let mut queue = RedeliveryQueue::new(GRAIN);
        for purge in 0..100_u32 {
            queue.push(purge.into(), (purge + 1).into(), now + purge * Duration::from_millis(10));
        }
        assert_eq!(queue.first(), Some(RedeliveryRange { after: 0, last: 3, due: now + Duration::from_millis(20) }));
    }

    #[test]
    fn what_is_due_behind_another_is_one_stretch_and_a_closed_one_is_full() {
        let now = Instant::now();
        let mut queue = RedeliveryQueue::new(GRAIN);
        queue.push(0, 1, now);
        queue.close();
        queue.push(1, 2, now);
        (2..9).for_each(|purge| queue.push(purge, purge + 1, now + GRAIN * 2 * purge as u32));
        assert_eq!(queue.first(), Some(RedeliveryRange { after: 0, last: 1, due: now }));
        queue.complete_first(now + GRAIN * 8);
        assert_eq!(queue.first(), Some(RedeliveryRange { after: 1, last: 5, due: now + GRAIN * 8 }));
        queue.complete_first(now + GRAIN * 8);
        assert_eq!(queue.first(), Some(RedeliveryRange { after: 5, last: 6, due: now + GRAIN * 10 }));
    }

    #[test]
    fn a_storm_makes_no_more_stretches_than_its_time_has_grains() {
        let now = Instant::now();
        let mut queue = RedeliveryQueue::new(GRAIN);
        for purge in 0..100_000 {
            queue.push(purge, purge + 1, now + Duration::from_micros(purge * 10));
        }
        assert!(queue.waiting.len() <= 41, "{}", queue.waiting.len());
    }
}
