//! Polling before sleeping (`runtime.spin`): less latency for a whole core.
//!
//! Below saturation, the time of a request is mostly wake-ups: the kernel has to schedule a sleeping thread twice for
//! each request. A worker that polls for a while before it sleeps finds the next request, or the node's answer, at
//! once. While this task is ready, the runtime polls the kernel for events without blocking.

use std::cell::Cell;
use std::convert::Infallible;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// The spinning of one worker.
#[derive(Debug)]
pub(super) struct Spin {
    time: Duration,
    last_work: Cell<Instant>,
    work: Notify,
}

impl Spin {
    /// Spins for `time` after the last work; zero disables spinning.
    pub(super) fn new(time: Duration) -> Self {
        Spin { time, last_work: Cell::new(Instant::now()), work: Notify::new() }
    }

    /// Records work: more may follow soon.
    pub(super) fn mark_active(&self) {
        if !self.time.is_zero() {
            self.last_work.set(Instant::now());
            self.work.notify_one();
        }
    }

    /// Keeps the worker awake after work. Never returns.
    pub(super) async fn run(&self) -> Infallible {
        loop {
            self.work.notified().await;
            while self.last_work.get().elapsed() < self.time {
                tokio::task::yield_now().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many turns other tasks of the thread got while the worker was idle for 20 ms.
    async fn turns(spin: Duration) -> u32 {
        let spin = Spin::new(spin);
        spin.mark_active();
        let turns = Cell::new(0);
        let count = std::future::poll_fn(|_| {
            turns.set(turns.get() + 1);
            std::task::Poll::<()>::Pending
        });
        tokio::select! {
            never = spin.run() => match never {},
            () = count => {}
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
        }
        turns.get()
    }

    #[tokio::test]
    async fn a_worker_stays_awake_after_work_only_where_it_is_told_to() {
        assert!(turns(Duration::from_secs(1)).await > 100);
        assert!(turns(Duration::ZERO).await < 10);
    }
}
