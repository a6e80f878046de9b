//! What the reader of a connection tells its writer.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;

/// How far the reader of a connection is, for its writer.
#[derive(Default)]
pub struct Progress {
    /// How many exchanges are through.
    pub answered: Cell<usize>,
    /// Up to which exchange a body may be sent because a 100 came.
    pub continued: Cell<usize>,
    /// A write failed, see [`Incoming::write_failed`](super::Incoming::write_failed).
    pub write_failed: Rc<Cell<bool>>,
    /// Nothing more will be read.
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
