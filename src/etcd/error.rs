//! What goes wrong with etcd, and whose fault it is.

use std::path::{Path, PathBuf};

use etcd_client::Error;

use crate::telemetry::causes;

/// gRPC's status codes (grpc.io, "Status codes and their use in gRPC"); the client library does not name their type.
const NOT_FOUND: i32 = 5;
const OUT_OF_RANGE: i32 = 11;

/// Why something could not be had from etcd.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// The member that was asked.
    #[error("{0}")]
    At(String, #[source] Box<EtcdError>),
    /// No answer in time. The request may have been carried out.
    #[error("no answer within {} s", super::PATIENCE.as_secs())]
    NoAnswer,
    /// The stream of changes has ended.
    #[error("the stream has ended")]
    Closed,
    /// The member knows of no leader: it is cut off, or an election is under way.
    #[error("the member has no leader")]
    NoLeader,
    /// A watch was ended by etcd.
    #[error("etcd ended the watch: {0}")]
    Cancelled(String),
    /// A file that is needed to get in.
    #[error("{}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// What etcd, or its client, said.
    #[error("{}", describe(.0))]
    Etcd(Box<Error>),
}

impl From<Error> for EtcdError {
    fn from(error: Error) -> Self {
        EtcdError::Etcd(Box::new(error))
    }
}

impl EtcdError {
    /// Whether an answer was larger than we accept. The client has only a text for that.
    pub(super) fn is_too_large(&self) -> bool {
        let EtcdError::Etcd(error) = self else { return false };
        matches!(&**error, Error::GRpcStatus(status)
            if status.code() as i32 == OUT_OF_RANGE && status.message().contains("message length too large"))
    }

    /// Whether etcd knows no such lease (any more).
    pub fn is_lease_lost(&self) -> bool {
        match self {
            // The client's word for an answer without a time to live.
            EtcdError::Etcd(error) => match &**error {
                Error::GRpcStatus(status) => status.code() as i32 == NOT_FOUND,
                Error::LeaseKeepAliveError(text) => text.contains("not found"),
                _ => false,
            },
            _ => false,
        }
    }
}

/// Whether a user was presented to an etcd that asks for none.
pub(super) fn wants_no_user(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.message().contains("authentication is not enabled"))
}

/// The client's errors print their kind, but not their cause.
fn describe(error: &Error) -> String {
    match error {
        // Its own text is in Rust's notation; the message is what etcd said.
        Error::GRpcStatus(status) => match std::error::Error::source(status) {
            Some(source) => format!("{}: {}", status.message(), causes(source)),
            None => status.message().to_owned(),
        },
        Error::TransportError(error) => causes(error).to_string(),
        error => error.to_string(),
    }
}

/// Reads a file that is needed to get in.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, EtcdError> {
    std::fs::read(path).map_err(|source| EtcdError::File { path: path.to_owned(), source })
}
