//! What is seen of caches, told from replica to replica: which ones may have something without a seal.
//!
//! Each replica tries each Varnish now and then, and a VCL may drop seals for minutes before the last of them has noticed.
//! So the first that does tells the others, and tells them again when it has seen the cache empty. What one says counts for
//! as long as it is there ([`Deliveries::hear_seen_caches`](crate::delivery::Deliveries::hear_seen_caches)).

use std::collections::HashSet;
use std::convert::Infallible;
use std::sync::Arc;

use super::super::{Message, Replicas};
use super::{BACKOFF, Peer};
use crate::delivery::SeenCaches;
use crate::telemetry::causes;

impl Replicas {
    /// Takes over what another replica sees of caches. Returns the serial of what counts; 0 if it was not met yet, as it would
    /// not be noticed when that one is gone.
    pub(in crate::replicas) fn hear_seen_caches(&self, message: &Message, seen: SeenCaches) -> u64 {
        let Some(record) = &message.record else { return 0 };
        // Whoever is removed is removed before that is reviewed.
        let _reviewing = self.blocks.reviewing.lock();
        let is_met = self.sharing().iter().any(|peer| peer.id == message.from && peer.record.boot == record.boot);
        if is_met { self.context.deliveries.hear_seen_caches(&record.boot, seen) } else { 0 }
    }

    /// Forgets what replicas have seen that are not among these any more.
    pub(in crate::replicas) fn keep_seen_of(&self, peers: &[Arc<Peer>]) {
        let boots: HashSet<&str> = peers.iter().map(|peer| peer.record.boot.as_str()).collect();
        self.context.deliveries.forget_processes_but(&boots);
    }
}

/// Tells a peer what is seen here, now and after each change.
pub(super) async fn tell(replicas: &Replicas, peer: &Peer) -> Infallible {
    let Some(mut seen) = replicas.context.deliveries.watch_seen_caches() else { return std::future::pending().await };
    let mut failures = 0_u32;
    loop {
        let now = seen.borrow_and_update().clone();
        let serial = now.serial;
        // Before anything was seen there is nothing to say.
        let answer =
            if serial == 0 { Ok(None) } else { peer.tell_caches(replicas, now).await.map(|said| said.seen_caches) };
        match answer {
            // One that says nothing is of a version beside which it does what it does by its own trials.
            Ok(heard) if heard.is_none_or(|heard| heard >= serial) => {
                failures = 0;
                if seen.changed().await.is_err() {
                    return std::future::pending().await;
                }
                continue;
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(replica = %peer.id, error = %causes(&error), "a replica is not told of caches");
            }
        }
        failures = failures.saturating_add(1);
        tokio::time::sleep(BACKOFF.pause(failures, 0.5 + 0.5 * fastrand::f64())).await;
    }
}
