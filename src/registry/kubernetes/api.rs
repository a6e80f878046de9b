//! Requests to the API server: one connection for one service, and the reasons why it does not answer.

use std::path::PathBuf;
use std::time::Duration;

use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};

use super::access::ApiServerSettings;
use super::slice::{ApiStatus, SliceList};
use crate::config::{Token, TokenError};
use crate::http_client::server::{self, ConnectError, ServerKeys};
use crate::http_client::{HttpConnection, read_on};

/// How long the API server may take to connect, and then for the head of an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The largest list, in bytes. A slice has at most a thousand endpoints, and takes half a megabyte then.
const MAX_LIST: usize = 64 << 20;

/// The longest answer of an API server that refuses that is read, in bytes, and shown, in characters.
const MAX_REFUSAL: usize = 64 * 1024;
const MAX_SHOWN: usize = 256;

const KEYS: ServerKeys = ServerKeys { url: "registry.kubernetes.url", ca: "registry.kubernetes.ca" };

/// What is asked for. It is a verb of RBAC, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ApiVerb {
    List,
    Watch,
}

impl ApiVerb {
    fn as_str(self) -> &'static str {
        match self {
            ApiVerb::List => "list",
            ApiVerb::Watch => "watch",
        }
    }
}

/// Why the API server did not answer as wanted.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{}: {cause}", file.display())]
    Token { file: PathBuf, cause: TokenError },
    #[error("the request cannot be written: {0}")]
    Request(#[from] http::Error),
    #[error("no answer: {0}")]
    Http(#[from] hyper::Error),
    #[error("no answer within {} s", PATIENCE.as_secs())]
    Late,
    #[error("the watch was cut: {0}")]
    Cut(hyper::Error),
    #[error("the answer did not come to its end: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error("the answer cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    #[error("401: the API server does not accept {token}: it has expired, or is for another cluster{says}")]
    Unauthorized { token: String, says: String },
    #[error(
        "403: the service account may not {} endpointslices in namespace {namespace}: it needs a Role there, with list and \
         watch of endpointslices in discovery.k8s.io, and a RoleBinding{says}",
        verb.as_str()
    )]
    Forbidden { verb: ApiVerb, namespace: String, says: String },
    #[error("404: the API server does not know discovery.k8s.io/v1, which is in Kubernetes since 1.21{says}")]
    Unknown { says: String },
    /// The resource version is too old to go on from.
    #[error("410: the API server has forgotten what has happened since{says}")]
    Gone { says: String },
    #[error("{status}{says}")]
    Status { status: StatusCode, says: String },
    #[error("the API server ended the watch: {0}")]
    Refused(String),
    #[error("the watch was silent for longer than it may be: the connection hangs")]
    Silent,
    #[error("the watch ended as soon as it began")]
    Short,
    #[error("a line of the watch is longer than {0} bytes")]
    LongLine(usize),
}

impl ApiError {
    /// What an event of a watch says that it cannot go on.
    pub(super) fn of_event(ApiStatus { code, message }: ApiStatus) -> Self {
        match code {
            410 => ApiError::Gone { says: says(&message) },
            _ => ApiError::Refused(format!("{code}{}", says(&message))),
        }
    }
}

/// The API server, for the slices of one service.
pub(super) struct SliceApi {
    server: ApiServerSettings,
    namespace: String,
    /// Path and query of the list.
    target: String,
    connection: Option<HttpConnection>,
}

impl SliceApi {
    pub(super) fn new(server: &ApiServerSettings, namespace: &str, service: &str) -> Self {
        // Every slice of a service has this label, whoever wrote it.
        let target = format!(
            "{}/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices?labelSelector=kubernetes.io%2Fservice-name%3D{service}",
            server.url.path().trim_end_matches('/')
        );
        SliceApi { server: server.clone(), namespace: namespace.to_owned(), target, connection: None }
    }

    /// All slices, as they are now.
    pub(super) async fn list(&mut self) -> Result<SliceList, ApiError> {
        let (body, connection) = self.get(ApiVerb::List, &self.target.clone()).await?;
        let bytes = read_on(body, MAX_LIST, PATIENCE).await.map_err(ApiError::Body)?;
        let list = serde_json::from_slice(&bytes)?;
        self.connection = Some(connection);
        Ok(list)
    }

    /// What changes after this resource version, as lines, for at most this time. The connection comes with it, and may be
    /// given back when the last line was read.
    pub(super) async fn watch(
        &mut self,
        resource_version: &str,
        for_at_most: Duration,
    ) -> Result<(Incoming, HttpConnection), ApiError> {
        let seconds = for_at_most.as_secs();
        let version: String = resource_version.bytes().map(escaped).collect();
        let target = format!(
            "{}&watch=1&allowWatchBookmarks=true&timeoutSeconds={seconds}&resourceVersion={version}",
            self.target
        );
        self.get(ApiVerb::Watch, &target).await
    }

    /// Keeps a connection for the next request.
    pub(super) fn give_back(&mut self, connection: HttpConnection) {
        self.connection = Some(connection);
    }

    /// Asks, and checks the status of the answer.
    async fn get(&mut self, verb: ApiVerb, target: &str) -> Result<(Incoming, HttpConnection), ApiError> {
        let asked = async {
            if let Some(kept) = self.connection.take().filter(HttpConnection::is_ready) {
                match self.ask(kept, target).await {
                    // The API server may close an idle connection at any time.
                    Err(ApiError::Http(_)) => {}
                    asked => return asked,
                }
            }
            let connection = server::connect(&self.server.url, self.server.ca.as_deref(), KEYS).await?;
            self.ask(connection, target).await
        };
        let (answer, connection) = tokio::time::timeout(PATIENCE, asked).await.map_err(|_| ApiError::Late)??;
        match answer.status() {
            StatusCode::OK => Ok((answer.into_body(), connection)),
            status => Err(self.refusal(verb, status, answer).await),
        }
    }

    async fn ask(
        &self,
        mut connection: HttpConnection,
        target: &str,
    ) -> Result<(Response<Incoming>, HttpConnection), ApiError> {
        let mut request = Request::get(target)
            .header(header::HOST, self.server.url.authority())
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, concat!("clearcoat/", env!("CARGO_PKG_VERSION")));
        // Read anew each time: kubelet writes another one long before this one expires.
        if let Some(file) = self.server.token_file.clone() {
            let token = read_token(file).await?;
            let mut value = HeaderValue::try_from(format!("Bearer {}", token.reveal())).map_err(http::Error::from)?;
            value.set_sensitive(true);
            request = request.header(header::AUTHORIZATION, value);
        }
        let answer = connection.send(request.body(Full::new(Bytes::new()))?).await?;
        Ok((answer, connection))
    }

    /// Why the API server refuses, in its own words as well.
    async fn refusal(&self, verb: ApiVerb, status: StatusCode, answer: Response<Incoming>) -> ApiError {
        // Whatever it sent instead of a status is not worth an error of its own.
        let body = read_on(answer.into_body(), MAX_REFUSAL, PATIENCE).await.unwrap_or_default();
        let says = says(&serde_json::from_slice::<ApiStatus>(&body).unwrap_or_default().message);
        match status {
            StatusCode::UNAUTHORIZED => {
                let token = match &self.server.token_file {
                    Some(file) => format!("the token in {}", file.display()),
                    None => "a request without a token (registry.kubernetes.token_file)".to_owned(),
                };
                ApiError::Unauthorized { token, says }
            }
            StatusCode::FORBIDDEN => ApiError::Forbidden { verb, namespace: self.namespace.clone(), says },
            StatusCode::NOT_FOUND => ApiError::Unknown { says },
            StatusCode::GONE => ApiError::Gone { says },
            status => ApiError::Status { status, says },
        }
    }
}

/// A byte of a value in a query.
fn escaped(byte: u8) -> String {
    if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") }
}

/// The words of an API server, at the end of ours.
fn says(message: &str) -> String {
    if message.is_empty() {
        return String::new();
    }
    let shown: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_SHOWN).collect();
    format!(" (it says: {shown})")
}

async fn read_token(file: PathBuf) -> Result<Token, ApiError> {
    let read = tokio::task::spawn_blocking({
        let file = file.clone();
        move || Token::read(&file)
    });
    let token = read.await.unwrap_or_else(|error| Err(TokenError::Unreadable(std::io::Error::other(error))));
    token.map_err(|cause| ApiError::Token { file, cause })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_api_server_says_is_shown_in_part_and_on_one_line() {
        assert_eq!(says(""), "");
        assert_eq!(says("too\nold"), " (it says: too old)");
        assert_eq!(says(&"x".repeat(1000)).len(), MAX_SHOWN + " (it says: )".len());
    }

    #[test]
    fn a_resource_version_is_sent_back_as_it_is() {
        assert_eq!("12a&b=".bytes().map(escaped).collect::<String>(), "12a%26b%3D");
    }
}
