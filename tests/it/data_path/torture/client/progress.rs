//! Shared state between a connection's reader and its writer.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;

/// The reader's progress, for the writer.
#[derive(Default)]
pub struct Progress {
    /// The number of finished exchanges.
    pub answered: Cell<usize>,
    /// The last exchange whose body may be sent because a 100 arrived.
    pub continued: Cell<usize>,
    /// A write failed, see [`Incoming::write_failed`](super::Incoming::write_failed).
    pub write_failed: Rc<Cell<bool>>,
    /// The reader has stopped.
    pub over: Cell<bool>,
    moved: Notify,
}

impl Progress {
    pub fn set<T>(&self, what: &Cell<T>, value: T) {
        what.set(value);
        self.moved.notify_waiters();
    }

    /// Waits for the condition, or for the end.
    pub async fn wait(&self, condition: impl Fn() -> bool) {
        loop {
            let moved = self.moved.notified();
            if condition() || self.over.get() {
                return;
            }
            moved.await;
        }
    }
}
