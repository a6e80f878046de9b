//! The addresses of the clearcoats' origin listeners, looked up again and again.
//!
//! A varnishd resolves the name of a backend once, when it loads a VCL, so whoever writes a VCL resolves the names himself.
//!
//! A name that does not resolve keeps its last addresses for a while: a resolver that is late for once, which lookups do not tell from
//! a name that is gone, must not take a clearcoat from the VCL, and its address from the list of those who may purge.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::lookup_host;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::vcl::OriginAddress;

/// How long a lookup may take.
const LOOKUP: Duration = Duration::from_secs(5);

/// How long a name that does not resolve any more keeps its last addresses.
const KEPT: Duration = Duration::from_secs(30);

/// Names of origin listeners, and the addresses that they had last.
#[derive(Debug)]
pub struct OriginNames {
    origins: Vec<OriginAddress>,
    /// The last addresses of each, and when it had them.
    last: Vec<Option<(Instant, Vec<SocketAddr>)>>,
}

impl OriginNames {
    /// A name may have several addresses, of one clearcoat each.
    pub fn new(origins: Vec<OriginAddress>) -> Self {
        OriginNames { last: vec![None; origins.len()], origins }
    }

    /// All addresses of all names, each once, and the names without one, with the reason. All are asked for at once: a
    /// resolver may take its time to say that a name is gone.
    pub async fn resolve(&mut self) -> (BTreeSet<SocketAddr>, Vec<String>) {
        let mut lookups = JoinSet::new();
        for (index, OriginAddress { host, port }) in self.origins.iter().enumerate() {
            let (host, port) = (host.trim_matches(['[', ']']).to_owned(), *port);
            lookups.spawn(async move {
                let resolved = tokio::time::timeout(LOOKUP, lookup_host((host.as_str(), port))).await;
                let addresses = resolved.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
                (index, addresses.map(Vec::from_iter).map_err(|error| format!("{host}: {error}")))
            });
        }
        let (mut found, mut without) = (BTreeSet::new(), vec![]);
        let now = Instant::now();
        for (index, resolved) in lookups.join_all().await {
            match (resolved, &self.last[index]) {
                (Ok(addresses), _) => {
                    found.extend(addresses.iter().copied());
                    self.last[index] = Some((now, addresses));
                }
                (Err(_), Some((at, addresses))) if now.duration_since(*at) < KEPT => found.extend(addresses),
                (Err(reason), _) => without.push(reason),
            }
        }
        // In the order of their answers they would be another complaint each time.
        without.sort();
        (found, without)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_name_that_does_not_resolve_for_once_keeps_its_addresses_for_a_while() {
        let at = |host: &str| OriginAddress { host: host.to_owned(), port: 8081 };
        let [there, late]: [SocketAddr; 2] =
            ["127.0.0.1:8081", "127.0.0.2:8081"].map(|address| address.parse().unwrap());
        // The second is no name, so the system's resolver says at once that it has no address.
        let mut names = OriginNames::new(vec![at("127.0.0.1"), at("a b")]);
        names.last[1] = Some((Instant::now(), vec![late]));
        assert_eq!(names.resolve().await, ([there, late].into(), vec![]));
        tokio::time::advance(KEPT).await;
        let (found, without) = names.resolve().await;
        assert_eq!((found, without.len()), ([there].into(), 1));
    }
}
