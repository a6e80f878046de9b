//! The registered nodes as last seen in etcd. Pure: the caller acts on the changes.
//!
//! **One code path.** A list and an event go through the same [`Roster::apply`]; a list also means that every other key
//! is gone. With two code paths, a bug in one of them would show only after a reconnection, on a single replica.
//!
//! **The last good value stays.** An unreadable value is a recent mistake; the node registered before it is as healthy
//! as ever. So a key keeps its last readable record, and a key that never had one is ignored.
//!
//! **How a node left** follows from the last state of its key: a node in state `drain`, or without a lease, was removed
//! on purpose; for any other the lease decides ([`super::lease`]).

use std::collections::{BTreeMap, BTreeSet};

use xxhash_rust::xxh3::xxh3_64;

use super::record::NodeRecord;
use crate::etcd::LeaseId;
use crate::etcd::follow::{KeyChange, KeyEntry};
use crate::fleet::{NodeId, Role, node_key};

/// The keys below `nodes/`.
#[derive(Debug, Default)]
pub(super) struct Roster {
    keys: BTreeMap<String, KnownKey>,
    /// The revision of the last deletion: an older change to a missing key is ignored.
    last_deletion: i64,
}

/// One key.
#[derive(Debug, Default)]
struct KnownKey {
    /// The revision of the last write.
    revision: i64,
    /// The lease that the key is attached to, if any.
    lease: Option<LeaseId>,
    /// The hash of its value, so that an unchanged value is not parsed again.
    fingerprint: u64,
    /// The last readable value.
    record: Option<NodeRecord>,
}

/// The meaning of a change.
#[derive(Debug, PartialEq)]
pub(super) enum RosterChange {
    /// The node is there, with this record.
    Registered(Registered),
    /// The node is not there any more.
    Gone(Departure),
    /// A key or a value that cannot be read, and why. The last good record stays.
    Rejected(String, String),
}

/// A node that is there.
#[derive(Debug, PartialEq)]
pub(super) struct Registered {
    pub(super) key: String,
    pub(super) role: Role,
    pub(super) id: NodeId,
    pub(super) record: NodeRecord,
    /// Unknown fields of its record.
    pub(super) unknown: Vec<String>,
}

/// A node that is not there any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Departure {
    pub(super) key: String,
    pub(super) role: Role,
    pub(super) id: NodeId,
    /// The lease that its key had, if it had one.
    pub(super) lease: Option<LeaseId>,
    /// It had announced that it was about to leave.
    pub(super) drained: bool,
}

impl Roster {
    /// Applies a whole list. A key that was known before and is not in it is gone.
    pub(super) fn list(&mut self, items: Vec<KeyEntry>, revision: i64) -> Vec<RosterChange> {
        // The list may be from a restored etcd, whose revisions are lower.
        self.last_deletion = 0;
        self.keys.values_mut().for_each(|known| known.revision = 0);
        let listed: BTreeSet<String> = items.iter().map(|item| item.key.clone()).collect();
        let gone: Vec<String> = self.keys.keys().filter(|key| !listed.contains(*key)).cloned().collect();
        let gone = gone.into_iter().map(|key| KeyChange::Deleted { key, revision });
        let changes = items.into_iter().map(KeyChange::Put).chain(gone);
        changes.filter_map(|change| self.apply(&change)).collect()
    }

    /// Applies one change. `None` if nothing relevant changes.
    pub(super) fn apply(&mut self, change: &KeyChange) -> Option<RosterChange> {
        match change {
            KeyChange::Put(item) => self.put(item),
            KeyChange::Deleted { key, revision } => self.delete(key, *revision),
        }
    }

    fn put(&mut self, item: &KeyEntry) -> Option<RosterChange> {
        let known = self.keys.get(&item.key);
        // A member that lags sends old events again (etcd-io/etcd#20221).
        let is_old = known.map_or(item.revision < self.last_deletion, |known| item.revision <= known.revision);
        if is_old {
            return None;
        }
        let known = self.keys.entry(item.key.clone()).or_default();
        (known.revision, known.lease) = (item.revision, item.lease);
        let fingerprint = xxh3_64(&item.value);
        if std::mem::replace(&mut known.fingerprint, fingerprint) == fingerprint {
            return None;
        }
        let parsed = node_key(&item.key)
            .map_err(|error| error.to_string())
            .and_then(|(role, id)| Ok((role, id, NodeRecord::parse(role, &item.value)?)));
        Some(match parsed {
            Ok((role, id, (record, unknown))) => {
                known.record = Some(record.clone());
                RosterChange::Registered(Registered { key: item.key.clone(), role, id, record, unknown })
            }
            Err(reason) => RosterChange::Rejected(item.key.clone(), reason),
        })
    }

    fn delete(&mut self, key: &str, revision: i64) -> Option<RosterChange> {
        if self.keys.get(key).is_some_and(|known| revision < known.revision) {
            return None;
        }
        self.last_deletion = self.last_deletion.max(revision);
        let known = self.keys.remove(key)?;
        let (record, (role, id)) = (known.record?, node_key(key).ok()?);
        let (lease, drained) = (known.lease, record.drain);
        Some(RosterChange::Gone(Departure { key: key.to_owned(), role, id, lease, drained }))
    }

    /// Restores a key from before the process started. The first list updates or removes it.
    pub(super) fn restore(&mut self, key: String, lease: Option<LeaseId>, record: NodeRecord) {
        self.keys.insert(key, KnownKey { lease, record: Some(record), ..KnownKey::default() });
    }

    /// The last good record of one node.
    pub(super) fn record(&self, key: &str) -> Option<&NodeRecord> {
        self.keys.get(key)?.record.as_ref()
    }

    /// The registered nodes: their keys, leases and records.
    pub(super) fn nodes(&self) -> impl Iterator<Item = (&str, Option<LeaseId>, &NodeRecord)> {
        self.keys.iter().filter_map(|(key, known)| Some((key.as_str(), known.lease, known.record.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn item(key: &str, value: &str, lease: i64, revision: i64) -> KeyEntry {
        let lease = LeaseId::new(lease);
        KeyEntry { key: key.to_owned(), value: value.as_bytes().to_vec(), lease, revision, created: revision }
    }

    fn put(roster: &mut Roster, key: &str, value: &str, revision: i64) -> Option<RosterChange> {
        roster.apply(&KeyChange::Put(item(key, value, 0, revision)))
    }

    fn delete(roster: &mut Roster, key: &str, revision: i64) -> Option<RosterChange> {
        roster.apply(&KeyChange::Deleted { key: key.to_owned(), revision })
    }

    fn addresses(roster: &Roster) -> Vec<(String, String)> {
        roster.nodes().map(|(key, _, record)| (key.to_owned(), record.address.clone())).collect()
    }

    fn departure(step: &Option<RosterChange>) -> Option<(i64, bool)> {
        let Some(RosterChange::Gone(Departure { lease, drained, .. })) = step else { return None };
        Some((lease.map_or(0, LeaseId::get), *drained))
    }

    #[test]
    fn a_value_that_cannot_be_read_leaves_the_last_good_one() {
        let mut roster = Roster::default();
        assert!(matches!(put(&mut roster, "web/a", "nonsense", 1), Some(RosterChange::Rejected(..))));
        assert_eq!(addresses(&roster), []);
        put(&mut roster, "web/a", "10.0.0.5:80", 2);
        let Some(RosterChange::Rejected(key, reason)) = put(&mut roster, "web/a", "nonsense", 3) else { panic!() };
        assert!(key == "web/a" && reason.contains("`nonsense`"), "{key} {reason}");
        assert_eq!(addresses(&roster), [("web/a".to_owned(), "10.0.0.5:80".to_owned())]);
        // It is reported once, even if it is listed again.
        assert_eq!(roster.list(vec![item("web/a", "nonsense", 0, 3)], 9), []);
        // And when the key goes, so does the node.
        assert!(matches!(delete(&mut roster, "web/a", 10), Some(RosterChange::Gone(_))));
    }

    #[test]
    fn a_key_that_is_no_node_is_reported_and_nothing_else() {
        let mut roster = Roster::default();
        for key in ["a", "web", "web/", "web/a b", "web/a/b", "varnishes/a", "WEB/a", "/web/a", ""] {
            assert!(matches!(put(&mut roster, key, "10.0.0.5:80", 1), Some(RosterChange::Rejected(..))), "{key}");
            assert_eq!(delete(&mut roster, key, 2), None, "{key}");
            roster = Roster::default();
        }
    }

    #[test]
    fn how_a_node_went_is_told_by_what_was_known_of_its_key() {
        let mut roster = Roster::default();
        put(&mut roster, "web/a", "10.0.0.5:80", 1);
        assert_eq!(departure(&delete(&mut roster, "web/a", 2)), Some((0, false)));
        roster.apply(&KeyChange::Put(item("web/a", "10.0.0.5:80", 7, 3)));
        assert_eq!(departure(&delete(&mut roster, "web/a", 4)), Some((7, false)));
        // The same value with another lease: an agent that has lost its first one.
        roster.apply(&KeyChange::Put(item("web/a", "10.0.0.5:80", 7, 5)));
        assert_eq!(roster.apply(&KeyChange::Put(item("web/a", "10.0.0.5:80", 8, 6))), None);
        assert_eq!(departure(&delete(&mut roster, "web/a", 7)), Some((8, false)));
        put(&mut roster, "web/a", r#"{"address":"10.0.0.5:80","state":"drain"}"#, 8);
        assert_eq!(departure(&delete(&mut roster, "web/a", 9)), Some((0, true)));
        // A node with weight 0 has not announced that it leaves.
        put(&mut roster, "web/a", r#"{"address":"10.0.0.5:80","weight":0}"#, 10);
        assert_eq!(departure(&delete(&mut roster, "web/a", 11)), Some((0, false)));
    }

    #[test]
    fn old_news_are_none() {
        let mut roster = Roster::default();
        put(&mut roster, "web/a", "10.0.0.5:80", 5);
        assert_eq!(put(&mut roster, "web/a", "10.0.0.4:80", 4), None);
        assert_eq!(delete(&mut roster, "web/a", 4), None);
        delete(&mut roster, "web/a", 6);
        assert_eq!(put(&mut roster, "web/a", "10.0.0.5:80", 5), None);
        assert_eq!(addresses(&roster), []);
        assert!(put(&mut roster, "web/a", "10.0.0.5:80", 7).is_some());
        // A list is always current, however low its revision: etcd was restored.
        let steps = roster.list(vec![item("web/b", "10.0.0.6:80", 0, 2)], 3);
        assert_eq!(steps.len(), 2, "{steps:?}");
        assert!(put(&mut roster, "web/c", "10.0.0.7:80", 4).is_some());
    }

    #[test]
    fn what_was_there_before_the_process_is_compared_with_the_first_list() {
        let mut roster = Roster::default();
        let record = |address: &str| NodeRecord::parse(Role::Web, address.as_bytes()).unwrap().0;
        roster.restore("web/a".to_owned(), LeaseId::new(7), record("10.0.0.5:80"));
        roster.restore("web/b".to_owned(), LeaseId::new(8), record("10.0.0.6:80"));
        let steps = roster.list(vec![item("web/a", "10.0.0.5:80", 7, 3), item("web/c", "10.0.0.7:80", 0, 4)], 9);
        let gone = steps.iter().filter_map(|step| if let RosterChange::Gone(gone) = step { Some(gone) } else { None });
        assert_eq!(gone.map(|gone| (gone.key.as_str(), gone.lease)).collect::<Vec<_>>(), [("web/b", LeaseId::new(8))]);
        assert_eq!(addresses(&roster).len(), 2);
    }

    /// A model of etcd: its content, and the changes to it.
    #[derive(Default)]
    struct Model {
        revision: i64,
        keys: BTreeMap<String, KeyEntry>,
    }

    impl Model {
        fn change(&mut self, key: &str, value: Option<&str>) -> Option<KeyChange> {
            self.revision += 1;
            let (key, revision) = (key.to_owned(), self.revision);
            let Some(value) = value else {
                return self.keys.remove(&key).map(|_| KeyChange::Deleted { key, revision });
            };
            let item = item(&key, value, 0, revision);
            self.keys.insert(key, item.clone());
            Some(KeyChange::Put(item))
        }

        fn items(&self) -> Vec<KeyEntry> {
            self.keys.values().cloned().collect()
        }
    }

    const GOOD: [&str; 3] = ["10.0.0.5:80", "web-1:80", r#"{"address":"10.0.0.5:80","state":"drain"}"#];
    const BAD: [&str; 3] = ["", "nonsense", r#"{"address":1}"#];
    const KEYS: [&str; 5] = ["web/a", "web/b", "varnish/a", "varnish", "web/a/b"];

    fn changes(values: &'static [&'static str]) -> impl Strategy<Value = Vec<(&'static str, Option<&'static str>)>> {
        let value = prop_oneof![3 => prop::sample::select(values).prop_map(Some), 1 => Just(None)];
        prop::collection::vec((prop::sample::select(&KEYS[..]), value), 0..40)
    }

    const ALL: [&str; 6] = [GOOD[0], GOOD[1], GOOD[2], BAD[0], BAD[1], BAD[2]];

    proptest! {
        /// Applying each change and listing after each change give the same result.
        #[test]
        fn a_list_and_the_changes_say_the_same(changes in changes(&ALL), relisted: Vec<bool>) {
            let (mut model, mut told, mut listing) = (Model::default(), Roster::default(), Roster::default());
            for (number, (key, value)) in changes.into_iter().enumerate() {
                let change = model.change(key, value);
                let step = change.as_ref().and_then(|change| told.apply(change));
                let listed = listing.list(model.items(), model.revision);
                prop_assert_eq!(Vec::from_iter(step), listed);
                if relisted.get(number).copied().unwrap_or(false) {
                    prop_assert_eq!(told.list(model.items(), model.revision), []);
                }
                // A lagging member sends the event again.
                if let Some(change) = change {
                    prop_assert_eq!(told.apply(&change), None);
                }
                prop_assert_eq!(addresses(&told), addresses(&listing));
            }
        }

        /// After a list, a roster that missed any number of changes equals one that starts with this list.
        #[test]
        fn a_list_makes_up_for_what_was_missed(changes in changes(&GOOD), missed_from in 0_usize..40) {
            let (mut model, mut told) = (Model::default(), Roster::default());
            for (number, (key, value)) in changes.into_iter().enumerate() {
                let change = model.change(key, value);
                if let Some(change) = change.filter(|_| number < missed_from) {
                    told.apply(&change);
                }
            }
            told.list(model.items(), model.revision);
            let mut fresh = Roster::default();
            fresh.list(model.items(), model.revision);
            prop_assert_eq!(addresses(&told), addresses(&fresh));
        }
    }
}
