//! Why a key is gone from etcd: deleted, or expired.
//!
//! etcd reports that a key is gone, and not why. It may have been deleted, or its lease has expired: then the node may
//! be as healthy as ever while its agent, or etcd, is not. If the lease still exists, the key was deleted.
//!
//! One task queries etcd over a connection of its own, so that nothing else waits for the answers, and with a time
//! limit: if the answer is unknown, the key counts as expired, which is the safe error. An agent that revokes its lease
//! together with its key looks like one that died; a health check soon shows the difference.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use super::roster::Departure;
use crate::etcd::{EtcdError, LeaseId, Session, SharedEtcd};
use crate::telemetry::causes;

/// The time limit of a batch of queries, including a new connection if there is none.
const PATIENCE: Duration = Duration::from_secs(4);

/// The number of concurrent queries.
const AT_ONCE: usize = 32;

/// The maximum number of departures per batch.
const TOGETHER: usize = 4096;

/// How a node left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    /// The key was deleted.
    Deleted,
    /// The lease has expired, or its fate is unknown.
    Expired,
}

/// Answers each departure that is received, in any order, until the sender is gone. The number identifies the question.
pub(super) async fn ask(
    etcd: SharedEtcd,
    mut questions: mpsc::Receiver<(u64, Departure)>,
    answers: mpsc::Sender<(u64, Departure, Manner)>,
) {
    let mut session = None;
    let mut together = Vec::new();
    while questions.recv_many(&mut together, TOGETHER).await > 0 {
        let leases: BTreeSet<LeaseId> = together.iter().filter_map(|(_, departure)| departure.lease).collect();
        let mut alive = BTreeMap::new();
        let asked = tokio::time::timeout(PATIENCE, ask_all(&etcd, &mut session, leases, &mut alive)).await;
        if !matches!(asked, Ok(Ok(()))) {
            session = None;
            let error = asked.map_or(EtcdError::NoAnswer, |result| result.err().unwrap_or(EtcdError::NoAnswer));
            tracing::warn!(error = %causes(&error), "etcd cannot be asked why nodes are gone: as if nobody had said so");
        }
        for (number, departure) in together.drain(..) {
            let exists = departure.lease.is_some_and(|lease| alive.get(&lease).copied().unwrap_or(false));
            let manner = if exists { Manner::Deleted } else { Manner::Expired };
            if answers.send((number, departure, manner)).await.is_err() {
                return;
            }
        }
    }
}

/// Fills in whether the leases still exist. Uses the open connection; if that fails, retries once over a new one.
async fn ask_all(
    etcd: &SharedEtcd,
    session: &mut Option<Arc<Session>>,
    leases: BTreeSet<LeaseId>,
    alive: &mut BTreeMap<LeaseId, bool>,
) -> Result<(), EtcdError> {
    if let Some(open) = session
        && ask_over(open, &leases, alive).await.is_ok()
    {
        return Ok(());
    }
    let new = Arc::new(etcd.connect().await?);
    *session = Some(Arc::clone(&new));
    ask_over(&new, &leases, alive).await
}

async fn ask_over(
    session: &Arc<Session>,
    leases: &BTreeSet<LeaseId>,
    alive: &mut BTreeMap<LeaseId, bool>,
) -> Result<(), EtcdError> {
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let mut questions = JoinSet::new();
    for &lease in leases.iter().filter(|lease| !alive.contains_key(*lease)) {
        let (session, room) = (Arc::clone(session), Arc::clone(&room));
        questions.spawn(async move {
            // The semaphore is never closed.
            let _permit = room.acquire().await;
            let answer = session.request(async |mut client| client.lease_time_to_live(lease.get(), None).await).await;
            (lease, answer)
        });
    }
    while let Some(answer) = questions.join_next().await {
        let (lease, answer) = match answer {
            Ok(answered) => answered,
            Err(error) => {
                tracing::error!(error = %causes(&error), "a question about a lease panicked");
                continue;
            }
        };
        match answer {
            // A lease that has expired but is not removed yet counts as expired.
            Ok(answer) => _ = alive.insert(lease, answer.ttl() > 0),
            Err(failure) if failure.is_lease_lost() => _ = alive.insert(lease, false),
            Err(failure) => return Err(failure),
        }
    }
    Ok(())
}
