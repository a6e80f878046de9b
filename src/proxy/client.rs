//! The client of a connection: what every step of a request needs of it.

use std::io;
use std::net::IpAddr;
use std::rc::Rc;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::deadline::Deadline;
use super::failure::Failure;
use super::worker::Worker;

/// What becomes of the client's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// The next request may come.
    KeepAlive,
    /// It ends, and there is nobody to wait for.
    Close,
    /// It ends once the client has everything: that may still be sending, even what nobody asked for.
    Linger,
    /// It is cut, so that what was sent does not look complete.
    Reset,
}

/// A client and what is known about it.
pub(super) struct Client<R> {
    pub(super) worker: Rc<Worker>,
    pub(super) route: Rc<R>,
    pub(super) stream: TcpStream,
    /// The address as text, for `X-Forwarded-For`.
    pub(super) peer: Box<str>,
    pub(super) address: IpAddr,
    /// Whether its `X-Forwarded-*` fields are believed, by the fleet of `judged_by`: a Varnish may have connected
    /// before the fleet knew it.
    pub(super) trusted: bool,
    /// The version of the fleet that decided about `trusted`.
    pub(super) judged_by: Option<u64>,
    pub(super) deadline: Deadline,
}

impl<R> Client<R> {
    /// Writes all of it, in the time of the phase that was entered.
    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let Client { stream, deadline, .. } = self;
        match deadline.limit(stream.write_all(bytes)).await {
            Ok(written) => written.map_err(Failure::ClientGone),
            Err(_interrupt) => Err(Failure::ClientGone(io::ErrorKind::TimedOut.into())),
        }
    }
}
