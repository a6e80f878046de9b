//! Looks names up again, concurrently, without blocking the follower of the nodes.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::fleet::NodeKey;
use crate::registry::resolve::{AT_ONCE, Resolve, Resolved};
use crate::telemetry::causes;

/// The look-ups that are under way.
pub(super) struct Lookups {
    resolve: Resolve,
    tasks: JoinSet<(NodeKey, String, Resolved)>,
}

impl Lookups {
    pub(super) fn new(resolve: Resolve) -> Self {
        Lookups { resolve, tasks: JoinSet::new() }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Looks up the name of each of these nodes.
    pub(super) fn begin(&mut self, names: Vec<(NodeKey, String)>) {
        let room = Arc::new(Semaphore::new(AT_ONCE));
        for (identity, name) in names {
            let (room, resolve) = (Arc::clone(&room), Arc::clone(&self.resolve));
            self.tasks.spawn(async move {
                // The semaphore is never closed.
                let _place = room.acquire().await;
                let found = resolve(name.clone()).await;
                (identity, name, found)
            });
        }
    }

    /// The next result; never returns while no look-up is under way.
    pub(super) async fn next(&mut self) -> (NodeKey, String, Resolved) {
        loop {
            match self.tasks.join_next().await {
                Some(Ok(found)) => return found,
                Some(Err(error)) => tracing::error!(error = %causes(&error), "a look-up panicked; it is tried again"),
                None => std::future::pending().await,
            }
        }
    }
}
