//! Errors of etcd, and what can be told from them.

use std::path::{Path, PathBuf};

use etcd_client::Error;

use crate::telemetry::causes;

/// gRPC status codes (grpc.io, "Status codes and their use in gRPC"); the client library does not export their type.
const NOT_FOUND: i32 = 5;
const OUT_OF_RANGE: i32 = 11;

/// Why a request to etcd failed.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// The error of the member at this address.
    #[error("{0}")]
    At(String, #[source] Box<EtcdError>),
    /// No answer in time. The request may have been carried out.
    #[error("no answer within {} s", super::PATIENCE.as_secs())]
    NoAnswer,
    /// The watch stream has ended.
    #[error("the stream has ended")]
    Closed,
    /// The member has no leader: it is cut off, or an election is in progress.
    #[error("the member has no leader")]
    NoLeader,
    /// etcd has ended a watch.
    #[error("etcd ended the watch: {0}")]
    Cancelled(String),
    /// A file with credentials cannot be read.
    #[error("{}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// An error of etcd or its client.
    #[error("{}", describe(.0))]
    Etcd(Box<Error>),
}

impl From<Error> for EtcdError {
    fn from(error: Error) -> Self {
        EtcdError::Etcd(Box::new(error))
    }
}

impl EtcdError {
    /// Whether an answer was larger than the limit. The client reports that only as a text.
    pub(super) fn is_too_large(&self) -> bool {
        let EtcdError::Etcd(error) = self else { return false };
        matches!(&**error, Error::GRpcStatus(status)
            if status.code() as i32 == OUT_OF_RANGE && status.message().contains("message length too large"))
    }

    /// Whether etcd does not know this lease, or no longer does.
    pub fn is_lease_lost(&self) -> bool {
        match self {
            // The client's text for an answer without a time to live.
            EtcdError::Etcd(error) => match &**error {
                Error::GRpcStatus(status) => status.code() as i32 == NOT_FOUND,
                Error::LeaseKeepAliveError(text) => text.contains("not found"),
                _ => false,
            },
            _ => false,
        }
    }
}

/// Whether credentials were sent to an etcd without authentication.
pub(super) fn wants_no_user(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.message().contains("authentication is not enabled"))
}

/// What etcd says of a client that it does not let in, and what to look at. The texts are etcd's (its package `rpctypes`): of
/// the first two the code is that of any bad request. The settings have the same names in the configuration, as flags of the
/// agent and as variables.
const NOT_LET_IN: [(&str, &str); 3] = [
    ("authentication failed", "etcd refuses the user or its password (username, password_file of registry.etcd)"),
    ("user name is empty", "etcd wants a user (username, password_file of registry.etcd)"),
    (
        "permission denied",
        "etcd lets the user in, and forbids this: its role must read and write below registry.etcd.prefix",
    ),
];

/// The client's errors print their kind, but not their cause.
fn describe(error: &Error) -> String {
    match error {
        // The status prints in Rust's notation; its message is the text of etcd, or of the client if there was no answer.
        Error::GRpcStatus(status) => match std::error::Error::source(status) {
            Some(source) => root(source),
            None => {
                let said = status.message();
                let meant = NOT_LET_IN.iter().find(|(text, _)| said.contains(text));
                meant.map_or_else(|| said.to_owned(), |(_, meant)| format!("{meant}: {said}"))
            }
        },
        Error::TransportError(error) => root(error),
        error => error.to_string(),
    }
}

/// What is behind an error of the transport, whose every layer says only that it is one.
fn root(error: &(dyn std::error::Error + 'static)) -> String {
    let mut root = error;
    while let Some(source) = root.source() {
        root = source;
    }
    // Such as "transport error", which alone says nothing.
    if std::ptr::eq(root, error) { causes(error).to_string() } else { root.to_string() }
}

/// Reads a file with credentials.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, EtcdError> {
    std::fs::read(path).map_err(|source| EtcdError::File { path: path.to_owned(), source })
}
