//! Addresses that are given by name, as containers are.
//!
//! A name that has resolved is looked up again, every few seconds, and soon after a health check of a node has failed:
//! a recreated container has another address. The system's resolver knows the hosts file and the container engine's
//! names, but does not return a TTL. A node keeps its address while the answer contains it, in any position, and while
//! the look-up fails.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// The pause after a failed look-up.
pub(super) const RETRY: Duration = Duration::from_secs(2);

/// How often names that have resolved are looked up again.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(10);

/// The number of concurrent look-ups of a registry: each takes a thread.
pub(super) const AT_ONCE: usize = 16;

/// The addresses of a name with a port, at least one, or why there are none.
pub(super) type Resolved = Result<Vec<SocketAddr>, String>;

/// A resolver of names.
pub(super) type Resolve = Arc<dyn Fn(String) -> Pin<Box<dyn Future<Output = Resolved> + Send>> + Send + Sync>;

/// The system's resolver.
pub(super) fn system() -> Resolve {
    Arc::new(|name| Box::pin(async move { resolve_all(&name).await }))
}

/// Returns when names, last looked up at `looked`, are due again: sooner if they are doubted, but never at once.
pub(super) async fn look_again(doubted: &mut watch::Receiver<()>, looked: Instant) {
    tokio::time::sleep_until(looked + RETRY).await;
    tokio::select! {
        // If the sender is gone, only the interval counts.
        Ok(()) = doubted.changed() => {}
        () = tokio::time::sleep_until(looked + LOOK_EVERY) => {}
    }
}

/// How long one look-up may take: a name server that does not answer must not hold up the start.
pub(super) const LOOKUP: Duration = Duration::from_secs(2);

async fn resolve_all(address: &str) -> Resolved {
    match tokio::time::timeout(LOOKUP, tokio::net::lookup_host(address)).await {
        Err(_) => Err(format!("no answer within {LOOKUP:?}")),
        Ok(Err(error)) => Err(error.to_string()),
        Ok(Ok(addresses)) => {
            let addresses: Vec<SocketAddr> = addresses.collect();
            if addresses.is_empty() { Err("the name has no address".to_owned()) } else { Ok(addresses) }
        }
    }
}
