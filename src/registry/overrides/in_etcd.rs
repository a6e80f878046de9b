//! The overrides in etcd: followed by every clearcoat, written by the one that an operator asks.
//!
//! The version of an override is the revision of its key, so a list and an event go through the same merge, and an old event
//! that a lagging member sends again changes nothing. A list is all that counts, whatever was known: etcd may have been
//! restored from a backup, and revisions begun anew.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{KnownOverrides, OverrideError, OverrideStore};
use crate::etcd::follow::{self, KeyChange, KeyEntry, Listing, Update, WatchStatus};
use crate::etcd::{EtcdError, SharedEtcd};
use crate::fleet::{NamedOverride, NodeKey, NodeOverride, OverrideChange, Overrides, VersionedOverride, node_key};

/// The prefix of the keys, below the prefix of the fleet.
const OVERRIDES: &str = "overrides/";

/// How long the start waits for the first list: as long as for that of the nodes.
const FIRST_LIST: Duration = Duration::from_secs(3);

/// How often a change is tried that somebody else makes at the same time.
const ATTEMPTS: usize = 5;

/// Follows etcd until the process ends.
pub(super) async fn follow(store: Arc<OverrideStore>, etcd: SharedEtcd) {
    let (sender, mut updates) = mpsc::channel(16);
    // Aborted with this task.
    let mut helper = JoinSet::new();
    let prefix = etcd.key(OVERRIDES);
    helper.spawn(follow::follow(etcd, prefix, WatchStatus::new("overrides"), sender));
    match tokio::time::timeout(FIRST_LIST, updates.recv()).await {
        Ok(Some(first)) => store.set(|known| take(known, first)),
        Ok(None) => return,
        Err(_) => {
            tracing::warn!("etcd has not listed what operators said of nodes: it is taken from the disk");
            store.set(|known| known.is_complete = true);
        }
    }
    while let Some(update) = updates.recv().await {
        store.set(|known| take(known, update));
    }
}

/// What is known after an update.
fn take(known: &mut KnownOverrides, update: Update) {
    match update {
        Update::Listed(Listing { revision, items, .. }) => {
            let before = std::mem::take(&mut known.overrides);
            let read = |item: &KeyEntry| read(item).or_else(|| last_good(item, &before));
            known.overrides = items.iter().filter_map(read).collect();
            (known.revision, known.is_complete) = (revision, true);
        }
        Update::Changed(changes) => {
            for change in changes {
                known.revision = known.revision.max(change.revision());
                known.overrides.merge(match change {
                    KeyChange::Put(item) => read(&item),
                    KeyChange::Deleted { key, revision } => {
                        node_key(&key).ok().map(|node| named(node, NodeOverride::default(), revision))
                    }
                });
            }
        }
    }
}

fn named((role, id): NodeKey, says: NodeOverride, revision: i64) -> NamedOverride {
    let version = u64::try_from(revision).unwrap_or(0);
    NamedOverride { role, id, versioned: VersionedOverride { version, says } }
}

/// The override of a key; `None` if it means nothing.
fn read(item: &KeyEntry) -> Option<NamedOverride> {
    let node = node_key(&item.key).map_err(|error| error.to_string());
    let says = serde_json::from_slice(&item.value).map_err(|error| error.to_string());
    match node.and_then(|node| Ok((node, says?))) {
        Ok((node, says)) => Some(named(node, says, item.revision)),
        Err(reason) => {
            tracing::warn!(key = item.key, reason, "this override in etcd means nothing: what was known of it stays");
            None
        }
    }
}

/// What was known of a key that cannot be read any more.
fn last_good(item: &KeyEntry, before: &Overrides) -> Option<NamedOverride> {
    let node = node_key(&item.key).ok()?;
    let says = before.of(&node);
    Some(named(node, says, item.revision))
}

/// Writes the override of a node. Returns the revision of etcd that has it.
pub(super) async fn change(
    etcd: &SharedEtcd,
    (role, id): &NodeKey,
    change: OverrideChange,
    now_ms: u64,
) -> Result<i64, OverrideError> {
    let session = etcd.connect().await?;
    let key = etcd.key(&format!("{OVERRIDES}{role}/{id}"));
    for _ in 0..ATTEMPTS {
        let found = session.request(async |mut client| client.get(key.as_str(), None).await).await?;
        let known = found.kvs().first();
        // A value that means nothing is replaced, whatever the change.
        let readable: Option<NodeOverride> =
            known.map_or_else(|| Some(NodeOverride::default()), |kv| serde_json::from_slice(kv.value()).ok());
        let says = readable.unwrap_or_default().changed(change, now_ms);
        if readable == Some(says) {
            return Ok(known.map_or(0, etcd_client::KeyValue::mod_revision));
        }
        let unchanged =
            Compare::mod_revision(key.as_str(), CompareOp::Equal, known.map_or(0, etcd_client::KeyValue::mod_revision));
        let write = match says.is_spent() {
            true => TxnOp::delete(key.as_str(), None),
            false => TxnOp::put(key.as_str(), serde_json::to_vec(&says)?, None),
        };
        let txn = Txn::new().when([unchanged]).and_then([write]);
        let answer = session.request(async |mut client| client.txn(txn).await).await?;
        if answer.succeeded() {
            let header = answer.header().ok_or(OverrideError::Etcd(EtcdError::Closed))?;
            return Ok(header.revision());
        }
    }
    Err(OverrideError::Contended)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::follow::Resync;

    fn item(key: &str, value: &str, revision: i64) -> KeyEntry {
        KeyEntry { key: key.to_owned(), value: value.as_bytes().to_vec(), lease: None, revision, created: revision }
    }

    fn list(known: &mut KnownOverrides, items: Vec<KeyEntry>, revision: i64) {
        take(known, Update::Listed(Listing { cluster: 1, revision, items, cause: Resync::Start }));
    }

    fn drained(known: &KnownOverrides) -> Vec<String> {
        known.overrides.in_effect().map(|((role, id), _)| format!("{role}/{id}")).collect()
    }

    const DRAINED: &str = r#"{"drained_at":1}"#;

    #[test]
    fn a_list_is_all_that_counts_also_after_a_restore() {
        let mut known = KnownOverrides::default();
        list(&mut known, vec![item("web/a", DRAINED, 7), item("varnish/a", DRAINED, 8)], 9);
        assert_eq!((drained(&known), known.is_complete), (vec!["web/a".to_owned(), "varnish/a".to_owned()], true));
        list(&mut known, vec![item("web/a", r#"{"weight":3}"#, 2)], 3);
        assert_eq!(drained(&known), ["web/a"]);
        assert_eq!((known.revision, known.overrides.of(&node_key("web/a").unwrap()).drained_at_ms), (3, None));
    }

    #[test]
    fn an_old_event_brings_nothing_back() {
        let mut known = KnownOverrides::default();
        list(&mut known, vec![], 1);
        let put = || KeyChange::Put(item("web/a", DRAINED, 2));
        take(&mut known, Update::Changed(vec![put()]));
        assert_eq!(drained(&known), ["web/a"]);
        take(&mut known, Update::Changed(vec![KeyChange::Deleted { key: "web/a".to_owned(), revision: 3 }, put()]));
        assert_eq!((drained(&known).len(), known.revision), (0, 3));
    }

    #[test]
    fn a_value_that_cannot_be_read_leaves_the_last_good_one() {
        let mut known = KnownOverrides::default();
        list(&mut known, vec![item("web/a", DRAINED, 2)], 2);
        let bad = || vec![item("web/a", r#"{"weight":-1}"#, 3), item("web", DRAINED, 3), item("web/b", "", 3)];
        take(&mut known, Update::Changed(bad().into_iter().map(KeyChange::Put).collect()));
        assert_eq!(drained(&known), ["web/a"]);
        list(&mut known, bad(), 4);
        assert_eq!(drained(&known), ["web/a"]);
    }
}
