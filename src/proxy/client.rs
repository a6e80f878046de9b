//! The client of a connection, as used by every step of a request.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Instant;

use hyper::body::Bytes;
use tokio::io::AsyncWriteExt;

use super::Frontend;
use super::deadline::Deadline;
use super::failure::Failure;
use super::gate::{Arrival, ClientScheme, SendingPeer};
use super::stream::Stream;
use super::transfer::Outgoing;
use super::worker::Worker;
use crate::fleet::Snapshot;
use crate::http1::{
    BadHead, Framing, OwnResponse, RequestHead, ResponseHead, Version, write_own_response, write_response,
};
use crate::purge::Passage;

/// What happens to the client's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disposition {
    /// Kept open for the next request.
    KeepAlive,
    /// Closed, without waiting for the client.
    Close,
    /// Closed once the client has the complete answer: it may still be sending, even unasked.
    Linger,
    /// Reset, so that a partial answer does not look complete.
    Reset,
}

/// The other end: the address that connected to us, or the one in a PROXY header.
#[derive(Clone, Debug)]
pub(super) struct PeerAddress {
    pub(super) socket: SocketAddr,
    /// Without a port; IPv4-mapped IPv6 is converted to IPv4.
    pub(super) address: IpAddr,
    /// The same as text, for `X-Forwarded-For`.
    pub(super) text: Rc<str>,
    /// A proxy did not say whom it forwards: the address is the proxy's, but the proxy's trust does not extend to the
    /// client.
    pub(super) is_unknown: bool,
}

impl PeerAddress {
    /// An unknown client behind this proxy.
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

/// A client and its properties.
pub(super) struct Client {
    pub(super) worker: Rc<Worker>,
    pub(super) frontend: Rc<Frontend>,
    pub(super) stream: Stream,
    pub(super) peer: PeerAddress,
    /// Whether its `X-Forwarded-*` fields are trusted, by the fleet of `judged_by`: a Varnish may have connected before
    /// it joined the fleet.
    pub(super) trusted: bool,
    /// The version of the fleet for which `trusted` was decided.
    pub(super) judged_by: Option<u64>,
    pub(super) deadline: Deadline,
    /// Reports to the guard what is written here. Dropped after the socket: from then on, the written bytes are in the
    /// kernel.
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

    /// Records that everything available was written.
    pub(super) fn record_written(&self) {
        if let Some(passage) = &self.passage {
            passage.written(Instant::now());
        }
    }

    /// Records that the client has sent more after receiving all that was written.
    pub(super) fn record_read(&self) {
        if let Some(passage) = &self.passage {
            passage.taken(Instant::now());
        }
    }

    /// Goes by the rules of now. Called between two requests.
    pub(super) fn follow_rules(&mut self) {
        let now = self.worker.frontend(self.frontend.role);
        if !Rc::ptr_eq(&now, &self.frontend) {
            self.frontend = now;
            self.judged_by = None;
        }
    }

    /// Decides again whether the client is trusted, if the fleet has changed.
    pub(super) fn judge(&mut self, fleet: &Snapshot) {
        if self.judged_by != Some(fleet.version) {
            self.trusted = !self.peer.is_unknown && self.frontend.trusts(self.peer.address, fleet);
            self.judged_by = Some(fleet.version);
        }
    }

    /// The scheme that the client used, for `X-Forwarded-Proto`.
    pub(super) fn proto(&self) -> &'static str {
        if self.stream.is_plain() { "http" } else { "https" }
    }

    /// Who sent this request, and how, for the rules of the edge.
    pub(super) fn arrival(&self, head: &RequestHead, fleet: &Snapshot) -> Arrival {
        Arrival::of(head, self.as_peer(), |address| self.frontend.trusts(address, fleet))
    }

    /// The value of `Strict-Transport-Security` for the answer to this request; empty for none.
    pub(super) fn strict_transport(&self, head: &RequestHead) -> &str {
        let value = self.frontend.gate.as_ref().map_or("", |gate| gate.strict_transport());
        let is_secure = !value.is_empty() && ClientScheme::of(head, self.as_peer()) == ClientScheme::Https;
        if is_secure { value } else { "" }
    }

    fn as_peer(&self) -> SendingPeer<'_> {
        SendingPeer {
            address: self.peer.address,
            is_unknown: self.peer.is_unknown,
            is_trusted: self.trusted,
            is_tls: !self.stream.is_plain(),
            offload_header: self.frontend.offload_header.as_deref(),
        }
    }

    /// The version that the client spoke; `written` is that of the request as written down for us.
    pub(super) fn version(&self, written: Version) -> Version {
        if matches!(self.stream, Stream::Http2(_)) { Version::Http2 } else { written }
    }

    /// The framing of a request's body as we read it. HTTP/2 has its own frames, which hyper has already removed.
    pub(super) fn body_framing(&self, written: Framing) -> Framing {
        match (&self.stream, written) {
            (Stream::Http2(_), Framing::Chunked) => Framing::UntilClose,
            (_, framing) => framing,
        }
    }

    /// Begins the answer: its head is appended to `out`. Returns the framing of the body, and whether another request
    /// may follow.
    ///
    /// # Errors
    /// If an HTTP/2 client has gone, or its protocol cannot carry this head.
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

    /// Sends an answer of our own, with this body. Returns how many bytes it has; by HTTP/2 without its head.
    pub(super) async fn answer_with(
        &mut self,
        answer: &OwnResponse<'_>,
        body: &Bytes,
        out: &mut Vec<u8>,
    ) -> Result<u64, Failure> {
        if let Stream::Http2(stream) = &mut self.stream {
            return if stream.answer_with(answer, body.clone()) {
                Ok(answer.body_len())
            } else {
                Err(Failure::ClientGone(io::ErrorKind::ConnectionReset.into()))
            };
        }
        out.clear();
        write_own_response(out, answer);
        self.send(out).await.map(|()| out.len() as u64)
    }

    /// Writes all of it, within the current phase's limit.
    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let Client { stream, deadline, .. } = self;
        let all = async {
            stream.write_all(bytes).await?;
            stream.flush().await
        };
        match deadline.limit(all).await {
            Ok(written) => written.map_err(Failure::ClientGone),
            Err(interrupt) => {
                let late = Failure::ClientGone(io::ErrorKind::TimedOut.into());
                Err(Failure::interrupted(interrupt, late))
            }
        }
    }
}
