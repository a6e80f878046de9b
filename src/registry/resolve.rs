//! Addresses that are given by name, as containers are.

use std::net::SocketAddr;
use std::time::Duration;

/// How long after a failed look-up the next one follows.
pub(super) const RETRY: Duration = Duration::from_secs(2);

/// How long one look-up may take: a name server that does not answer must not hold up the start.
pub(super) const LOOKUP: Duration = Duration::from_secs(2);

/// The first address of a `HOST:PORT`.
pub(super) async fn resolve(address: &str) -> Result<SocketAddr, String> {
    match tokio::time::timeout(LOOKUP, tokio::net::lookup_host(address)).await {
        Err(_) => Err(format!("no answer within {LOOKUP:?}")),
        Ok(Err(error)) => Err(error.to_string()),
        Ok(Ok(mut addresses)) => addresses.next().ok_or_else(|| "the name has no address".to_owned()),
    }
}
