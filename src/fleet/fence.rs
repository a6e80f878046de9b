//! The fence: which Varnish nodes may serve.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Live;

/// The highest journal position whose purge has been answered to its sender, in this process or before it.
///
/// A Varnish whose cursor is below is *behind*: it could still hold a page whose purge was answered, so it gets no
/// client traffic. The promise rests on the order: the fence rises **before** the answer to a purge is written, and a
/// request reads it **after** it has arrived, so no request that follows an answer can miss it.
#[derive(Debug, Default)]
pub struct Fence(AtomicU64);

impl Fence {
    /// A fence at `position`: at start, everything in the journal counts as answered.
    pub fn at(position: u64) -> Self {
        Fence(AtomicU64::new(position))
    }

    /// The position that every serving Varnish must have reached.
    pub fn position(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    /// Raises the fence before the purge at `position` is answered. Never lowers it. Returns the old position: a node
    /// behind the new one but not the old fell behind with this purge.
    pub fn raise(&self, position: u64) -> u64 {
        self.0.fetch_max(position, Ordering::SeqCst)
    }

    /// Whether this Varnish has every purge that was answered as done.
    pub fn is_current(&self, node: &Live) -> bool {
        node.cursor() >= self.position()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_behind_until_its_cursor_reaches_what_was_answered() {
        let fence = Fence::at(3);
        let node = Live::default();
        assert!(!fence.is_current(&node));
        node.set_cursor(3);
        assert!(fence.is_current(&node));
        fence.raise(5);
        assert!(!fence.is_current(&node));
    }

    #[test]
    fn an_older_answer_does_not_lower_the_fence() {
        let fence = Fence::at(5);
        fence.raise(4);
        assert_eq!(fence.position(), 5);
    }
}
