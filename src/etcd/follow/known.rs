//! The position of a watch, and the effect of a response on it. Pure: no connection, no clock.

use super::super::{EtcdError, RaftPosition};
use super::{KeyChange, PAGE, Resync};

/// The maximum backlog of a new watch: a longer one holds up etcd's writes while it catches up (etcd-io/etcd#22264); a list
/// does not.
const FAR_BEHIND: i64 = 50_000;

/// The watch id of requested progress notifications, which belong to no watch.
const ASKED_FOR: i64 = -1;

/// The revision up to which everything is known, with its history.
#[derive(Clone, Copy, Debug)]
pub(super) struct WatchPosition {
    pub(super) position: RaftPosition,
    pub(super) revision: i64,
    /// The number of keys in the last list.
    pub(super) keys: usize,
}

/// The relevant part of a watch response.
#[derive(Debug)]
pub(super) struct WatchMessage {
    /// etcd's revision in the header.
    pub(super) at: Option<i64>,
    pub(super) watch: i64,
    pub(super) content: WatchContent,
}

/// The content of a response.
#[derive(Debug)]
pub(super) enum WatchContent {
    /// The watch has ended. `is_compacted`: its start is compacted.
    Cancelled { is_compacted: bool, reason: String },
    /// The watch has begun.
    Created,
    /// The changes; empty in a progress notification.
    Changes(Vec<KeyChange>),
}

/// The effect of a response.
#[derive(Debug)]
pub(super) enum WatchOutcome {
    /// The watch must continue on another connection.
    Failed(EtcdError),
    /// The keys must be listed again.
    Relist(Resync),
    /// The watch has begun at the requested revision.
    Created,
    /// New changes, if any.
    Changes(Vec<KeyChange>),
}

impl WatchPosition {
    /// Whether a new connection to a member at this position must begin with a list, and why.
    ///
    /// Keys that fit on one page are always listed again: that costs no more than any request, and it is the only sign of a
    /// restore after which etcd has reached the same revision again.
    pub(super) fn relist(known: Option<&WatchPosition>, position: &RaftPosition) -> Option<Resync> {
        match known {
            None => Some(Resync::Start),
            Some(known) if position.goes_back_behind(&known.position) => Some(Resync::Restored),
            Some(known) if known.keys <= PAGE as usize => Some(Resync::Reconnected),
            Some(_) => None,
        }
    }

    /// Applies a response. `expected` is the highest revision seen by this process, `position` that of the member.
    pub(super) fn take(&mut self, response: WatchMessage, expected: i64, position: RaftPosition) -> WatchOutcome {
        let at = response.at.unwrap_or(self.revision);
        match response.content {
            WatchContent::Cancelled { is_compacted: false, reason } => {
                WatchOutcome::Failed(EtcdError::Cancelled(reason))
            }
            WatchContent::Cancelled { .. } => WatchOutcome::Relist(Resync::Compacted),
            // May also be a lagging member; the following list comes from the leader and settles it.
            WatchContent::Created if at < self.revision.max(expected) => WatchOutcome::Relist(Resync::Restored),
            WatchContent::Created if at - self.revision > FAR_BEHIND => WatchOutcome::Relist(Resync::FarBehind),
            WatchContent::Created => {
                self.position = position;
                WatchOutcome::Created
            }
            WatchContent::Changes(mut changes) => {
                let is_progress = changes.is_empty() && response.watch != ASKED_FOR;
                // A lagging member sends old events again (etcd-io/etcd#20221).
                changes.retain(|change| change.revision() > self.revision);
                let last = changes.iter().map(KeyChange::revision).max();
                let moved = last.or(is_progress.then_some(at)).unwrap_or(self.revision);
                self.revision = self.revision.max(moved);
                WatchOutcome::Changes(changes)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POSITION: RaftPosition = RaftPosition { cluster: 1, term: 2, index: 100 };

    fn known(revision: i64) -> WatchPosition {
        WatchPosition { position: POSITION, revision, keys: 3 }
    }

    fn response(at: i64, watch: i64, content: WatchContent) -> WatchMessage {
        WatchMessage { at: Some(at), watch, content }
    }

    fn deleted(revision: i64) -> KeyChange {
        KeyChange::Deleted { key: "a".to_owned(), revision }
    }

    fn changes(heard: WatchOutcome) -> Vec<i64> {
        match heard {
            WatchOutcome::Changes(changes) => changes.iter().map(KeyChange::revision).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn progress_moves_the_revision_unless_it_was_asked_for() {
        let mut known = known(10);
        known.take(response(50, ASKED_FOR, WatchContent::Changes(vec![])), 0, POSITION);
        assert_eq!(known.revision, 10, "an answer may overtake events");
        // Events that come after it are not old ones.
        let events = WatchContent::Changes(vec![deleted(20)]);
        assert_eq!(changes(known.take(response(50, 0, events), 0, POSITION)), [20]);
        assert_eq!(known.revision, 20, "the header names etcd's newest revision, not that of the events");
        known.take(response(50, 0, WatchContent::Changes(vec![])), 0, POSITION);
        assert_eq!(known.revision, 50);
    }

    #[test]
    fn old_events_of_a_member_that_lags_are_dropped_and_move_nothing() {
        let mut known = known(10);
        let events = WatchContent::Changes(vec![deleted(9), deleted(10), deleted(11)]);
        assert_eq!(changes(known.take(response(11, 0, events), 0, POSITION)), [11]);
        let events = WatchContent::Changes(vec![deleted(4), deleted(11)]);
        assert_eq!(changes(known.take(response(60, 0, events), 0, POSITION)), [0; 0]);
        assert_eq!(known.revision, 11, "old events are no notice of progress");
        known.take(response(5, 0, WatchContent::Changes(vec![])), 0, POSITION);
        assert_eq!(known.revision, 11);
    }

    #[test]
    fn a_watch_that_would_begin_far_behind_is_a_list_instead() {
        let created = |at| known(10).take(response(at, 0, WatchContent::Created), 0, POSITION);
        assert!(matches!(created(10 + FAR_BEHIND), WatchOutcome::Created));
        assert!(matches!(created(11 + FAR_BEHIND), WatchOutcome::Relist(Resync::FarBehind)));
    }

    #[test]
    fn a_history_that_ends_before_what_anybody_was_told_is_another_one() {
        let created = |at, expected| known(10).take(response(at, 0, WatchContent::Created), expected, POSITION);
        assert!(matches!(created(9, 0), WatchOutcome::Relist(Resync::Restored)));
        assert!(matches!(created(10, 0), WatchOutcome::Created));
        assert!(matches!(created(10, 11), WatchOutcome::Relist(Resync::Restored)));
    }

    #[test]
    fn what_etcd_has_forgotten_is_listed_and_any_other_end_is_a_failure() {
        let cancelled = |is_compacted| {
            known(10).take(response(99, 0, WatchContent::Cancelled { is_compacted, reason: "so".into() }), 0, POSITION)
        };
        assert!(matches!(cancelled(true), WatchOutcome::Relist(Resync::Compacted)));
        assert!(matches!(cancelled(false), WatchOutcome::Failed(EtcdError::Cancelled(reason)) if reason == "so"));
    }

    #[test]
    fn a_new_connection_lists_what_fits_on_a_page_and_resumes_what_does_not() {
        let many = WatchPosition { keys: PAGE as usize + 1, ..known(10) };
        assert_eq!(WatchPosition::relist(None, &POSITION), Some(Resync::Start));
        assert_eq!(WatchPosition::relist(Some(&known(10)), &POSITION), Some(Resync::Reconnected));
        assert_eq!(WatchPosition::relist(Some(&many), &POSITION), None);
        for other in [
            RaftPosition { cluster: 2, ..POSITION },
            RaftPosition { term: 1, ..POSITION },
            RaftPosition { index: 99, ..POSITION },
        ] {
            assert_eq!(WatchPosition::relist(Some(&many), &other), Some(Resync::Restored), "{other:?}");
        }
    }
}
