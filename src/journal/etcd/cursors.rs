//! Cursors that other replicas can start from.
//!
//! Each replica trusts only what it has seen acknowledged itself, while it runs. One that starts has seen nothing, and
//! would have to empty every Varnish; so each writes now and then how far the Varnish nodes are, and a new one begins
//! there. Lazily: a cursor that is too low only replays more.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{Compare, CompareOp, DeleteOptions, GetOptions, Txn, TxnOp};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::Inner;
use super::sync::unsigned;
use super::unchanged::Unchanged;
use crate::etcd::{EtcdError, PATIENCE, Session, SharedEtcd};
use crate::fleet::{NodeId, is_another_life};
use crate::journal::{Cursor, CursorState, Journal, Limits, Position};
use crate::telemetry::causes;

/// The keys of the cursors.
const CURSORS: &str = "cursors/";

/// The least time between two writes.
const EVERY: Duration = Duration::from_secs(1);

/// Also a cursor that does not move is written again, or it would be taken for one of a node that left.
const AGAIN: Duration = Duration::from_secs(60);

/// etcd takes 128 operations in a transaction (`--max-txn-ops`).
pub(super) const MAX_OPERATIONS: usize = 100;

/// A cursor as it stands in etcd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct CursorRecord {
    /// A revision.
    position: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    epoch: Option<Arc<str>>,
    /// When it was written, in milliseconds since 1970.
    #[serde(rename = "at")]
    at_ms: u64,
}

/// What was read, and what is to be written.
#[derive(Default)]
pub(super) struct Published {
    read: Mutex<HashMap<NodeId, CursorRecord>>,
    offered: Mutex<Vec<(NodeId, Cursor)>>,
}

impl Published {
    /// These may be written.
    pub(super) fn offer(&self, cursors: &[(NodeId, Cursor)]) {
        *self.offered.lock() = cursors.to_vec();
    }

    /// What another replica wrote about a node, where `position` finds the place of a revision here.
    pub(super) fn remembered(
        &self,
        node: &NodeId,
        epoch: Option<&str>,
        position: impl FnOnce(u64) -> Option<Position>,
    ) -> CursorState {
        let read = self.read.lock();
        match read.get(node) {
            None => CursorState::Unknown,
            Some(record) if is_another_life(record.epoch.as_deref(), epoch) => CursorState::CacheRestarted,
            Some(record) => position(record.position).map_or(CursorState::Unknown, CursorState::At),
        }
    }

    /// Reads all of them, as they were at this revision: a cursor from after the purges that are known would claim what
    /// nobody can check. What was read before is forgotten; it may be of another history.
    pub(super) async fn read(&self, etcd: &SharedEtcd, revision: i64) {
        let keys = etcd.key(CURSORS);
        let listed = async {
            let session = etcd.connect().await?;
            let options = GetOptions::new().with_prefix().with_revision(revision);
            session.request(async |mut client| client.get(keys.as_str(), Some(options)).await).await
        };
        let listed = tokio::time::timeout(PATIENCE, listed).await.unwrap_or(Err(EtcdError::NoAnswer));
        let mut read = self.read.lock();
        read.clear();
        let listed = match listed {
            Ok(listed) => listed,
            Err(error) => {
                tracing::warn!(error = %causes(&error), "the cursors of other replicas cannot be read: what is known here has to do");
                return;
            }
        };
        for kv in listed.kvs() {
            let key = String::from_utf8_lossy(kv.key()).into_owned();
            let node = NodeId::try_from(key.strip_prefix(&keys).unwrap_or(&key));
            match (node, serde_json::from_slice::<CursorRecord>(kv.value())) {
                // Of a history that had gone further than this one: a replica has not noticed yet that it is over.
                (Ok(_), Ok(record)) if record.position > unsigned(revision) => {}
                (Ok(node), Ok(record)) => _ = read.insert(node, record),
                (Err(error), _) => tracing::warn!(key, %error, "this is no cursor"),
                (_, Err(error)) => tracing::warn!(key, %error, "this is no cursor"),
            }
        }
    }
}

/// Writes what was offered until the process ends.
pub(super) async fn run(inner: Arc<Inner>) {
    let mut written: HashMap<NodeId, CursorRecord> = HashMap::new();
    loop {
        tokio::time::sleep(EVERY).await;
        let Some(session) = inner.uplink.session() else { continue };
        let changed = changed(&inner, &written);
        for some in changed.chunks(MAX_OPERATIONS) {
            match write(&inner.etcd, &session, some).await {
                Ok(()) => written.extend(some.iter().cloned()),
                Err(failure) => {
                    inner.uplink.lost(&session, &failure);
                    break;
                }
            }
        }
    }
}

/// What differs from what was written, or was written too long ago.
fn changed(inner: &Inner, written: &HashMap<NodeId, CursorRecord>) -> Vec<(NodeId, CursorRecord)> {
    let now_ms = inner.local.now_ms();
    let offered = inner.published.offered.lock().clone();
    let position_map = inner.local.readable().position_map();
    let records = offered.into_iter().map(|(node, Cursor { position, epoch })| {
        (node, CursorRecord { position: position_map.covered(position), epoch, at_ms: now_ms })
    });
    let is_news = |(node, record): &(NodeId, CursorRecord)| {
        written.get(node).is_none_or(|before| {
            let old = u128::from(now_ms.saturating_sub(before.at_ms)) >= AGAIN.as_millis();
            old || (before.position, &before.epoch) != (record.position, &record.epoch)
        })
    };
    records.filter(is_news).collect()
}

async fn write(etcd: &SharedEtcd, session: &Session, cursors: &[(NodeId, CursorRecord)]) -> Result<(), EtcdError> {
    let put = |(node, record): &(NodeId, CursorRecord)| {
        let value = serde_json::to_vec(record).unwrap_or_default();
        TxnOp::put(etcd.key(&format!("{CURSORS}{node}")), value, None)
    };
    let txn = Txn::new().and_then(cursors.iter().map(put).collect::<Vec<_>>());
    session.request(async |mut client| client.txn(txn).await).await?;
    Ok(())
}

/// Deletes the cursors that nobody has written for too long: their nodes are gone. By what we have seen ourselves, and not
/// by their dates, which are another machine's.
pub(super) async fn forget(
    etcd: &SharedEtcd,
    session: &Session,
    limits: &Limits,
    seen: &mut Unchanged,
) -> Result<(), EtcdError> {
    let keys = etcd.key(CURSORS);
    let options = GetOptions::new().with_prefix().with_keys_only();
    let listed = session.request(async |mut client| client.get(keys, Some(options)).await).await?;
    let revisions: HashMap<&[u8], i64> = listed.kvs().iter().map(|kv| (kv.key(), kv.mod_revision())).collect();
    let old = seen.look(revisions.iter().map(|(key, revision)| (*key, *revision)), limits.retention, Instant::now());
    for key in old {
        let unchanged = Compare::mod_revision(key, CompareOp::Equal, revisions[key]);
        let delete = TxnOp::delete(key, None::<DeleteOptions>);
        let txn = Txn::new().when([unchanged]).and_then([delete]);
        session.request(async |mut client| client.txn(txn).await).await?;
    }
    Ok(())
}
