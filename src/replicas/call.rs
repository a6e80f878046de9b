//! A message to another replica, and its answer.

use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use parking_lot::Mutex;
use tokio::net::TcpStream;

use super::message::{Confirmation, Message};
use super::{MISDIRECTED, NAMES, PATH, PURGES, Replicas};
use crate::http_client::{self, HttpConnection};

/// The maximum size of an answer: a few words, and the nodes of a fleet.
const MAX_ANSWER: usize = 1 << 20;

/// The maximum size of the names of another replica, and the wait for them. A table for a million names has 16 MiB.
const MAX_NAMES: usize = 1 << 30;
const NAMES_PATIENCE: Duration = Duration::from_secs(10);

/// Why there was no usable answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum PeerError {
    #[error("connecting failed")]
    Connect(#[from] std::io::Error),
    #[error(transparent)]
    Http(#[from] hyper::Error),
    #[error(transparent)]
    Request(#[from] http::Error),
    #[error(transparent)]
    Encode(#[from] serde_json::Error),
    #[error("no answer within {0:?}")]
    NoAnswer(Duration),
    #[error("it answered {0}: {1}")]
    Refused(u16, String),
    #[error("its answer cannot be read")]
    BadAnswer(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The answer has no introduction.
    #[error("it is of a version that knows no replica.peers")]
    Nameless,
    /// The answer says nothing of overrides.
    #[error("it takes no word of operators about nodes (an older version, or no admin.token_file)")]
    KnowsNoOverrides,
    #[error("the task that asked it has ended")]
    Task(#[from] tokio::task::JoinError),
    /// The message was for an earlier process at this address.
    #[error("it was restarted")]
    Restarted,
    /// A node refuses a purge there that was answered here without that replica.
    #[error("a node refuses a purge there that was answered as done without it")]
    TooLate,
    /// It has announced its shutdown.
    #[error("it has ended")]
    Left,
}

impl PeerError {
    /// Whether the process that was addressed has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.is_refused_connection() || matches!(self, PeerError::Restarted | PeerError::Left)
    }

    /// Whether it says that it cannot do now what it may do a moment later.
    pub(super) fn is_not_now(&self) -> bool {
        matches!(self, PeerError::Refused(503, _))
    }

    /// Whether it says that it does not do that.
    pub(super) fn is_never(&self) -> bool {
        matches!(self, PeerError::Refused(404 | 405 | 409, _))
    }

    /// Whether nothing listens at the address.
    pub(super) fn is_refused_connection(&self) -> bool {
        matches!(self, PeerError::Connect(error) if error.kind() == std::io::ErrorKind::ConnectionRefused)
    }
}

/// The client for one replica, with its idle connections.
pub(super) struct PeerClient {
    /// `HOST:PORT`; a name is resolved for each connection.
    pub(super) address: String,
    idle: Mutex<Vec<HttpConnection>>,
}

impl PeerClient {
    pub(super) fn to(address: String) -> Self {
        PeerClient { address, idle: Mutex::default() }
    }

    /// Sends one message and waits for its answer, for at most `ack_timeout`.
    pub(super) async fn post(&self, replicas: &Replicas, message: &Message) -> Result<Confirmation, PeerError> {
        let answer = self.send(replicas, (PATH, MAX_ANSWER), message, replicas.context.ack_timeout).await?;
        let said: Confirmation = serde_json::from_slice(&answer).map_err(|error| PeerError::BadAnswer(error.into()))?;
        replicas.hear(said.from.as_ref().and_then(|from| from.reached));
        Ok(said)
    }

    /// Asks for the purged names that the replica knows.
    pub(super) async fn ask_names(&self, replicas: &Replicas, message: &Message) -> Result<Bytes, PeerError> {
        self.send(replicas, (NAMES, MAX_NAMES), message, NAMES_PATIENCE).await
    }

    /// Asks for the purges that were sent to the replica.
    pub(super) async fn ask_purges(
        &self,
        replicas: &Replicas,
        message: &Message,
        patience: Duration,
    ) -> Result<serde_json::Value, PeerError> {
        let answer = self.send(replicas, (PURGES, MAX_ANSWER), message, patience).await?;
        serde_json::from_slice(&answer).map_err(|error| PeerError::BadAnswer(error.into()))
    }

    /// Sends one message to this path, and waits for its answer of at most so many bytes.
    async fn send(
        &self,
        replicas: &Replicas,
        what: (&str, usize),
        message: &Message,
        patience: Duration,
    ) -> Result<Bytes, PeerError> {
        let body = Bytes::from(serde_json::to_vec(message)?);
        let answered = async {
            let pooled = self.idle.lock().pop();
            if let Some(mut connection) = pooled.filter(HttpConnection::is_ready) {
                match self.exchange(replicas, &mut connection, what, body.clone()).await {
                    // The other side closed it while it was idle.
                    Err(PeerError::Http(error))
                        if error.is_canceled() || error.is_closed() || error.is_incomplete_message() => {}
                    answer => return self.keep(connection, answer),
                }
            }
            let stream = TcpStream::connect(&self.address).await?;
            stream.set_nodelay(true)?;
            let mut connection = HttpConnection::over(stream).await?;
            let answer = self.exchange(replicas, &mut connection, what, body).await;
            self.keep(connection, answer)
        };
        tokio::time::timeout(patience, answered).await.unwrap_or(Err(PeerError::NoAnswer(patience)))
    }

    fn keep(&self, connection: HttpConnection, answer: Result<Bytes, PeerError>) -> Result<Bytes, PeerError> {
        if answer.is_ok() {
            self.idle.lock().push(connection);
        }
        answer
    }

    async fn exchange(
        &self,
        replicas: &Replicas,
        connection: &mut HttpConnection,
        (path, most): (&str, usize),
        body: Bytes,
    ) -> Result<Bytes, PeerError> {
        let mut request = http::Request::post(path)
            .header(http::header::HOST, &self.address)
            .header(http::header::CONTENT_TYPE, "application/json");
        if let Some(token) = &replicas.context.token {
            request = request.header(http::header::AUTHORIZATION, format!("Bearer {}", token.reveal()));
        }
        let answer = connection.send(request.body(Full::new(body))?).await?;
        let status = answer.status().as_u16();
        let body = http_client::read(answer.into_body(), most).await.map_err(PeerError::BadAnswer)?;
        match status {
            200 => Ok(body),
            MISDIRECTED => Err(PeerError::Restarted),
            _ => Err(PeerError::Refused(status, reason(&body))),
        }
    }
}

/// The reason of a refusal, in one line.
fn reason(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Refused {
        error: String,
    }
    let text = || String::from_utf8_lossy(body).trim().chars().take(200).collect();
    serde_json::from_slice(body).map_or_else(|_| text(), |Refused { error }| error)
}
