//! Fencing for purges that other replicas accepted and that arrive through the journal.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::Deliveries;
use crate::journal::Position;

/// Purges that arrive within this fraction of the timeout raise the fence together.
pub(super) const ARRIVAL_GRAINS: u32 = 16;

impl Deliveries {
    /// Waits for purges that other replicas accepted, and raises the fence, until the process ends. So a purge that was
    /// answered elsewhere fences here, too, even if no replica reported it directly.
    ///
    /// The accepting replica waits as long as we do. So a purge that arrives while we run is treated like one of ours, and
    /// raises the fence after `timeout`, measured by our own clock, because the clocks of two machines may differ by
    /// anything. Purges up to `answered` are older than our watch and raise the fence at once.
    pub async fn keep_up(&self, timeout: Duration, mut answered: watch::Receiver<Position>) {
        let fence_what_was_answered = async {
            while answered.changed().await.is_ok() {
                let answered = *answered.borrow_and_update();
                self.count_as_answered(answered);
                self.expire_open(answered);
            }
        };
        let settle_what_is_new = async {
            let mut head = self.context.journal.watch();
            let fence = || self.context.fence.position();
            while let Ok(moved) = head.wait_for(|head| *head > fence()).await.map(|head| *head) {
                self.note_requests();
                self.await_unsealed(moved, timeout).await;
                self.await_acknowledgements(moved, timeout).await;
            }
        };
        tokio::join!(fence_what_was_answered, self.fence_in_time(timeout), settle_what_is_new);
    }

    /// Waits like the answer to the last purge up to this position that is not sealed, and raises the fence to it.
    pub async fn await_unsealed(&self, position: Position, timeout: Duration) {
        let last = self.last_unsealed_up_to(position);
        if last > self.context.fence.unsealed_position() {
            self.await_acknowledgements(last, timeout).await;
        }
    }

    /// Raises the fence to purges that arrived `timeout` ago, also while an earlier purge is still awaited: they count as
    /// answered.
    pub async fn fence_in_time(&self, timeout: Duration) {
        let mut head = self.context.journal.watch();
        let mut arrivals: VecDeque<(Position, Instant)> = VecDeque::new();
        loop {
            let due = arrivals.front().map(|&(_, arrived)| arrived + timeout);
            let is_due = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                moved = head.changed() => {
                    if moved.is_err() {
                        return;
                    }
                    let (position, now) = (*head.borrow_and_update(), Instant::now());
                    match arrivals.back_mut() {
                        // Grouped, and a little early, so that the list never has more entries than grains.
                        Some((last, arrived)) if now < *arrived + timeout / ARRIVAL_GRAINS => *last = position,
                        _ => arrivals.push_back((position, now)),
                    }
                }
                () = is_due => {
                    if let Some((position, _)) = arrivals.pop_front() {
                        self.count_as_answered(position);
                        self.expire_open(position);
                    }
                }
            }
        }
    }
}
