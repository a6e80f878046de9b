//! The fence: which Varnish nodes may serve.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Live;

/// The highest journal positions whose purges have been answered to their senders, in this process or before it.
///
/// A Varnish whose cursor is below is *behind*: it could still hold a page whose purge was answered, so it gets no
/// client traffic. One that [seals](super::SealStanding::is_sealing) need not have the purges that a seal shows: each of its answers is
/// judged. So there are two positions, of all purges and of those that no seal shows. The promise rests on the order: the fence rises **before** the answer to a purge is written, and a
/// request reads it **after** it has arrived, so no request that follows an answer can miss it.
#[derive(Debug, Default)]
pub struct Fence {
    answered: AtomicU64,
    unsealed: AtomicU64,
}

impl Fence {
    /// A fence at `position`: at start, everything in the journal counts as answered.
    pub fn at(position: u64) -> Self {
        Fence { answered: AtomicU64::new(position), unsealed: AtomicU64::new(position) }
    }

    /// The position of the last purge that was answered.
    pub fn position(&self) -> u64 {
        self.answered.load(Ordering::SeqCst)
    }

    /// Raises the fence before the purge at `position` is answered. Never lowers it. Returns the old position: a node
    /// behind the new one but not the old fell behind with this purge.
    pub fn raise(&self, position: u64) -> u64 {
        self.unsealed.fetch_max(position, Ordering::SeqCst);
        self.answered.fetch_max(position, Ordering::SeqCst)
    }

    /// The same for a purge that a seal shows.
    pub fn raise_sealed(&self, position: u64) -> u64 {
        self.answered.fetch_max(position, Ordering::SeqCst)
    }

    /// The position of the last purge that was answered and that no seal shows.
    pub fn unsealed_position(&self) -> u64 {
        self.unsealed.load(Ordering::SeqCst)
    }

    /// The position that this Varnish must have reached to serve.
    pub fn required_of(&self, node: &Live) -> u64 {
        let position = if node.seals.is_sealing() { &self.unsealed } else { &self.answered };
        position.load(Ordering::SeqCst)
    }

    /// Whether this Varnish may serve.
    pub fn admits(&self, node: &Live) -> bool {
        node.cursor() >= self.required_of(node) && !node.must_be_flushed()
    }

    /// Whether this Varnish has every purge that was answered as done.
    pub fn is_current(&self, node: &Live) -> bool {
        node.cursor() >= self.position()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{Reliance, SealsShown};

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
    fn a_node_that_seals_may_miss_what_a_seal_shows_and_no_other_purge() {
        let (fence, node) = (Fence::at(3), Live::default());
        node.set_cursor(3);
        fence.raise_sealed(5);
        assert!(!fence.admits(&node) && !fence.is_current(&node));
        node.seals.record_trial(SealsShown::Returned);
        assert!(!fence.admits(&node), "what it stored before it did");
        node.seals.record_emptied(node.seals.doubts());
        assert!(fence.admits(&node) && !fence.is_current(&node));
        fence.raise(4);
        assert!(!fence.admits(&node));
        node.set_cursor(4);
        assert_eq!((fence.admits(&node), fence.position()), (true, 5));
    }

    #[test]
    fn a_cache_that_relies_on_seals_does_not_serve_when_none_are_returned() {
        let (fence, node) = (Fence::at(3), Live::default());
        node.set_cursor(3);
        for (reliance, [unknown, returns, returns_none]) in [
            (Reliance::No, [true, true, true]),
            (Reliance::OnSeals, [true, true, false]),
            (Reliance::OwesFlush, [false, false, false]),
        ] {
            let node = Live::default();
            node.set_cursor(3);
            node.set_reliance(reliance);
            assert_eq!(fence.admits(&node), unknown, "{reliance:?}");
            node.seals.record_trial(SealsShown::Returned);
            assert_eq!(fence.admits(&node), returns, "{reliance:?}");
            node.seals.record_trial(SealsShown::NotReturned);
            assert_eq!(fence.admits(&node), returns_none, "{reliance:?}");
            assert!(fence.is_current(&node));
        }
    }

    #[test]
    fn an_older_answer_does_not_lower_the_fence() {
        let fence = Fence::at(5);
        fence.raise(4);
        assert_eq!(fence.position(), 5);
    }
}
