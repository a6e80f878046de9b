//! Maps positions of this journal to revisions of etcd.
//!
//! Every replica has its own order of purges: a purge that was accepted while etcd was away has a position here long before
//! it has a revision there. So an entry has a position and, once it is in etcd, a revision, and replicas exchange revisions.
//! The two orders agree as long as etcd answers; the map is for when they do not.
//!
//! Both translations of a cursor err on the low side, because a cursor that is too low only replays more.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::{EntryOrigin, Position};

/// The names and revisions of the held entries.
#[derive(Debug, Default)]
pub(super) struct PositionMap {
    rows: BTreeMap<Position, MappedEntry>,
    positions: HashMap<Arc<str>, Position>,
    /// Purges that are no longer held, and may still be in etcd.
    trimmed: HashSet<Arc<str>>,
    /// The highest known revision of a purge.
    newest: u64,
    /// The highest revision of a purge that is no longer held.
    retired: u64,
    /// Everything up to this revision has arrived by the watch.
    synced: u64,
    /// `synced` as persisted by an earlier process.
    seen: u64,
    /// No entry up to here is held.
    floor: Position,
    /// The number of purges that were dropped before they were in etcd, and are not replaced there yet.
    overflowed: u64,
}

#[derive(Debug)]
struct MappedEntry {
    id: Arc<str>,
    revision: Option<u64>,
}

impl PositionMap {
    /// The map of a journal that was read from disk, which has everything up to the revision `seen`.
    pub(super) fn new(
        rows: impl IntoIterator<Item = (Position, Arc<str>, Option<u64>)>,
        newest: u64,
        seen: u64,
    ) -> Self {
        let mut position_map = PositionMap { newest, seen, ..PositionMap::default() };
        rows.into_iter().for_each(|(position, id, revision)| position_map.enter(position, &id, revision));
        position_map
    }

    /// Adds an entry.
    pub(super) fn enter(&mut self, position: Position, id: &Arc<str>, revision: Option<u64>) {
        self.newest = self.newest.max(revision.unwrap_or(0));
        self.positions.insert(Arc::clone(id), position);
        self.rows.insert(position, MappedEntry { id: Arc::clone(id), revision });
    }

    /// The position of a purge, if it is held.
    pub(super) fn position(&self, id: &str) -> Option<Position> {
        self.positions.get(id).copied()
    }

    /// The name of a held purge.
    pub(super) fn name(&self, position: Position) -> Option<Arc<str>> {
        Some(Arc::clone(&self.rows.get(&position)?.id))
    }

    /// The revision of a held purge.
    pub(super) fn revision(&self, position: Position) -> Option<u64> {
        self.rows.get(&position)?.revision
    }

    /// Sets the revision of a purge; `None` if it is not in etcd. Returns whether that has changed.
    pub(super) fn set_revision(&mut self, position: Position, revision: Option<u64>) -> bool {
        let Some(row) = self.rows.get_mut(&position).filter(|row| row.revision != revision) else { return false };
        row.revision = revision;
        self.newest = self.newest.max(revision.unwrap_or(0));
        true
    }

    /// The highest known revision of a purge.
    pub(super) fn newest(&self) -> u64 {
        self.newest
    }

    /// The revision up to which no purge was missed. A purge that arrived in an answer, or from another replica, says
    /// nothing about those before it.
    pub(super) fn seen(&self) -> u64 {
        self.seen.max(self.synced)
    }

    /// Whether a purge was held and then dropped.
    pub(super) fn was_held(&self, id: &str) -> bool {
        self.trimmed.contains(id)
    }

    /// At most `most` dropped purges that may still be in etcd, and the revision up to which none is held.
    pub(super) fn retired(&self, most: usize) -> (Vec<Arc<str>>, u64) {
        (self.trimmed.iter().take(most).cloned().collect(), self.retired)
    }

    /// Records that a dropped purge is not in etcd any more, so it cannot arrive again.
    pub(super) fn forget_one(&mut self, id: &str) {
        self.trimmed.remove(id);
    }

    /// The same for all purges that are gone from etcd.
    pub(super) fn forget(&mut self, is_gone: impl Fn(&str) -> bool) {
        self.trimmed.retain(|id| !is_gone(id));
    }

    /// Records that everything up to this revision has arrived.
    pub(super) fn set_synced(&mut self, revision: u64) {
        self.synced = self.synced.max(revision);
    }

    /// Begins another history of etcd, known up to `revision`, with purges up to `newest`.
    pub(super) fn restart(&mut self, revision: u64, newest: u64) {
        (self.synced, self.seen, self.newest, self.retired) = (revision, 0, newest, 0);
    }

    /// Records that purges up to this revision were deleted from etcd.
    pub(super) fn record_deletions(&mut self, floor: u64) {
        self.retired = self.retired.max(floor);
        self.newest = self.newest.max(floor);
    }

    /// Drops the entries up to this position.
    pub(super) fn trim(&mut self, floor: Position) {
        self.floor = self.floor.max(floor);
        while let Some(oldest) = self.rows.first_entry().filter(|oldest| *oldest.key() <= floor) {
            let row = oldest.remove();
            self.positions.remove(&row.id);
            match row.revision {
                Some(revision) => {
                    self.retired = self.retired.max(revision);
                    self.trimmed.insert(row.id);
                }
                None => self.overflowed += 1,
            }
        }
    }

    /// The held purges that are not in etcd, in order.
    pub(super) fn missing(&self) -> Vec<(Position, Arc<str>)> {
        let missing = self.rows.iter().filter(|(_, row)| row.revision.is_none());
        missing.map(|(position, row)| (*position, Arc::clone(&row.id))).collect()
    }

    /// Whether there are held purges that are not in etcd.
    pub(super) fn has_missing(&self) -> bool {
        self.rows.values().any(|row| row.revision.is_none())
    }

    /// The held purges that should be listed but are not, because a backup from before them was restored. `floor` is the
    /// last revision that was deleted.
    pub(super) fn lost(&self, listed: &HashSet<&str>, revision: u64, floor: u64, restored: bool) -> Vec<Position> {
        let is_lost = |row: &MappedEntry| {
            let expected = row.revision.is_some_and(|own| restored || (own <= revision && own > floor));
            expected && !listed.contains(&*row.id)
        };
        self.rows.iter().filter(|(_, row)| is_lost(row)).map(|(position, _)| *position).collect()
    }

    /// The number of purges that were dropped before they were in etcd, and are not replaced there yet.
    pub(super) fn overflow(&self) -> u64 {
        self.overflowed
    }

    /// Whether there are any, or will be once entries up to this position are dropped.
    pub(super) fn overflows_at(&self, floor: Position) -> bool {
        self.overflowed > 0 || self.rows.range(..=floor).any(|(_, row)| row.revision.is_none())
    }

    /// Records that an earlier process dropped one that is not replaced yet.
    pub(super) fn record_earlier_overflow(&mut self) {
        self.overflowed += 1;
    }

    /// Records that a purge at this revision of etcd replaces this number of them.
    pub(super) fn clear_overflow(&mut self, count: u64, revision: u64) {
        self.overflowed = self.overflowed.saturating_sub(count);
        self.retired = self.retired.max(revision);
    }

    /// Translates a cursor into a revision: the highest revision R such that a node at `cursor` has every purge up to R.
    /// Returns 0 for a cursor below `floor`, because the revisions of the dropped entries are unknown.
    pub(super) fn covered(&self, cursor: Position) -> u64 {
        if cursor < self.floor {
            return 0;
        }
        let missed = self.rows.range(cursor + 1..).filter_map(|(_, row)| row.revision).min();
        missed.map_or(self.synced, |missed| self.synced.min(missed.saturating_sub(1)))
    }

    /// The inverse of `covered`: the highest position that a node at etcd revision `revision` is known to have; the journal
    /// ends at `head`. `None` if dropped entries make that unknowable.
    pub(super) fn covering(&self, revision: u64, head: Position) -> Option<Position> {
        if revision < self.retired || self.overflowed > 0 {
            return None;
        }
        let missed = self.rows.iter().find(|(_, row)| row.revision.is_none_or(|own| own > revision));
        Some(missed.map_or(head, |(position, _)| position - 1))
    }
}

/// The position of an entry after `head`: its revision if that is higher.
pub(super) fn next_position(head: Position, origin: Option<&EntryOrigin>) -> Position {
    origin.and_then(|origin| origin.revision).unwrap_or(0).max(head + 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn position_map(rows: &[(Position, &str, Option<u64>)]) -> PositionMap {
        PositionMap::new(rows.iter().map(|&(position, id, revision)| (position, Arc::from(id), revision)), 0, 0)
    }

    #[test]
    fn in_step_with_etcd_a_position_is_a_revision_and_back() {
        let mut position_map = position_map(&[(5, "a", Some(5)), (9, "b", Some(9))]);
        position_map.set_synced(12);
        assert_eq!([4, 5, 8, 9].map(|cursor| position_map.covered(cursor)), [4, 8, 8, 12]);
        assert_eq!([4, 5, 8, 9, 12].map(|revision| position_map.covering(revision, 9)), [4, 8, 8, 9, 9].map(Some));
    }

    #[test]
    fn what_the_watch_has_not_brought_yet_is_not_claimed() {
        // Ours is known by its answer; an earlier purge of another replica may not have arrived yet.
        let mut position_map = position_map(&[(5, "a", Some(5)), (9, "ours", Some(9))]);
        position_map.set_synced(6);
        assert_eq!(position_map.covered(9), 6);
    }

    #[test]
    fn a_purge_that_is_in_no_etcd_yet_ends_what_a_revision_covers() {
        let mut position_map = position_map(&[(5, "a", Some(5)), (6, "spooled", None), (9, "b", Some(9))]);
        position_map.set_synced(9);
        assert_eq!(position_map.covering(9, 9), Some(5));
        assert_eq!(position_map.covered(6), 8);
        assert_eq!(position_map.missing(), [(6, Arc::from("spooled"))]);
        assert!(position_map.set_revision(6, Some(10)) && !position_map.set_revision(6, Some(10)));
        // A node with everything up to 9 in etcd's order does not have it.
        assert_eq!((position_map.covering(9, 9), position_map.covering(10, 9)), (Some(5), Some(9)));
        // A node with everything up to 6 in our order misses `b`.
        assert_eq!(position_map.covered(6), 8);
    }

    #[test]
    fn a_revision_from_before_what_is_held_covers_nothing() {
        let mut position_map = position_map(&[(5, "a", Some(5)), (9, "b", Some(9))]);
        position_map.trim(5);
        assert_eq!((position_map.covering(4, 9), position_map.covering(5, 9)), (None, Some(8)));
        assert_eq!(position_map.position("a"), None);
        assert!(position_map.was_held("a") && !position_map.was_held("b"));
        position_map.forget(|id| id == "a");
        assert!(!position_map.was_held("a"));
        position_map.record_deletions(20);
        assert_eq!(position_map.covering(19, 9), None);
        assert_eq!(position_map.overflow(), 0);
    }

    #[test]
    fn of_a_node_that_misses_what_is_not_held_any_more_nothing_is_said() {
        let mut position_map = position_map(&[(5, "a", Some(5)), (9, "b", Some(9)), (12, "c", Some(12))]);
        position_map.set_synced(12);
        assert_eq!(position_map.covered(4), 4);
        position_map.trim(9);
        // It has neither `a` nor `b`, and their revisions are unknown here.
        assert_eq!([4, 8, 9, 12].map(|cursor| position_map.covered(cursor)), [0, 0, 11, 12]);
    }

    #[test]
    fn a_purge_that_is_dropped_before_it_is_in_etcd_is_not_forgotten_silently() {
        let mut position_map = position_map(&[(5, "a", None), (6, "b", Some(6))]);
        assert!(position_map.overflows_at(5) && !position_map.overflows_at(4));
        position_map.trim(5);
        // Whatever a node has in etcd's order, it may miss that one.
        assert_eq!((position_map.overflow(), position_map.covering(6, 6)), (1, None));
        position_map.clear_overflow(1, 7);
        assert_eq!(
            (position_map.overflow(), position_map.covering(6, 6), position_map.covering(7, 6)),
            (0, None, Some(6))
        );
    }

    #[test]
    fn what_comes_by_an_answer_says_nothing_about_the_purges_before_it() {
        let mut position_map = position_map(&[(5, "a", Some(5)), (9, "told", Some(9))]);
        position_map.set_synced(6);
        assert_eq!((position_map.newest(), position_map.seen()), (9, 6));
    }

    #[test]
    fn what_a_restored_etcd_has_lost_is_told_from_what_it_has_retired() {
        let position_map =
            position_map(&[(3, "old", Some(3)), (5, "there", Some(5)), (7, "lost", Some(7)), (8, "new", Some(8))]);
        let listed = HashSet::from(["there"]);
        assert_eq!(position_map.lost(&listed, 7, 4, false), [7]);
        assert_eq!(position_map.lost(&listed, 5, 4, true), [3, 7, 8]);
    }

    proptest! {
        /// For any two orders of the same purges: a cursor that goes to another replica and comes back claims no purge
        /// that it did not have.
        #[test]
        fn a_translated_cursor_never_claims_more(
            rows in proptest::collection::vec(proptest::option::of(1_u64..40), 1..20),
            cursor in 0_u64..24,
            synced in 0_u64..45,
        ) {
            let mut seen = HashSet::new();
            let rows: Vec<(Position, Arc<str>, Option<u64>)> = rows.into_iter().enumerate()
                .filter(|(_, revision)| revision.is_none_or(|revision| seen.insert(revision)))
                .map(|(index, revision)| (index as u64 + 1, Arc::from(format!("{index}")), revision)).collect();
            let mut position_map = PositionMap::new(rows.clone(), 0, 0);
            position_map.set_synced(synced);
            let had = |position: u64| position <= cursor;
            let covered = position_map.covered(cursor);
            for (position, _, revision) in &rows {
                prop_assert!(had(*position) || revision.is_none_or(|revision| revision > covered));
            }
            let head = rows.last().map_or(0, |row| row.0);
            let back = position_map.covering(covered, head).unwrap();
            for (position, _, revision) in &rows {
                // Each purge up to `back` was covered by its revision.
                prop_assert!(*position > back || revision.is_some_and(|revision| revision <= covered));
            }
        }
    }
}
