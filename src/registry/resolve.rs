//! Addresses that are given by name, as containers are.
//!
//! A name that has resolved is looked up again, every few seconds, and soon after a health check of a node has failed: a
//! container that was made anew has another address. The system's resolver knows the hosts file and the container engine's
//! names, and does not say how long an answer holds. An address stays for as long as the name has it, in whatever order, and
//! while the look-up fails.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// How long after a failed look-up the next one follows.
pub(super) const RETRY: Duration = Duration::from_secs(2);

/// How often names that have resolved are looked up again.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(10);

/// How many look-ups a registry makes at once: each has a thread.
pub(super) const AT_ONCE: usize = 16;

/// The addresses of a name with a port, at least one, or why there are none.
pub(super) type Resolved = Result<Vec<SocketAddr>, String>;

/// A resolver of names.
pub(super) type Resolve = Arc<dyn Fn(String) -> Pin<Box<dyn Future<Output = Resolved> + Send>> + Send + Sync>;

/// The system's.
pub(super) fn system() -> Resolve {
    Arc::new(|name| Box::pin(async move { resolve_all(&name).await }))
}

/// Returns when names, last looked up at `looked`, are due again: sooner if they are doubted, but never at once.
pub(super) async fn look_again(doubted: &mut watch::Receiver<()>, looked: Instant) {
    tokio::time::sleep_until(looked + RETRY).await;
    tokio::select! {
        // Without a sender nobody doubts any more.
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
