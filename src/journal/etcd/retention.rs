//! Purges leave etcd when their time is over.
//!
//! Every replica looks after it, now and then; the mark of what was deleted is written in the same transaction, on
//! condition that nobody else has moved it, so that two who meet do no harm. Names begin with the time, so the oldest
//! stand first.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, GetOptions, Txn, TxnOp};

use super::cursors::{self, MAX_OPERATIONS};
use super::sync::unsigned;
use super::{FLOOR, Inner, PURGES};
use crate::etcd::{Failure, Session};

/// How often, more or less.
const EVERY: Duration = Duration::from_secs(60);

/// Deletes what is too old until the process ends.
pub(super) async fn run(inner: Arc<Inner>) {
    // A part of the retention where that is short, so that what is kept is never twice what was asked for.
    let every = EVERY.min(inner.limits.retention / 2).max(Duration::from_secs(1));
    loop {
        tokio::time::sleep(every.mul_f64(0.75 + 0.5 * fastrand::f64())).await;
        let Some(session) = inner.uplink.session() else { continue };
        let now_ms = inner.local.now_ms();
        let retired = async {
            while retire(&inner, &session, now_ms).await? {}
            cursors::forget(&inner.etcd, &session, &inner.limits, now_ms).await
        };
        if let Err(failure) = retired.await {
            inner.uplink.lost(&session, &failure);
        }
    }
}

/// Deletes some of the oldest. Says whether there may be more.
async fn retire(inner: &Inner, session: &Session, now_ms: u64) -> Result<bool, Failure> {
    let retention = u64::try_from(inner.limits.retention.as_millis()).unwrap_or(u64::MAX);
    let end = inner.etcd.key(&format!("{PURGES}{:012x}", now_ms.saturating_sub(retention)));
    let limit = MAX_OPERATIONS as i64 - 1;
    let options = GetOptions::new().with_range(end).with_keys_only().with_limit(limit);
    let purges = inner.etcd.key(PURGES);
    let mark = inner.etcd.key(&format!("{PURGES}{FLOOR}"));
    let old = session.request(async |mut client| client.get(purges, Some(options)).await).await?;
    if old.kvs().is_empty() {
        return Ok(false);
    }
    let marked = session.request(async |mut client| client.get(mark.as_str(), None).await).await?;
    let marked = marked.kvs().first();
    // A mark that cannot be read stands for all before it, as for whoever reads it.
    let before = marked.map_or(0, |kv| {
        String::from_utf8_lossy(kv.value()).trim().parse().unwrap_or_else(|_| unsigned(kv.mod_revision()))
    });
    let last = old.kvs().iter().map(|kv| unsigned(kv.create_revision())).max().unwrap_or(0);
    let unmoved =
        Compare::mod_revision(mark.as_str(), CompareOp::Equal, marked.map_or(0, etcd_client::KeyValue::mod_revision));
    let mut operations = vec![TxnOp::put(mark.as_str(), last.max(before).to_string(), None)];
    operations.extend(old.kvs().iter().map(|kv| TxnOp::delete(kv.key(), None)));
    let txn = Txn::new().when([unmoved]).and_then(operations);
    let answer = session.request(async |mut client| client.txn(txn).await).await?;
    Ok(answer.succeeded() && old.more())
}
