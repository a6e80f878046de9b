//! The client of a connection: what every step of a request needs of it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Instant;

use tokio::io::AsyncWriteExt;

use super::Frontend;
use super::deadline::Deadline;
use super::failure::{Failure, Reply};
use super::stream::Stream;
use super::transfer::Outgoing;
use super::worker::Worker;
use crate::fleet::Snapshot;
use crate::http1::{BadHead, Framing, ResponseHead, Version, error_response, write_response};
use crate::purge::Passage;

/// What becomes of the client's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disposition {
    /// The next request may come.
    KeepAlive,
    /// It ends, and there is nobody to wait for.
    Close,
    /// It ends once the client has everything: that may still be sending, even what nobody asked for.
    Linger,
    /// It is cut, so that what was sent does not look complete.
    Reset,
}

/// Who is at the other end: the address that connected to us, or the one that a PROXY header named.
#[derive(Clone, Debug)]
pub(super) struct PeerAddress {
    pub(super) socket: SocketAddr,
    /// Without a port, and as IPv4 where it is one.
    pub(super) address: IpAddr,
    /// The same as text, for `X-Forwarded-For`.
    pub(super) text: Rc<str>,
    /// It came through a proxy that did not say from where: the address is the proxy's, and the trust that the proxy has
    /// is not the client's.
    pub(super) is_unknown: bool,
}

impl PeerAddress {
    /// Somebody behind this proxy.
    pub(super) fn unknown_behind(proxy: SocketAddr) -> Self {
        PeerAddress { is_unknown: true, ..PeerAddress::from(proxy) }
    }
}

impl From<SocketAddr> for PeerAddress {
    fn from(socket: SocketAddr) -> Self {
        let address = socket.ip().to_canonical();
        PeerAddress { socket, address, text: address.to_string().into(), is_unknown: false }
    }
}

/// A client and what is known about it.
pub(super) struct Client {
    pub(super) worker: Rc<Worker>,
    pub(super) frontend: Rc<Frontend>,
    pub(super) stream: Stream,
    pub(super) peer: PeerAddress,
    /// Whether its `X-Forwarded-*` fields are believed, by the fleet of `judged_by`: a Varnish may have connected
    /// before the fleet knew it.
    pub(super) trusted: bool,
    /// The version of the fleet that decided about `trusted`.
    pub(super) judged_by: Option<u64>,
    pub(super) deadline: Deadline,
    /// What the guard is to be told of what is written here. Dropped after the socket: from then on, what was written is
    /// in the hands of the system.
    pub(super) passage: Option<Passage>,
}

impl Client {
    pub(super) fn new(
        worker: Rc<Worker>,
        frontend: Rc<Frontend>,
        stream: Stream,
        peer: PeerAddress,
        deadline: Deadline,
    ) -> Self {
        Client { worker, frontend, stream, peer, trusted: false, judged_by: None, deadline, passage: None }
    }

    /// All that there is to write for now was written.
    pub(super) fn record_written(&self) {
        if let Some(passage) = &self.passage {
            passage.written(Instant::now());
        }
    }

    /// The client has sent more after all that was written to it.
    pub(super) fn record_read(&self) {
        if let Some(passage) = &self.passage {
            passage.taken(Instant::now());
        }
    }

    /// Decides whether the client is believed, if the fleet has changed since that was decided.
    pub(super) fn judge(&mut self, fleet: &Snapshot) {
        if self.judged_by != Some(fleet.version) {
            self.trusted = !self.peer.is_unknown && self.frontend.trusts(self.peer.address, fleet);
            self.judged_by = Some(fleet.version);
        }
    }

    /// How the client came to us, for `X-Forwarded-Proto`.
    pub(super) fn proto(&self) -> &'static str {
        if self.stream.is_plain() { "http" } else { "https" }
    }

    /// The version that the client spoke, for a request that was written down as this one.
    pub(super) fn version(&self, written: Version) -> Version {
        if matches!(self.stream, Stream::Http2(_)) { Version::Http2 } else { written }
    }

    /// How the end of a request's body is found as we read it. HTTP/2 has a frame of its own for that, which hyper has
    /// taken off.
    pub(super) fn body_framing(&self, written: Framing) -> Framing {
        match (&self.stream, written) {
            (Stream::Http2(_), Framing::Chunked) => Framing::UntilClose,
            (_, framing) => framing,
        }
    }

    /// Begins the answer: what goes before its body is appended to `out`. Returns
    /// how the body is to be framed, and whether another request may follow.
    ///
    /// # Errors
    /// An HTTP/2 client that has gone, or cannot be told this.
    pub(super) fn begin_answer(
        &mut self,
        out: &mut Vec<u8>,
        head: &ResponseHead,
        version: Version,
        willing: bool,
    ) -> Result<(Outgoing, bool), Failure> {
        let Stream::Http2(stream) = &mut self.stream else {
            let (framing, keep_alive) = write_response(out, head, version, willing);
            let outgoing = if framing == Framing::Chunked { Outgoing::Chunked } else { Outgoing::AsItIs };
            return Ok((outgoing, keep_alive));
        };
        if stream.was_cancelled() {
            Err(Failure::ClientGone(io::ErrorKind::ConnectionReset.into()))
        } else if stream.begin_answer(head, head.framing == Framing::None) {
            Ok((Outgoing::AsItIs, true))
        } else {
            Err(Failure::BadAnswer(BadHead::Syntax("HTTP/2 cannot carry it")))
        }
    }

    /// Answers for ourselves.
    pub(super) async fn answer_with(
        &mut self,
        reply: &Reply,
        head_only: bool,
        out: &mut Vec<u8>,
    ) -> Result<(), Failure> {
        if let Stream::Http2(stream) = &mut self.stream {
            let told = stream.answer_with(reply.status, &reply.text, head_only);
            return if told { Ok(()) } else { Err(Failure::ClientGone(io::ErrorKind::ConnectionReset.into())) };
        }
        out.clear();
        error_response(out, reply.status, reply.reason, &reply.text, head_only);
        self.send(out).await
    }

    /// Writes all of it, in the time of the phase that was entered.
    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let Client { stream, deadline, .. } = self;
        let all = async {
            stream.write_all(bytes).await?;
            stream.flush().await
        };
        match deadline.limit(all).await {
            Ok(written) => written.map_err(Failure::ClientGone),
            Err(_interrupt) => Err(Failure::ClientGone(io::ErrorKind::TimedOut.into())),
        }
    }
}
