//! A queue of journal ranges that a Varnish is to be sent once more, each at its time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::journal::Position;

/// The entries after `after`, up to `last`, to be sent again when they are `due`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RedeliveryRange {
    pub(super) after: Position,
    pub(super) last: Position,
    pub(super) due: Instant,
}

/// The maximum number of ranges. Beyond it they are merged into the last one, for a node that takes nothing.
const MAX_RANGES: usize = 64;

/// Ranges in the order in which they were added. Those with nearly the same due time are merged, so that there are few of
/// them, however many purges come. Ranges that become due behind another one are merged, too. No purge delays an earlier one
/// by more than the grain.
#[derive(Debug)]
pub(super) struct RedeliveryQueue {
    waiting: VecDeque<Waiting>,
    grain: Duration,
}

impl RedeliveryRange {
    /// Extends it to another one.
    fn include(&mut self, other: RedeliveryRange) {
        self.after = self.after.min(other.after);
        self.last = self.last.max(other.last);
        self.due = self.due.max(other.due);
    }
}

#[derive(Debug)]
struct Waiting {
    range: RedeliveryRange,
    /// Ranges that are due by this time are merged into this one. `None`: it is closed.
    takes_until: Option<Instant>,
}

impl RedeliveryQueue {
    /// An empty queue. Ranges whose due times are within `grain` of each other are merged and sent at the later time.
    pub(super) fn new(grain: Duration) -> Self {
        RedeliveryQueue { waiting: VecDeque::new(), grain }
    }

    /// Adds a range.
    pub(super) fn push(&mut self, after: Position, last: Position, due: Instant) {
        let new = RedeliveryRange { after, last, due };
        let is_full = self.waiting.len() >= MAX_RANGES;
        match self.waiting.back_mut() {
            Some(Waiting { range, takes_until: Some(until) }) if due <= *until || is_full => range.include(new),
            _ => self.waiting.push_back(Waiting { range: new, takes_until: Some(due + self.grain) }),
        }
    }

    /// The least position after which anything is to be sent.
    pub(super) fn after(&self) -> Option<Position> {
        self.waiting.iter().map(|waiting| waiting.range.after).min()
    }

    /// The next range to send.
    pub(super) fn first(&self) -> Option<RedeliveryRange> {
        self.waiting.front().map(|first| first.range)
    }

    /// Removes the first range, and merges those that became due behind it.
    pub(super) fn complete_first(&mut self, now: Instant) {
        self.waiting.pop_front();
        while let (Some(first), Some(second)) = (self.waiting.front(), self.waiting.get(1))
            && first.range.due.max(second.range.due) <= now
        {
            let first = first.range;
            self.waiting.pop_front();
            if let Some(second) = self.waiting.front_mut() {
                second.range.include(first);
            }
        }
    }

    /// Moves the due time of the first range.
    pub(super) fn postpone(&mut self, due: Instant) {
        if let Some(first) = self.waiting.front_mut() {
            first.range.due = due;
        }
    }

    /// Closes the first range: nothing is merged into it any more.
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

    #[test]
    fn what_no_node_takes_makes_no_long_queue_and_nothing_is_lost() {
        let now = Instant::now();
        let mut queue = RedeliveryQueue::new(GRAIN);
        // In no order, as recalls come.
        for purge in (1..=10_000).rev() {
            queue.push(purge - 1, purge, now + GRAIN * 2 * (10_001 - purge) as u32);
            queue.close();
        }
        assert_eq!((queue.waiting.len(), queue.after()), (MAX_RANGES, Some(0)));
        let mut last = queue.first().unwrap().last;
        while let Some(first) = queue.first() {
            last = last.max(first.last);
            queue.complete_first(now);
        }
        assert_eq!((last, queue.after()), (10_000, None));
    }
}
