//! The start: determines when every node has been announced to the fleet, and uses the fleet on disk if etcd does not
//! answer.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;

use super::snapshot::SavedNode;
use super::{EtcdRegistry, NobodyListens};
use crate::etcd::LeaseId;
use crate::fleet::{Event, NodeSource};
use crate::registry::resolve::LOOKUP;

/// How long to wait for the first list of etcd before the last fleet on disk is used.
const PATIENCE: Duration = Duration::from_secs(3);

/// The phase of the start.
#[derive(Clone, Copy)]
pub(super) enum StartPhase {
    /// Nothing is known yet. At this time the fleet on disk is read.
    Waiting(Instant),
    /// Nothing is known, and the disk has nothing either.
    Nothing,
    /// The nodes are known, except for some addresses, which have until this time to resolve.
    Resolving(Instant),
    /// Every node has been announced to the fleet.
    Done,
}

impl StartPhase {
    pub(super) fn new() -> Self {
        StartPhase::Waiting(Instant::now() + PATIENCE)
    }

    /// etcd has listed every node.
    pub(super) fn listed(&mut self) {
        if matches!(self, StartPhase::Waiting(_) | StartPhase::Nothing) {
            *self = StartPhase::Resolving(Instant::now() + LOOKUP);
        }
    }

    /// Returns at the deadline of the phase; never if the phase has none.
    pub(super) async fn due(self) {
        match self {
            StartPhase::Waiting(until) | StartPhase::Resolving(until) => tokio::time::sleep_until(until).await,
            StartPhase::Nothing | StartPhase::Done => std::future::pending().await,
        }
    }
}

impl EtcdRegistry {
    /// Handles the deadline of the phase: etcd has not answered, or an address has not resolved in time.
    pub(super) async fn start_is_due(&mut self) -> Result<(), NobodyListens> {
        if let StartPhase::Resolving(_) = self.start {
            self.start = StartPhase::Done;
            return self.tell(Event::Listed(NodeSource::Etcd)).await;
        }
        let Some(saved) = self.disk.read().await else {
            tracing::warn!(
                "etcd has not given the nodes in time, and there is no last fleet on disk: waiting for etcd"
            );
            self.start = StartPhase::Nothing;
            return Ok(());
        };
        tracing::warn!(
            nodes = saved.nodes.len(),
            revision = saved.revision,
            "etcd has not given the nodes in time: the last fleet on disk is taken"
        );
        (self.cluster, self.revision) = (saved.cluster, saved.revision);
        for SavedNode { key, lease, record, spec } in saved.nodes {
            let address = record.address.clone();
            if address.parse::<SocketAddr>().is_err() {
                self.names.want(&key, &address);
            }
            self.roster.restore(key.clone(), LeaseId::new(lease), record);
            self.announce(key, address, spec).await?;
        }
        self.start = StartPhase::Done;
        self.tell(Event::Listed(NodeSource::Etcd)).await
    }

    /// Reports that all nodes are announced, once they are.
    pub(super) async fn finish_start(&mut self) -> Result<(), NobodyListens> {
        if matches!(self.start, StartPhase::Resolving(_)) && self.names.have_resolved() {
            self.start = StartPhase::Done;
            self.tell(Event::Listed(NodeSource::Etcd)).await?;
        }
        Ok(())
    }
}
