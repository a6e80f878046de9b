//! Looks names up again, side by side, while the nodes go on being followed.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::AT_ONCE;
use crate::fleet::NodeKey;
use crate::registry::resolve::resolve_all;
use crate::telemetry::causes;

/// The addresses of a name with a port, or why there are none.
pub(super) type Resolved = Result<Vec<SocketAddr>, String>;

/// A resolver of names.
pub(super) type Resolve = Arc<dyn Fn(String) -> Pin<Box<dyn Future<Output = Resolved> + Send>> + Send + Sync>;

/// The system.
pub(super) fn system() -> Resolve {
    Arc::new(|name| Box::pin(async move { resolve_all(&name).await }))
}

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
                // Nobody closes it.
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
