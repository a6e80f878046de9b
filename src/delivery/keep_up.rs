//! Purges that other replicas have accepted, and that the journal brings.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::Deliveries;
use crate::journal::Position;

/// Purges that arrive within this part of the time that they have fence together.
pub(super) const ARRIVAL_GRAINS: u32 = 16;

impl Deliveries {
    /// Settles what others have accepted and the journal brings, until the process ends: a purge that was answered
    /// elsewhere fences here, too, whether or not anybody told us of it directly.
    ///
    /// Whoever accepted it waits as long as we do, so a purge that comes live is settled as one of ours, and fences when
    /// it has been here for `timeout`: by our own clock, for what another machine's clock says of it may be anything.
    /// What is below `answered` was there before we could see it, and fences at once.
    pub async fn keep_up(&self, timeout: Duration, mut answered: watch::Receiver<Position>) {
        let fence_what_was_answered = async {
            while answered.changed().await.is_ok() {
                let answered = *answered.borrow_and_update();
                self.context.fence.raise(answered);
                self.expire_open(answered);
            }
        };
        let settle_what_is_new = async {
            let mut head = self.context.journal.watch();
            let fence = || self.context.fence.position();
            while let Ok(moved) = head.wait_for(|head| *head > fence()).await.map(|head| *head) {
                self.note_requests();
                self.await_acknowledgements(moved, timeout).await;
            }
        };
        tokio::join!(fence_what_was_answered, self.fence_in_time(timeout), settle_what_is_new);
    }

    /// Raises the fence to what has been here for `timeout`, also while an earlier purge is still being settled: it counts as
    /// answered, whoever accepted it.
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
                        // Together, and a little early: so there are never more of them than grains in the time.
                        Some((last, arrived)) if now < *arrived + timeout / ARRIVAL_GRAINS => *last = position,
                        _ => arrivals.push_back((position, now)),
                    }
                }
                () = is_due => {
                    if let Some((position, _)) = arrivals.pop_front() {
                        self.context.fence.raise(position);
                        self.expire_open(position);
                    }
                }
            }
        }
    }
}
