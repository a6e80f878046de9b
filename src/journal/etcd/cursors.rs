//! Cursors in etcd, from which other replicas can start.
//!
//! While it runs, a replica trusts only acknowledgements that it has received itself. A replica that starts has none, and
//! would have to flush every Varnish. So each replica writes the cursors of the Varnish nodes periodically, and a new one
//! starts from them. Lazily: a cursor that is too low only replays more.

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

/// The prefix of the cursors' keys.
const CURSORS: &str = "cursors/";

/// The minimum time between two writes.
const EVERY: Duration = Duration::from_secs(1);

/// A cursor that does not move is rewritten after this time, or it would count as that of a node that left.
const AGAIN: Duration = Duration::from_secs(60);

/// Below etcd's limit of 128 operations in a transaction (`--max-txn-ops`).
pub(super) const MAX_OPERATIONS: usize = 100;

/// The value of a cursor in etcd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct CursorRecord {
    position: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    epoch: Option<Arc<str>>,
    /// [`Cursor::relies_on_seals`]. A version that does not say so may have told the cache purges once.
    #[serde(default = "in_doubt")]
    relies_on_seals: bool,
    /// When it was written, in milliseconds since 1970.
    #[serde(rename = "at")]
    at_ms: u64,
}

fn in_doubt() -> bool {
    true
}

/// The cursors that were read, and those to be written.
#[derive(Default)]
pub(super) struct Published {
    read: Mutex<HashMap<NodeId, CursorRecord>>,
    offered: Mutex<Vec<(NodeId, Cursor)>>,
}

impl Published {
    /// Sets the cursors to be written.
    pub(super) fn offer(&self, cursors: &[(NodeId, Cursor)]) {
        *self.offered.lock() = cursors.to_vec();
    }

    /// The cursor that another replica wrote for a node; `position` translates a revision.
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

    /// Whether another replica wrote that the cache of this node, with this epoch, relies on seals.
    pub(super) fn relies_on_seals(&self, node: &NodeId, epoch: Option<&str>) -> bool {
        let read = self.read.lock();
        let relies = |record: &CursorRecord| record.relies_on_seals && !is_another_life(record.epoch.as_deref(), epoch);
        read.get(node).is_some_and(relies)
    }

    /// Replaces all cursors by those at this revision. Later cursors would refer to purges that are not known yet, and
    /// earlier ones may belong to another history.
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
                tracing::warn!(error = %causes(&error), "the cursors of other replicas cannot be read: only local cursors are used");
                return;
            }
        };
        for kv in listed.kvs() {
            let key = String::from_utf8_lossy(kv.key()).into_owned();
            let node = NodeId::try_from(key.strip_prefix(&keys).unwrap_or(&key));
            match (node, serde_json::from_slice::<CursorRecord>(kv.value())) {
                // It belongs to another history that was longer: a replica has not noticed the restore yet.
                (Ok(_), Ok(record)) if record.position > unsigned(revision) => {}
                (Ok(node), Ok(record)) => _ = read.insert(node, record),
                (Err(error), _) => tracing::warn!(key, %error, "invalid cursor in etcd"),
                (_, Err(error)) => tracing::warn!(key, %error, "invalid cursor in etcd"),
            }
        }
    }
}

/// Writes the cursors until the process ends.
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

/// The cursors that have changed since they were written, or were written too long ago.
fn changed(inner: &Inner, written: &HashMap<NodeId, CursorRecord>) -> Vec<(NodeId, CursorRecord)> {
    let now_ms = inner.local.now_ms();
    let offered = inner.published.offered.lock().clone();
    let position_map = inner.local.readable().position_map.lock();
    let records = offered.into_iter().map(|(node, Cursor { position, epoch, relies_on_seals, .. })| {
        let position = position_map.covered(position);
        (node, CursorRecord { position, epoch, relies_on_seals, at_ms: now_ms })
    });
    let is_news = |(node, record): &(NodeId, CursorRecord)| {
        written.get(node).is_none_or(|before| {
            let old = u128::from(now_ms.saturating_sub(before.at_ms)) >= AGAIN.as_millis();
            let content = |of: &CursorRecord| (of.position, of.epoch.clone(), of.relies_on_seals);
            old || content(before) != content(record)
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

/// Deletes cursors that were not written for the retention, because their nodes are gone. Measured by our own clock, since
/// their dates are by those of other machines.
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
