//! Addresses that are given by name, as containers are.

use std::net::SocketAddr;
use std::time::Duration;

/// How long after a failed look-up the next one follows.
pub(super) const RETRY: Duration = Duration::from_secs(2);

/// How long one look-up may take: a name server that does not answer must not hold up the start.
pub(super) const LOOKUP: Duration = Duration::from_secs(2);

/// The first address of a `HOST:PORT`.
pub(super) async fn resolve(address: &str) -> Result<SocketAddr, String> {
    resolve_all(address).await.map(|addresses| addresses[0])
}

/// The addresses of a `HOST:PORT`, at least one, as the system has them: from its hosts file, a container engine's name server,
/// or whatever else it is set up with.
pub(super) async fn resolve_all(address: &str) -> Result<Vec<SocketAddr>, String> {
    match tokio::time::timeout(LOOKUP, tokio::net::lookup_host(address)).await {
        Err(_) => Err(format!("no answer within {LOOKUP:?}")),
        Ok(Err(error)) => Err(error.to_string()),
        Ok(Ok(addresses)) => {
            let addresses: Vec<SocketAddr> = addresses.collect();
            if addresses.is_empty() { Err("the name has no address".to_owned()) } else { Ok(addresses) }
        }
    }
}
