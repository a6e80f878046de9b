//! One message to another replica, and its answer.

use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpStream;

use super::message::{Confirmation, Message};
use super::{MISDIRECTED, PATH, Replicas};

/// An answer is some words, and the nodes of a fleet.
const MAX_ANSWER: usize = 1 << 20;

/// Why there was no answer, or none of use.
#[derive(Debug, thiserror::Error)]
pub(super) enum TellError {
    #[error("connecting failed: {0}")]
    Connect(#[from] std::io::Error),
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error("{0}")]
    Request(#[from] http::Error),
    #[error("{0}")]
    Encode(#[from] serde_json::Error),
    #[error("no answer within {0:?}")]
    NoAnswer(Duration),
    #[error("it answered {0}: {1}")]
    Refused(u16, String),
    #[error("its answer cannot be read: {0}")]
    BadAnswer(String),
    /// Another process is there than the one that was meant.
    #[error("it was restarted")]
    Restarted,
    /// It has said goodbye.
    #[error("it has ended")]
    Left,
}

impl TellError {
    /// Whether nobody listens there.
    pub(super) fn is_refused_connection(&self) -> bool {
        matches!(self, TellError::Connect(error) if error.kind() == std::io::ErrorKind::ConnectionRefused)
    }
}

/// The way to one replica, with the connections that are open.
pub(super) struct Way {
    /// `HOST:PORT`; a name is looked up with each connection.
    pub(super) address: String,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

impl Way {
    /// To this address.
    pub(super) fn to(address: String) -> Self {
        Way { address, idle: Mutex::default() }
    }

    /// Sends one message and waits for its answer, at most as long as the sender of a purge does.
    pub(super) async fn post(&self, replicas: &Replicas, message: &Message) -> Result<Confirmation, TellError> {
        let patience = replicas.context.ack_timeout;
        let body = Bytes::from(serde_json::to_vec(message)?);
        let answered = async {
            let pooled = self.idle.lock().pop();
            if let Some(mut sender) = pooled.filter(|sender| sender.is_ready()) {
                match self.exchange(replicas, &mut sender, body.clone()).await {
                    // It was closed under us.
                    Err(TellError::Http(error))
                        if error.is_canceled() || error.is_closed() || error.is_incomplete_message() => {}
                    answer => return self.keep(sender, answer),
                }
            }
            let stream = TcpStream::connect(&self.address).await?;
            stream.set_nodelay(true)?;
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            // Ends with its sender; its error is the one that the sender reports.
            tokio::spawn(connection);
            let answer = self.exchange(replicas, &mut sender, body).await;
            self.keep(sender, answer)
        };
        tokio::time::timeout(patience, answered).await.unwrap_or(Err(TellError::NoAnswer(patience)))
    }

    fn keep(
        &self,
        sender: SendRequest<Full<Bytes>>,
        answer: Result<Confirmation, TellError>,
    ) -> Result<Confirmation, TellError> {
        if answer.is_ok() {
            self.idle.lock().push(sender);
        }
        answer
    }

    async fn exchange(
        &self,
        replicas: &Replicas,
        sender: &mut SendRequest<Full<Bytes>>,
        body: Bytes,
    ) -> Result<Confirmation, TellError> {
        let mut request = http::Request::post(PATH)
            .header(http::header::HOST, &self.address)
            .header(http::header::CONTENT_TYPE, "application/json");
        if let Some(token) = &replicas.context.token {
            request = request.header(http::header::AUTHORIZATION, format!("Bearer {}", token.reveal()));
        }
        let answer = sender.send_request(request.body(Full::new(body))?).await?;
        let status = answer.status().as_u16();
        let body = match Limited::new(answer.into_body(), MAX_ANSWER).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => return Err(TellError::BadAnswer(error.to_string())),
        };
        match status {
            200 => serde_json::from_slice(&body).map_err(|error| TellError::BadAnswer(error.to_string())),
            MISDIRECTED => Err(TellError::Restarted),
            _ => Err(TellError::Refused(status, reason(&body))),
        }
    }
}

/// What a refusal says, in a line.
fn reason(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Refused {
        error: String,
    }
    let text = || String::from_utf8_lossy(body).trim().chars().take(200).collect();
    serde_json::from_slice(body).map_or_else(|_| text(), |Refused { error }| error)
}
