//! Deletes expired purges and cursors from etcd.
//!
//! Every replica does this periodically. The mark of deleted entries is written in the same transaction, on condition that
//! no other replica has moved it, so that two replicas at once do no harm.
//!
//! **By which clock?** The clocks of two machines may differ by more than the retention, and a fast one would delete new
//! purges. So a replica deletes purges that it has held itself for the retention, by its own clock, and cursors that have
//! not changed for that long while it was watching. A replica that runs for less than the retention deletes nothing, which
//! is harmless.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, Txn, TxnOp};

use super::cursors::{self, MAX_OPERATIONS};
use super::sync::unsigned;
use super::unchanged::Unchanged;
use super::{FLOOR, Inner, PURGES};
use crate::etcd::{EtcdError, Session};
use crate::journal::Journal;

/// The approximate interval.
const EVERY: Duration = Duration::from_secs(60);

/// Deletes expired purges and cursors until the process ends.
pub(super) async fn run(inner: Arc<Inner>) {
    // At most half of a short retention, so that nothing is kept for twice as long as configured.
    let every = EVERY.min(inner.limits.retention / 2).max(Duration::from_secs(1));
    let mut seen = Unchanged::default();
    loop {
        tokio::time::sleep(every.mul_f64(0.75 + 0.5 * fastrand::f64())).await;
        inner.local.readable().retire();
        let Some(session) = inner.uplink.session() else { continue };
        let retired = async {
            while retire(&inner, &session).await? {}
            cursors::forget(&inner.etcd, &session, &inner.limits, &mut seen).await
        };
        if let Err(failure) = retired.await {
            inner.uplink.lost(&session, &failure);
        }
    }
}

/// Deletes some of the purges that are no longer held here. Returns whether there may be more.
async fn retire(inner: &Inner, session: &Session) -> Result<bool, EtcdError> {
    let (names, last) = inner.local.readable().position_map.lock().retired(MAX_OPERATIONS - 1);
    if names.is_empty() {
        return Ok(false);
    }
    let mark = inner.etcd.key(&format!("{PURGES}{FLOOR}"));
    let marked = session.request(async |mut client| client.get(mark.as_str(), None).await).await?;
    let marked = marked.kvs().first();
    // An unreadable mark counts as one at its own revision, here and for its readers.
    let before = marked.map_or(0, |kv| {
        String::from_utf8_lossy(kv.value()).trim().parse().unwrap_or_else(|_| unsigned(kv.mod_revision()))
    });
    let unmoved =
        Compare::mod_revision(mark.as_str(), CompareOp::Equal, marked.map_or(0, etcd_client::KeyValue::mod_revision));
    let mut operations = vec![TxnOp::put(mark.as_str(), last.max(before).to_string(), None)];
    operations.extend(names.iter().map(|name| TxnOp::delete(inner.etcd.key(&format!("{PURGES}{name}")), None)));
    let txn = Txn::new().when([unmoved]).and_then(operations);
    let answer = session.request(async |mut client| client.txn(txn).await).await?;
    if answer.succeeded() {
        let mut position_map = inner.local.readable().position_map.lock();
        names.iter().for_each(|name| position_map.forget_one(name));
    }
    Ok(answer.succeeded())
}
