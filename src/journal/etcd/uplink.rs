//! Writes purges to etcd, and uploads the spool.
//!
//! A purge waits for etcd for at most [`PUT`]. After that it goes to the spool, and until etcd answers again all later ones
//! go there at once. So if etcd hangs, one purge waits that long, and later ones do not wait.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, Txn, TxnOp, TxnOpResponse};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{FLOOR, Inner, PURGES};
use crate::etcd::{EtcdError, Pauses, Session, SharedEtcd};
use crate::journal::{Entry, Journal, Missed, Position};
use crate::purge::Purge;
use crate::telemetry::causes;

/// The maximum wait of a purge for etcd. Together with the wait for its order, less than half of the shortest reasonable
/// `ack_timeout`.
const PUT: Duration = Duration::from_millis(250);

/// Below etcd's limit of 1.5 MiB for a request (`--max-request-bytes`). A larger purge is uploaded as one of everything.
const MAX_VALUE: usize = 1 << 20;

/// The interval of checking an idle connection.
const LOOK: Duration = Duration::from_secs(5);

/// The connection for writes, if there is one.
pub(super) struct Uplink {
    etcd: SharedEtcd,
    session: Mutex<Option<Arc<Session>>>,
    /// Notified when there is something to upload, or the connection is lost.
    wake: Notify,
    /// Why there is no connection, until that is said.
    away: Mutex<Option<String>>,
}

impl Uplink {
    pub(super) fn new(etcd: SharedEtcd) -> Self {
        Uplink { etcd, session: Mutex::default(), wake: Notify::new(), away: Mutex::default() }
    }

    /// The connection, if there is one.
    pub(super) fn session(&self) -> Option<Arc<Session>> {
        self.session.lock().clone()
    }

    /// Checks for purges to upload.
    pub(super) fn look_again(&self) {
        self.wake.notify_one();
    }

    /// Writes a purge and returns its revision; `None` if there was no answer in time. The purge may be in etcd all the
    /// same.
    pub(super) async fn put(&self, id: &str, at_ms: u64, purge: &Purge) -> Option<u64> {
        let session = self.session()?;
        let written = async {
            let entry = Entry { position: 0, at_ms, purge: purge.clone(), origin: None };
            write(&self.etcd, &session, id, &entry).await
        };
        match tokio::time::timeout(PUT, written).await.unwrap_or(Err(EtcdError::NoAnswer)) {
            Ok(revision) => Some(revision),
            Err(failure) => {
                self.lost(&session, &failure);
                None
            }
        }
    }

    /// Drops a broken connection.
    pub(super) fn lost(&self, session: &Arc<Session>, failure: &EtcdError) {
        let mut current = self.session.lock();
        if current.as_ref().is_some_and(|current| Arc::ptr_eq(current, session)) {
            *current = None;
            *self.away.lock() = Some(format!("{}: {}", session.endpoint, causes(failure)));
            self.wake.notify_one();
        }
    }

    /// Says that purges are not in etcd, once for each loss of the connection. Without a purge it does not matter.
    pub(super) fn tell_spooled(&self) {
        if let Some(error) = self.away.lock().take() {
            tracing::warn!(error, "purges cannot be written to etcd: they go to the spool");
        }
    }

    fn set(&self, session: Option<Arc<Session>>) {
        if session.is_some() {
            *self.away.lock() = None;
        }
        *self.session.lock() = session;
    }
}

/// Writes an entry unless its name exists, and returns the revision of the one that is there then.
async fn write(etcd: &SharedEtcd, session: &Session, id: &str, entry: &Entry) -> Result<u64, EtcdError> {
    let key = etcd.key(&format!("{PURGES}{id}"));
    let txn = Txn::new()
        .when([Compare::version(key.as_str(), CompareOp::Equal, 0)])
        .and_then([TxnOp::put(key.as_str(), encode(entry), None)])
        .or_else([TxnOp::get(key.as_str(), None)]);
    let answer = session.request(async |mut client| client.txn(txn).await).await?;
    let revision = match answer.op_responses().first() {
        Some(TxnOpResponse::Get(there)) => there.kvs().first().map(etcd_client::KeyValue::create_revision),
        _ => answer.header().map(etcd_client::ResponseHeader::revision),
    };
    revision.and_then(|revision| u64::try_from(revision).ok()).ok_or(EtcdError::Closed)
}

/// The value in etcd.
fn encode(entry: &Entry) -> Vec<u8> {
    match serde_json::to_vec(entry) {
        Ok(value) if value.len() <= MAX_VALUE => value,
        _ => {
            let entry = Entry { purge: Purge::everything(), origin: None, ..entry.clone() };
            serde_json::to_vec(&entry).unwrap_or_default()
        }
    }
}

/// Keeps a connection and uploads the spool until the process ends.
pub(super) async fn run(inner: Arc<Inner>) {
    let uplink = &inner.uplink;
    let mut pauses = Pauses::default();
    let mut is_known = false;
    loop {
        match connected(&inner, &mut pauses).await {
            // Whoever dropped the connection has noted why.
            Ok(()) => {}
            // Once for each loss of the connection.
            Err(failure) if is_known && uplink.session().is_none() => {
                tracing::debug!(error = %causes(&failure), "etcd still takes no purges");
            }
            Err(failure) => *uplink.away.lock() = Some(causes(&failure).to_string()),
        }
        if !inner.local.readable().position_map.lock().missing().is_empty() {
            uplink.tell_spooled();
        }
        is_known = true;
        uplink.set(None);
        pauses.wait().await;
    }
}

async fn connected(inner: &Arc<Inner>, pauses: &mut Pauses) -> Result<(), EtcdError> {
    let session = Arc::new(inner.etcd.connect().await?);
    upload(inner, &session).await?;
    inner.uplink.set(Some(Arc::clone(&session)));
    pauses.reset();
    loop {
        let woken = tokio::time::timeout(LOOK, inner.uplink.wake.notified()).await.is_ok();
        // A purge that got no answer has dropped it.
        if inner.uplink.session().is_none() {
            return Ok(());
        }
        // Purges that were spooled while connecting, or that came from a replica that cannot upload them itself.
        upload(inner, &session).await?;
        if !woken {
            let key = inner.etcd.key(&format!("{PURGES}{FLOOR}"));
            session.request(async |mut client| client.get(key, None).await).await?;
        }
    }
}

/// Writes all held purges that are not in etcd, in order.
async fn upload(inner: &Arc<Inner>, session: &Session) -> Result<(), EtcdError> {
    let overflow = inner.local.readable().position_map.lock().overflow();
    if overflow > 0 {
        tracing::warn!(
            "etcd was away for so long that purges were dropped from the spool: one of everything replaces them"
        );
        let at_ms = inner.local.now_ms();
        let entry = Entry { position: 0, at_ms, purge: Purge::everything(), origin: None };
        let revision = write(&inner.etcd, session, &inner.names.next(at_ms), &entry).await?;
        inner.local.readable().position_map.lock().clear_overflow(overflow, revision);
    }
    let missing = inner.local.readable().position_map.lock().missing();
    if missing.is_empty() {
        return Ok(());
    }
    let count = missing.len();
    for (position, id) in missing {
        // Dropped a moment ago: the next round uploads the purge that replaces it.
        let Some(entry) = entry(inner, position) else { continue };
        let revision = write(&inner.etcd, session, &id, &entry).await?;
        inner.link.expect(i64::try_from(revision).unwrap_or(i64::MAX));
        // After a crash the revision is found in etcd.
        if let Err(error) = inner.local.found(vec![(position, Some(revision))]).await {
            tracing::warn!(error = %causes(&error), "the revision of a purge could not be recorded");
        }
    }
    tracing::info!(count, "the spool was uploaded to etcd");
    Ok(())
}

fn entry(inner: &Inner, position: Position) -> Option<Arc<Entry>> {
    let Missed::Entries(entries) = inner.local.since(position - 1) else { return None };
    entries.into_iter().next().filter(|entry| entry.position == position)
}
