//! A key that exists as long as this process: the node of an agent, or the record of a replica.
//!
//! The key has a lease, so that it does not outlive the process for long. A lease is easily lost: it expires while etcd is
//! away, somebody revokes it, an old client library forgets it (cilium/cilium#42596: keys gone for hours, and the process
//! looked healthy). So nothing is assumed: if etcd no longer knows the lease, it is replaced at once and the key written
//! again, and the key itself is read periodically.
//!
//! **The newer process wins.** Two processes with one name are a mistake, or one of them is about to end. A process that
//! starts takes the key from any owner; one that has lost its key does not take it back while another has it. Nor does it
//! delete another's key: every change but the first requires that the key has our lease, which no other process uses.
//! Comparing the value would not do: if an answer is lost, the key may have a value of ours that we do not know.

use std::time::Duration;

use etcd_client::{Compare, CompareOp, LeaseKeepAliveStream, LeaseKeeper, PutOptions, Txn, TxnOp, TxnOpResponse};
use tokio::sync::watch;

use super::{EtcdError, Pauses, Session, SharedEtcd, bounded};
use crate::telemetry::causes;

/// The number of renewals within the time to live of the lease.
const BEATS: u32 = 3;

/// The number of renewals after which the key itself is read.
const LOOK_EVERY: u32 = 3;

/// Keeps one key registered.
pub struct Registration {
    etcd: SharedEtcd,
    key: String,
    ttl: Duration,
    lease: Option<i64>,
    /// The value that we wrote last. `None` before the first write, which takes the key from any owner.
    written: Option<Vec<u8>>,
    /// The last value, written before the key is deleted.
    farewell: Option<Vec<u8>>,
}

/// The state of a registration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegistrationStatus {
    /// The key exists, and is ours.
    pub registered: bool,
    /// Another process has the key.
    pub superseded: bool,
    /// Why it is not there, or not ours.
    pub problem: Option<String>,
}

/// A lease that is renewed over one connection.
struct KeptLease {
    session: Session,
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
}

impl Registration {
    /// A registration of this key, which etcd keeps for `ttl` (in whole seconds, at least one) without a renewal. Does
    /// nothing yet.
    pub fn new(etcd: SharedEtcd, key: String, ttl: Duration) -> Self {
        Registration { etcd, key, ttl, lease: None, written: None, farewell: None }
    }

    /// Adds a last value, which is written before the key is deleted, so that watchers know that the key did not expire.
    pub fn with_farewell(self, value: Vec<u8>) -> Self {
        Registration { farewell: Some(value), ..self }
    }

    /// Keeps the key at the value of `record` until that is `None` or its sender is dropped, then deletes it and returns.
    /// Values must differ between processes, so that each recognises its own.
    pub async fn run(
        mut self,
        mut record: watch::Receiver<Option<Vec<u8>>>,
        status: watch::Sender<RegistrationStatus>,
    ) {
        let mut pauses = Pauses::default();
        let mut unwanted = record.clone();
        while wanted(&mut record).is_some() {
            let ended = tokio::select! {
                ended = self.connection(&mut record, &status, &mut pauses) => ended,
                // Also while a member does not answer.
                _ = unwanted.wait_for(Option::is_none) => Ok(()),
            };
            match ended {
                Ok(()) => break,
                Err(failure) => {
                    let problem = causes(&failure).to_string();
                    let is_new = status.borrow().problem.as_ref() != Some(&problem);
                    if is_new {
                        tracing::warn!(key = self.key, error = problem, "not registered in etcd; it is tried again");
                    }
                    status.send_modify(|status| {
                        status.registered = false;
                        status.problem = Some(problem);
                    });
                }
            }
            tokio::select! {
                () = pauses.wait() => {}
                _ = record.wait_for(Option::is_none) => {}
            }
        }
        if let Err(failure) = self.withdraw().await {
            tracing::warn!(key = self.key, error = %causes(&failure), "the key could not be deleted; its lease runs out by itself");
        }
        status.send_replace(RegistrationStatus::default());
    }

    /// Keeps the key over one connection. Returns without an error when the key is no longer wanted.
    async fn connection(
        &mut self,
        record: &mut watch::Receiver<Option<Vec<u8>>>,
        status: &watch::Sender<RegistrationStatus>,
        pauses: &mut Pauses,
    ) -> Result<(), EtcdError> {
        let session = self.etcd.connect().await?;
        let mut kept = self.keep_lease(session).await?;
        let mut beats = 0;
        loop {
            let Some(value) = wanted(record) else { return Ok(()) };
            let ours = self.write(&kept.session, value).await?;
            pauses.reset();
            self.report(status, ours);
            let changed = async {
                // Until the key must be written again: its value has changed, or it may have been deleted.
                loop {
                    let beat = (self.ttl / BEATS).mul_f64(0.9 + 0.2 * fastrand::f64());
                    tokio::select! {
                        changed = record.changed() => return Ok::<bool, EtcdError>(changed.is_ok()),
                        () = tokio::time::sleep(beat) => {}
                    }
                    if !kept.beat().await? {
                        return Ok(false);
                    }
                    beats += 1;
                    if beats % LOOK_EVERY == 0 || !ours {
                        return Ok(true);
                    }
                }
            };
            if !changed.await? {
                if wanted(record).is_none() {
                    return Ok(());
                }
                tracing::warn!(key = self.key, "etcd has ended our lease; the key is written again with a new one");
                self.lease = None;
                kept = self.keep_lease(kept.session).await?;
            }
        }
    }

    fn report(&self, status: &watch::Sender<RegistrationStatus>, ours: bool) {
        let before = status.send_replace(RegistrationStatus {
            registered: ours,
            superseded: !ours,
            problem: (!ours).then(|| "another process has registered under this name".to_owned()),
        });
        if ours && !before.registered {
            tracing::info!(key = self.key, "registered in etcd");
        }
        if !ours && !before.superseded {
            tracing::error!(
                key = self.key,
                "another process has registered under this name: it stays, until its key is gone"
            );
        }
    }

    /// Renews the current lease, or gets a new one.
    async fn keep_lease(&mut self, session: Session) -> Result<KeptLease, EtcdError> {
        if let Some(lease) = self.lease {
            match session.request(async |mut client| client.lease_keep_alive(lease).await).await {
                Ok((keeper, answers)) => return Ok(KeptLease { session, keeper, answers }),
                Err(failure) if failure.is_lease_lost() => self.lease = None,
                Err(failure) => return Err(failure),
            }
        }
        let ttl = i64::try_from(self.ttl.as_secs().max(1)).unwrap_or(i64::MAX);
        let granted = session.request(async |mut client| client.lease_grant(ttl, None).await).await?;
        let lease = granted.id();
        self.lease = Some(lease);
        let (keeper, answers) = session.request(async |mut client| client.lease_keep_alive(lease).await).await?;
        Ok(KeptLease { session, keeper, answers })
    }

    /// Writes the key unless it has this value already. Returns whether the key is ours: another process may have it.
    async fn write(&mut self, session: &Session, value: Vec<u8>) -> Result<bool, EtcdError> {
        let Some(lease) = self.lease else { return Err(EtcdError::Closed) };
        let key = self.key.as_str();
        let put = || TxnOp::put(key, value.clone(), Some(PutOptions::new().with_lease(lease)));
        let txn = match &self.written {
            None => Txn::new().and_then([put()]),
            Some(written) => {
                let is = |value: &[u8]| Compare::value(key, CompareOp::Equal, value);
                let is_ours = || Compare::lease(key, CompareOp::Equal, lease);
                // The key may have a lease that we lost.
                let left = Txn::new().when([is(written)]).and_then([put()]).or_else([TxnOp::get(key, None)]);
                let changed = Txn::new().when([is_ours()]).and_then([put()]).or_else([TxnOp::txn(left)]);
                let there = Txn::new().when([is(&value), is_ours()]).and_then([]).or_else([TxnOp::txn(changed)]);
                let gone = Compare::version(key, CompareOp::Equal, 0);
                Txn::new().when([gone]).and_then([put()]).or_else([TxnOp::txn(there)])
            }
        };
        let answer = session.request(async |mut client| client.txn(txn).await).await?;
        let ours = !ends_in_get(&answer.op_responses());
        if ours {
            self.written = Some(value);
        }
        Ok(ours)
    }

    /// Deletes the key if it is ours, and revokes the lease, and with it writes of ours whose answers were lost.
    async fn withdraw(&mut self) -> Result<(), EtcdError> {
        let Some(lease) = self.lease.take() else { return Ok(()) };
        let session = self.etcd.connect().await?;
        let key = self.key.as_str();
        let ours = || Txn::new().when([Compare::lease(key, CompareOp::Equal, lease)]);
        if let Some(farewell) = self.farewell.take() {
            let put = TxnOp::put(key, farewell, Some(PutOptions::new().with_lease(lease)));
            session.request(async |mut client| client.txn(ours().and_then([put])).await).await?;
        }
        let txn = ours().and_then([TxnOp::delete(key, None)]);
        session.request(async |mut client| client.txn(txn).await).await?;
        // The key is deleted, or another's, so revoking the lease deletes nothing else.
        match session.request(async |mut client| client.lease_revoke(lease).await).await {
            Err(failure) if !failure.is_lease_lost() => Err(failure),
            _ => Ok(()),
        }
    }
}

impl KeptLease {
    /// Renews the lease. Returns `false` if etcd no longer knows it.
    async fn beat(&mut self) -> Result<bool, EtcdError> {
        self.keeper.keep_alive().await?;
        let answer = bounded(async { self.answers.message().await?.ok_or(EtcdError::Closed) }).await?;
        Ok(answer.ttl() > 0)
    }
}

/// The current value; `None` also if its sender is dropped.
fn wanted(record: &mut watch::Receiver<Option<Vec<u8>>>) -> Option<Vec<u8>> {
    if record.has_changed().is_err() {
        return None;
    }
    record.borrow_and_update().clone()
}

/// Whether the branch that was taken is the one that only reads.
fn ends_in_get(responses: &[TxnOpResponse]) -> bool {
    match responses.first() {
        Some(TxnOpResponse::Get(_)) => true,
        Some(TxnOpResponse::Txn(inner)) => ends_in_get(&inner.op_responses()),
        _ => false,
    }
}
