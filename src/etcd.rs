//! One way to talk to etcd, for all that is kept there: nodes, purges, cursors, replicas.
//!
//! The client library does not come back by itself: its streams die with their connection, and its balancer goes on
//! choosing a member that hangs. So a connection here is to one member, chosen in turn from a list that each process has
//! shuffled, and is thrown away with the first error that the connection could be to blame for: the next one is to the
//! next member, with a new token and the password as the file has it by then.
//!
//! Three things are built on it, each knowing how to come back:
//!
//! - [`follow`]: the keys under a prefix, as a list and the changes since.
//! - [`Registration`]: one key that is there for as long as we are.
//! - single requests ([`Session::request`]), for callers that can do without an answer.
//!
//! Nothing here waits without end, and nothing keeps anybody else waiting: what cannot be had is an error, and the caller
//! goes on with what it knows. What is known of etcd 3.4 to 3.6 and of its clients, and has shaped the rules, stands at
//! the rules.

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

/// How long connecting may take, and any answer to a request. A leader is elected within a second or two; what takes
/// longer is better asked for elsewhere.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// HTTP/2 pings: a member that hangs, or a link that is cut, sends no FIN. etcd takes pings that come faster than
/// every 5 s for abuse (`--grpc-keepalive-min-time`).
const PING_EVERY: Duration = Duration::from_secs(6);
const PING_PATIENCE: Duration = Duration::from_secs(3);

/// The bound of the pauses after failures; each is anything up to it, the first as well, so that a hundred clients of a
/// member that died do not meet at the next one.
const BACKOFF: Backoff = Backoff { min: Duration::from_secs(1), max: Duration::from_secs(8) };

/// Where etcd is, and how to get in.
#[derive(Debug)]
pub struct EtcdCluster {
    config: config::Etcd,
    /// In the order of this process.
    endpoints: Vec<String>,
    next: AtomicUsize,
}

/// A connection to one member.
pub struct Session {
    /// For requests that are bounded elsewhere.
    pub client: Client,
    /// The member.
    pub endpoint: String,
    /// The raft position of the member when it was asked.
    pub position: RaftPosition,
}

/// How far a member has come in the history of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RaftPosition {
    /// Names the cluster: another id is another history.
    pub cluster: u64,
    /// Raft's term and index, which only grow. A cluster that was restored from a backup starts with small ones, whatever
    /// its revision is by then.
    pub term: u64,
    /// See `term`.
    pub index: u64,
}

impl RaftPosition {
    /// Whether this cannot follow that: the history has begun anew, or this member lags.
    pub fn goes_back_behind(&self, before: &RaftPosition) -> bool {
        self.cluster != before.cluster || self.term < before.term || self.index < before.index
    }
}

impl EtcdCluster {
    /// The etcd of this configuration. Does not connect yet.
    pub fn new(config: &config::Etcd) -> Self {
        let mut endpoints = config.endpoints.clone();
        fastrand::shuffle(&mut endpoints);
        EtcdCluster { config: config.clone(), endpoints, next: AtomicUsize::new(0) }
    }

    /// What every key of this fleet starts with; ends in `/`.
    pub fn prefix(&self) -> &str {
        &self.config.prefix
    }

    /// A key of this fleet.
    pub fn key(&self, name: &str) -> String {
        format!("{}{name}", self.config.prefix)
    }

    /// Connects to the next member that answers; asks each once, so this may take [`PATIENCE`] for each that does not.
    ///
    /// # Errors
    /// The error of the last one, if none was of use.
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
                // A user may be configured here before etcd asks for one.
                Err(error) if error::wants_no_user(&error) => {
                    Ok::<_, EtcdError>(Client::connect([endpoint], Some(options.0)).await?)
                }
                client => Ok(client?),
            }
        };
        let mut client = bounded(connected).await?;
        // It connects with its first request. A status request needs no permission, and shows whether there is a
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

/// How to connect, but for the user.
#[derive(Clone)]
struct Options(ConnectOptions);

impl Options {
    fn with_credentials(self, config: &config::Etcd) -> Result<ConnectOptions, EtcdError> {
        let (Some(username), Some(password_file)) = (&config.username, &config.password_file) else {
            return Ok(self.0);
        };
        // Read each time: it may have been changed, and that may be why the last connection was lost.
        let password = String::from_utf8_lossy(&error::read(password_file)?).trim_end().to_owned();
        Ok(self.0.with_user(username, password))
    }
}

/// Asks a member for its raft position; one without a leader is an error.
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

    /// Makes one request of this member, and waits for its answer for [`PATIENCE`] at most.
    ///
    /// # Errors
    /// [`EtcdError`]; whether the request was carried out is not known if no answer came.
    pub async fn request<T, F>(&self, request: impl FnOnce(Client) -> F) -> Result<T, EtcdError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let answer = request(self.client.clone());
        bounded(async { Ok(answer.await?) }).await
    }
}

/// Waits no longer than [`PATIENCE`].
async fn bounded<T>(answer: impl Future<Output = Result<T, EtcdError>>) -> Result<T, EtcdError> {
    tokio::time::timeout(PATIENCE, answer).await.unwrap_or(Err(EtcdError::NoAnswer))
}

/// The pauses between attempts: each is anything from nothing to a bound that doubles (full jitter), so that many who
/// lost the same member spread over all of it.
#[derive(Debug, Default)]
pub struct Pauses {
    failures: u32,
}

impl Pauses {
    /// Resets after a success: the next failure is a first one.
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

/// The id of a lease; etcd gives none the number 0.
pub type LeaseId = std::num::NonZeroI64;

/// One for the whole process: its connections take the members in turn.
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
