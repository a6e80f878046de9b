//! From `HOST:PORT` to an address, by the system's resolver: the name server, `/etc/hosts`, whatever it is told to use.

use std::net::SocketAddr;
use std::time::Duration;

/// How long one look-up may take: a name server that does not answer must not hold up the start.
const LOOKUP: Duration = Duration::from_secs(2);

/// The first address of `address`, or why there is none.
pub(super) async fn resolve(address: &str) -> Result<SocketAddr, String> {
    match tokio::time::timeout(LOOKUP, tokio::net::lookup_host(address)).await {
        Err(_) => Err(format!("no answer within {LOOKUP:?}")),
        Ok(Err(error)) => Err(error.to_string()),
        Ok(Ok(mut addresses)) => addresses.next().ok_or_else(|| "the name has no address".to_owned()),
    }
}
