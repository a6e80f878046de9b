//! What a Varnish has acknowledged to us and does not count, because another replica could not tell it.
//!
//! A page passes one replica's origin, and the ban comes from another one: when the node reads the ban first, it stores
//! the page after it, where no ban finds it any more. Each replica guards against that for what passes itself, as it
//! tells the bans a second time; one that cannot reach the node cannot. So the others do it in its place: the
//! acknowledgement is taken back, the node is told once more when the page has had its time to land
//! ([`LANDING`](crate::fleet::LANDING)), and what it acknowledges then counts.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::stretches::Stretch;
use crate::fleet::Live;
use crate::journal::Position;

/// What is to be told again within this time is told together.
const GRAIN: Duration = Duration::from_millis(25);

/// The recalls of one node. There are never more of them than grains in the longest delay.
#[derive(Debug, Default)]
pub(super) struct Recalls {
    waiting: Mutex<VecDeque<Stretch>>,
    /// Rings when there is a new one.
    ring: Notify,
}

impl Recalls {
    /// Takes back what the node has acknowledged at this position, until it has been told again, `delay` from now at the
    /// earliest.
    pub(super) fn push(&self, live: &Live, position: Position, delay: Duration) {
        let mut waiting = self.waiting.lock();
        let (after, due) = (position.saturating_sub(1), Instant::now() + delay);
        match waiting.back_mut() {
            // Its time does not move, so that a storm cannot put it off.
            Some(back) if due <= back.due => {
                (back.after, back.last) = (back.after.min(after), back.last.max(position));
            }
            _ => waiting.push_back(Stretch { after, last: position, due: due + GRAIN }),
        }
        recall(live, &waiting);
        self.ring.notify_one();
    }

    /// Returns when one is to be told again.
    pub(super) async fn due(&self) -> Stretch {
        loop {
            match self.first() {
                Some(first) => {
                    tokio::time::sleep_until(first.due.into()).await;
                    // As much as has come to it by now.
                    if let Some(first) = self.first() {
                        return first;
                    }
                }
                None => self.ring.notified().await,
            }
        }
    }

    /// The node has acknowledged this one, as it was when it was due.
    pub(super) fn done(&self, live: &Live, told: Stretch) {
        let mut waiting = self.waiting.lock();
        // More may have come to it since; then it is told once more.
        if waiting.front() == Some(&told) {
            waiting.pop_front();
        }
        recall(live, &waiting);
    }

    /// The first one is to be told again at this time.
    pub(super) fn postpone(&self, due: Instant) {
        if let Some(first) = self.waiting.lock().front_mut() {
            first.due = due;
        }
    }

    fn first(&self) -> Option<Stretch> {
        self.waiting.lock().front().copied()
    }
}

/// Tells the node's readers how far it counts.
fn recall(live: &Live, waiting: &VecDeque<Stretch>) {
    live.recall(waiting.iter().map(|stretch| stretch.after).min());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_acknowledgement_taken_back_counts_again_when_repeated() {
        let (recalls, live) = (Recalls::default(), Live::default());
        live.set_cursor(9);
        recalls.push(&live, 5, Duration::ZERO);
        recalls.push(&live, 7, Duration::ZERO);
        assert_eq!(live.cursor(), 4);
        let due = recalls.due().await;
        assert_eq!((due.after, due.last), (4, 7));
        // One that comes while this one is told again does not count with it.
        recalls.push(&live, 9, Duration::from_millis(200));
        live.set_cursor(12);
        recalls.done(&live, due);
        assert_eq!(live.cursor(), 8);
        let began = Instant::now();
        let due = recalls.due().await;
        assert!(began.elapsed() > Duration::from_millis(100));
        recalls.done(&live, due);
        assert_eq!(live.cursor(), 12);
    }

    #[tokio::test]
    async fn a_storm_neither_puts_off_the_first_one_nor_makes_a_queue() {
        let (recalls, live) = (Recalls::default(), Live::default());
        let began = Instant::now();
        for position in 1..20_000 {
            recalls.push(&live, position, Duration::from_millis(100));
        }
        let took = began.elapsed();
        assert!(recalls.waiting.lock().len() as u128 <= took.as_millis() / GRAIN.as_millis() + 1);
        assert!(recalls.first().unwrap().due <= began + Duration::from_millis(130) + took);
    }
}
