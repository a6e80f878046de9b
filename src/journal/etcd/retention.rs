//! Purges leave etcd when their time is over.
//!
//! Every replica looks after it, now and then; the mark of what was deleted is written in the same transaction, on
//! condition that nobody else has moved it, so that two who meet do no harm.
//!
//! **Whose time?** The clocks of two machines may differ by more than the retention, and one that is ahead would delete
//! what has just been written. So a replica deletes what it has held itself for as long as that, by its own clock; and the
//! cursor of a node that has not changed for as long while it was watched. A replica that runs for less than the retention
//! deletes nothing, which is the harmless side.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, Txn, TxnOp};

use super::cursors::{self, MAX_OPERATIONS};
use super::sync::unsigned;
use super::unchanged::Unchanged;
use super::{FLOOR, Inner, PURGES};
use crate::etcd::{EtcdError, Session};
use crate::journal::Journal;

/// How often, more or less.
const EVERY: Duration = Duration::from_secs(60);

/// Deletes what is too old until the process ends.
pub(super) async fn run(inner: Arc<Inner>) {
    // A part of the retention where that is short, so that what is kept is never twice what was asked for.
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

/// Deletes some of those that are not held here any more. Says whether there may be more.
async fn retire(inner: &Inner, session: &Session) -> Result<bool, EtcdError> {
    let (names, last) = inner.local.readable().position_map().retired(MAX_OPERATIONS - 1);
    if names.is_empty() {
        return Ok(false);
    }
    let mark = inner.etcd.key(&format!("{PURGES}{FLOOR}"));
    let marked = session.request(async |mut client| client.get(mark.as_str(), None).await).await?;
    let marked = marked.kvs().first();
    // A mark that cannot be read stands for all before it, as for whoever reads it.
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
        let mut position_map = inner.local.readable().position_map();
        names.iter().for_each(|name| position_map.forget_one(name));
    }
    Ok(answer.succeeded())
}
