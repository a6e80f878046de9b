//! A message to another replica, and its answer.

use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::message::{Confirmation, Message};
use super::{MISDIRECTED, NAMES, PATH, PURGES, Replicas};
use crate::http_client::{self, HttpConnection};
use crate::seal::PurgedNames;

/// The maximum size of an answer: a few words, and the nodes of a fleet.
const MAX_ANSWER: usize = 1 << 20;

/// The maximum size of what comes with the table of another replica: the tags of blocks, caches, and the other replicas.
const BESIDE_TABLE: usize = 16 << 20;

/// How long another replica may be silent while it sends its names. The whole takes as long as the link needs: a table for a
/// million names has 64 MiB.
const NAMES_SILENCE: Duration = Duration::from_secs(10);

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

/// An answer, with the room that it takes.
type PeerAnswer<'r> = (Bytes, Option<SemaphorePermit<'r>>);

/// Where a message goes, and what its answer may take.
#[derive(Clone, Copy)]
struct AnswerLimits<'r> {
    path: &'static str,
    /// The most bytes of the answer.
    most: usize,
    /// How long nothing may come.
    silence: Duration,
    /// Where its body needs room.
    room: Option<&'r Semaphore>,
}

impl AnswerLimits<'_> {
    async fn in_time<T>(&self, step: impl Future<Output = T>) -> Result<T, PeerError> {
        tokio::time::timeout(self.silence, step).await.map_err(|_| PeerError::NoAnswer(self.silence))
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
        let patience = replicas.context.ack_timeout;
        let limits = AnswerLimits { path: PATH, most: MAX_ANSWER, silence: patience, room: None };
        let answered = tokio::time::timeout(patience, self.send(replicas, limits, message)).await;
        let (answer, _) = answered.unwrap_or(Err(PeerError::NoAnswer(patience)))?;
        let said: Confirmation = serde_json::from_slice(&answer).map_err(|error| PeerError::BadAnswer(error.into()))?;
        replicas.hear(said.from.as_ref().and_then(|from| from.reached));
        Ok(said)
    }

    /// Asks for the purged names that the replica knows. They come with the room that they take.
    pub(super) async fn ask_names<'r>(
        &self,
        replicas: &'r Replicas,
        message: &Message,
    ) -> Result<(Bytes, SemaphorePermit<'r>), PeerError> {
        let room = Some(&replicas.blocks.receiving);
        let most = PurgedNames::MAX_ENCODED + BESIDE_TABLE;
        let limits = AnswerLimits { path: NAMES, most, silence: NAMES_SILENCE, room };
        let (answer, room) = self.send(replicas, limits, message).await?;
        Ok((answer, room.ok_or(PeerError::Left)?))
    }

    /// Asks for the purges that were sent to the replica.
    pub(super) async fn ask_purges(
        &self,
        replicas: &Replicas,
        message: &Message,
        patience: Duration,
    ) -> Result<serde_json::Value, PeerError> {
        let limits = AnswerLimits { path: PURGES, most: MAX_ANSWER, silence: patience, room: None };
        let answered = tokio::time::timeout(patience, self.send(replicas, limits, message)).await;
        let (answer, _) = answered.unwrap_or(Err(PeerError::NoAnswer(patience)))?;
        serde_json::from_slice(&answer).map_err(|error| PeerError::BadAnswer(error.into()))
    }

    /// Sends one message, and waits for its answer.
    async fn send<'r>(
        &self,
        replicas: &Replicas,
        limits: AnswerLimits<'r>,
        message: &Message,
    ) -> Result<PeerAnswer<'r>, PeerError> {
        let body = Bytes::from(serde_json::to_vec(message)?);
        let pooled = self.idle.lock().pop();
        if let Some(mut connection) = pooled.filter(HttpConnection::is_ready) {
            match self.exchange(replicas, &mut connection, limits, body.clone()).await {
                // The other side closed it while it was idle.
                Err(PeerError::Http(error))
                    if error.is_canceled() || error.is_closed() || error.is_incomplete_message() => {}
                answer => return self.keep(connection, answer),
            }
        }
        let connected = async {
            let stream = TcpStream::connect(&self.address).await?;
            stream.set_nodelay(true)?;
            Ok::<_, PeerError>(HttpConnection::over(stream).await?)
        };
        let mut connection = limits.in_time(connected).await??;
        let answer = self.exchange(replicas, &mut connection, limits, body).await;
        self.keep(connection, answer)
    }

    fn keep<T>(&self, connection: HttpConnection, answer: Result<T, PeerError>) -> Result<T, PeerError> {
        if answer.is_ok() {
            self.idle.lock().push(connection);
        }
        answer
    }

    async fn exchange<'r>(
        &self,
        replicas: &Replicas,
        connection: &mut HttpConnection,
        limits: AnswerLimits<'r>,
        body: Bytes,
    ) -> Result<PeerAnswer<'r>, PeerError> {
        let mut request = http::Request::post(limits.path)
            .header(http::header::HOST, &self.address)
            .header(http::header::CONTENT_TYPE, "application/json");
        if let Some(token) = replicas.context.token.load().as_deref() {
            request = request.header(http::header::AUTHORIZATION, format!("Bearer {}", token.reveal()));
        }
        let answer = limits.in_time(connection.send(request.body(Full::new(body))?)).await??;
        let status = answer.status().as_u16();
        // Only now: one that does not answer takes up none. What it sends meanwhile waits in the connection.
        let room = match limits.room {
            // It is never closed.
            Some(room) => room.acquire().await.ok(),
            None => None,
        };
        let read = http_client::read_on(answer.into_body(), limits.most, limits.silence);
        let body = read.await.map_err(PeerError::BadAnswer)?;
        match status {
            200 => Ok((body, room)),
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
