//! What operators say of nodes, told from replica to replica where no etcd does that.
//!
//! Each replica tells each other one its whole table, when they meet and after each change, until it is confirmed; the answer
//! is the other's table. Tables are merged ([`crate::fleet::Overrides`]), so it does not matter who was away, who told whom
//! first, or how often. Unlike purges they are passed on: what is learnt from one replica is a change like any other.
//!
//! Only clearcoats whose operators may order anything (`admin.token_file`) take part: who may purge must not be able to drain
//! nodes of a fleet where that is off.
//!
//! These messages have no purges: a table that is too long for `purge.max_request` there delays none.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use super::super::Replicas;
use super::super::call::PeerError;
use super::Peer;
use crate::backoff::Backoff;
use crate::fleet::{NamedOverride, NodeId};
use crate::telemetry::causes;

/// The bounds of the pauses after failures; each pause is at least half of its bound.
const BACKOFF: Backoff = Backoff { min: Duration::from_millis(50), max: Duration::from_secs(2) };

impl Replicas {
    /// All overrides that are known here; `None` if replicas do not tell each other.
    pub(in crate::replicas) fn overrides_to_tell(&self) -> Option<Vec<NamedOverride>> {
        self.context.overrides.as_ref().map(|store| store.known().overrides.to_named())
    }

    /// Takes the overrides that another replica knows.
    pub(in crate::replicas) fn hear_overrides(&self, theirs: Option<Vec<NamedOverride>>) {
        if let (Some(store), Some(theirs)) = (&self.context.overrides, theirs) {
            store.merge(theirs);
        }
    }

    /// Waits until every other replica has the overrides of now, for at most `ack_timeout`. Returns those that do not, or may
    /// not. Where they are in etcd, the others learn of them there, and nobody is waited for.
    pub async fn overrides_told(&self) -> Vec<NodeId> {
        let Some(store) = &self.context.overrides else { return Vec::new() };
        let serial = store.known().serial;
        let untold =
            || self.sharing().into_iter().filter(|peer| !peer.has_overrides(serial)).collect::<Vec<Arc<Peer>>>();
        let told = self.progress.until(|| untold().iter().all(|peer| peer.is_late()));
        // Who is not told is named.
        _ = tokio::time::timeout(self.context.ack_timeout, told).await;
        untold().iter().map(|peer| peer.id.clone()).chain(self.unmet()).collect()
    }
}

/// Tells a peer our overrides, now and after each change.
pub(super) async fn tell(replicas: &Replicas, peer: &Peer) -> Infallible {
    let Some(store) = &replicas.context.overrides else { return std::future::pending().await };
    let mut known = store.watch();
    let mut failures = 0_u32;
    loop {
        let now = Arc::clone(&known.borrow_and_update());
        match told(replicas, peer, now.overrides.to_named()).await {
            Ok(()) => {
                failures = 0;
                peer.record_overrides(now.serial);
                replicas.progress.notify();
                if known.changed().await.is_err() {
                    return std::future::pending().await;
                }
            }
            Err(error) => {
                failures = failures.saturating_add(1);
                if failures == 1 {
                    tracing::warn!(replica = %peer.id, error = %causes(&error), "a replica does not know what operators say of nodes; it is told again");
                }
                tokio::time::sleep(BACKOFF.pause(failures, 0.5 + 0.5 * fastrand::f64())).await;
            }
        }
    }
}

async fn told(replicas: &Replicas, peer: &Peer, ours: Vec<NamedOverride>) -> Result<(), PeerError> {
    let answer = peer.tell_overrides(replicas, ours).await?;
    let theirs = answer.overrides.ok_or(PeerError::KnowsNoOverrides)?;
    replicas.hear_overrides(Some(theirs));
    Ok(())
}
