//! The client for etcd, for all that is kept there: nodes, purges, cursors, replicas.
//!
//! The client library does not recover by itself: its streams die with their connection, and its balancer keeps choosing a
//! member that hangs. So a connection here is to one member, chosen in turn from a list that each process has shuffled. It
//! is dropped at the first error that it may have caused; the next connection is to the next member, with a new token and
//! the current content of the password file.
//!
//! Three things are built on it, each with its own recovery:
//!
//! - [`follow`]: the keys under a prefix, as a list and the changes since.
//! - [`Registration`]: a key that exists as long as this process.
//! - single requests ([`Session::request`]), for callers that can do without an answer.
//!
//! Every wait has a timeout, and no caller delays another: a failure is an error, and the caller continues with what it
//! knows. Behaviour of etcd 3.4 to 3.6 and its clients that has shaped a rule is noted at the rule.

mod error;
pub mod follow;
mod registration;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};

use crate::backoff::Backoff;
use crate::config;

pub use error::EtcdError;
pub use registration::{Registration, RegistrationStatus};

/// The timeout of connecting, and of any request. A leader is elected within a second or two; after that, another member is
/// the better choice.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// HTTP/2 pings: a member that hangs, or a cut link, sends no FIN. etcd treats pings more often than every 5 s as abuse
/// (`--grpc-keepalive-min-time`).
const PING_EVERY: Duration = Duration::from_secs(6);
const PING_PATIENCE: Duration = Duration::from_secs(3);

/// The bounds of the pauses after failures. Each pause is random between zero and the bound, including the first, so that a
/// hundred clients of a dead member do not reach the next one at once.
const BACKOFF: Backoff = Backoff { min: Duration::from_secs(1), max: Duration::from_secs(8) };

/// The address of etcd, and the credentials.
#[derive(Debug)]
pub struct EtcdCluster {
    config: config::Etcd,
    /// In the random order of this process.
    endpoints: Vec<String>,
    next: AtomicUsize,
}

/// A connection to one member.
pub struct Session {
    /// For requests with their own timeout.
    pub client: Client,
    /// The address of the member.
    pub endpoint: String,
    /// The raft position of the member when it was last asked.
    pub position: RaftPosition,
}

/// The progress of a member in the history of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RaftPosition {
    /// The cluster id: another id means another history.
    pub cluster: u64,
    /// Raft's term and index, which only increase. A cluster restored from a backup starts low, whatever its revision.
    pub term: u64,
    /// See `term`.
    pub index: u64,
}

impl RaftPosition {
    /// Whether this position cannot follow `before`: the history has begun anew, or this member lags.
    pub fn goes_back_behind(&self, before: &RaftPosition) -> bool {
        self.cluster != before.cluster || self.term < before.term || self.index < before.index
    }
}

impl EtcdCluster {
    /// The configured etcd. Does not connect yet.
    pub fn new(config: &config::Etcd) -> Self {
        let mut endpoints = config.endpoints.clone();
        fastrand::shuffle(&mut endpoints);
        EtcdCluster { config: config.clone(), endpoints, next: AtomicUsize::new(0) }
    }

    /// The prefix of all keys of this fleet; ends in `/`.
    pub fn prefix(&self) -> &str {
        &self.config.prefix
    }

    /// A key of this fleet.
    pub fn key(&self, name: &str) -> String {
        format!("{}{name}", self.config.prefix)
    }

    /// Connects to the next member that answers. Tries each member once, for at most [`PATIENCE`] each.
    ///
    /// # Errors The error of the last member, if none can be used.
    pub async fn connect(&self) -> Result<Session, EtcdError> {
        let mut failure = EtcdError::Closed;
        for _ in 0..self.endpoints.len() {
            let turn = self.next.fetch_add(1, Ordering::Relaxed);
            let endpoint = &self.endpoints[turn % self.endpoints.len()];
            match self.connect_to(endpoint).await {
                Ok(session) => return Ok(session),
                Err(reason) => failure = EtcdError::At(endpoint.clone(), Box::new(reason)),
            }
        }
        Err(failure)
    }

    async fn connect_to(&self, endpoint: &str) -> Result<Session, EtcdError> {
        let options = self.options()?;
        let connected = async {
            let client = Client::connect([endpoint], Some(options.clone().with_credentials(&self.config)?)).await;
            match client {
                // The configuration may name a user before etcd requires one.
                Err(error) if error::wants_no_user(&error) => {
                    Ok::<_, EtcdError>(Client::connect([endpoint], Some(options.0)).await?)
                }
                client => Ok(client?),
            }
        };
        let mut client = bounded(connected).await?;
        // The client connects with its first request. A status request needs no permission, and shows whether there is a
        // leader.
        let position = position(&mut client).await?;
        tracing::debug!(endpoint, ?position, "connected to etcd");
        Ok(Session { client, endpoint: endpoint.to_owned(), position })
    }

    fn options(&self) -> Result<Options, EtcdError> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(PATIENCE)
            .with_keep_alive(PING_EVERY, PING_PATIENCE)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        let config::Etcd { ca, cert, key, .. } = &self.config;
        let Some(ca) = ca else { return Ok(Options(options)) };
        let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(error::read(ca)?));
        if let (Some(cert), Some(key)) = (cert, key) {
            tls = tls.identity(Identity::from_pem(error::read(cert)?, error::read(key)?));
        }
        options = options.with_tls(tls);
        Ok(Options(options))
    }
}

/// The options of a connection, without the user.
#[derive(Clone)]
struct Options(ConnectOptions);

impl Options {
    fn with_credentials(self, config: &config::Etcd) -> Result<ConnectOptions, EtcdError> {
        let (Some(username), Some(password_file)) = (&config.username, &config.password_file) else {
            return Ok(self.0);
        };
        // Read each time: the connection may have been lost because the password was changed.
        let password = String::from_utf8_lossy(&error::read(password_file)?).trim_end().to_owned();
        Ok(self.0.with_user(username, password))
    }
}

/// Asks a member for its raft position. A member without a leader is an error.
async fn position(client: &mut Client) -> Result<RaftPosition, EtcdError> {
    let status = bounded(async { Ok(client.status().await?) }).await?;
    if status.leader() == 0 {
        return Err(EtcdError::NoLeader);
    }
    let cluster = status.header().map_or(0, etcd_client::ResponseHeader::cluster_id);
    Ok(RaftPosition { cluster, term: status.raft_term(), index: status.raft_index() })
}

impl Session {
    /// Asks the member for its raft position.
    ///
    /// # Errors
    /// [`EtcdError`]: it does not answer, or has no leader.
    pub async fn look(&mut self) -> Result<RaftPosition, EtcdError> {
        self.position = position(&mut self.client).await?;
        Ok(self.position)
    }

    /// Sends one request to this member, and waits for its answer for at most [`PATIENCE`].
    ///
    /// # Errors [`EtcdError`]. Without an answer it is unknown whether the request was carried out.
    pub async fn request<T, F>(&self, request: impl FnOnce(Client) -> F) -> Result<T, EtcdError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let answer = request(self.client.clone());
        bounded(async { Ok(answer.await?) }).await
    }
}

/// Waits for at most [`PATIENCE`].
async fn bounded<T>(answer: impl Future<Output = Result<T, EtcdError>>) -> Result<T, EtcdError> {
    tokio::time::timeout(PATIENCE, answer).await.unwrap_or(Err(EtcdError::NoAnswer))
}

/// The pauses between attempts, random between zero and a bound that doubles (full jitter), so that the clients of a lost
/// member spread out.
#[derive(Debug, Default)]
pub struct Pauses {
    failures: u32,
}

impl Pauses {
    /// Resets the bound after a success.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Waits before the next attempt.
    pub async fn wait(&mut self) {
        tokio::time::sleep(self.next()).await;
    }

    fn next(&mut self) -> Duration {
        self.failures = self.failures.saturating_add(1);
        BACKOFF.pause(self.failures, fastrand::f64())
    }
}

/// The id of a lease; 0 is not a valid id.
pub type LeaseId = std::num::NonZeroI64;

/// Shared by the whole process, so that its connections use the members in turn.
pub type SharedEtcd = Arc<EtcdCluster>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_spread_over_a_bound_that_doubles_up_to_the_longest() {
        for _ in 0..100 {
            let mut pauses = Pauses::default();
            for bound in [1, 2, 4, 8, 8] {
                assert!(pauses.next() <= Duration::from_secs(bound));
            }
        }
        let firsts: Vec<Duration> = (0..1000).map(|_| Pauses::default().next()).collect();
        let early = firsts.iter().filter(|pause| **pause < BACKOFF.min / 2).count();
        assert!((350..650).contains(&early), "{early} of 1000 in the first half");
    }
}
