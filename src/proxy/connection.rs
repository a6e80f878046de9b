//! One client connection: its preamble (PROXY header, TLS), its requests in order, and the idle time between them.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use super::admission::AddressPermit;

use super::Frontend;
use super::client::{Client, Disposition, PeerAddress};
use super::deadline::{Deadline, Interrupt, Phase};
use super::exchange;
use super::failure::Failure;
use super::http2;
use super::request::Request;
use super::stream::Stream;
use super::worker::Worker;
use crate::files;
use crate::proxy_protocol::{self, ParsedHeader, ProxiedSource};
use crate::purge::SocketPair;
use crate::telemetry::HandshakeResult;

/// Bytes read at once while waiting for a head. More would only copy the start of a large body around.
const HEAD_READ: usize = 16 * 1024;

/// How long a client that was answered before it had sent everything may go on sending. Same as nginx; a limit in bytes
/// would cut off exactly the large uploads that are refused for their size.
const LINGER_LIMIT: Duration = Duration::from_secs(30);

/// An accepted connection.
pub(super) struct AcceptedSocket {
    pub(super) socket: TcpStream,
    pub(super) peer: SocketAddr,
    pub(super) deadline: Deadline,
    /// Counts it for its address.
    pub(super) permit: Option<AddressPermit>,
    pub(super) _file: files::FilePermit,
    /// Its TLS configuration.
    pub(super) tls: Option<Arc<ServerConfig>>,
}

/// Serves a connection until it ends.
pub(super) async fn serve(worker: Rc<Worker>, frontend: Rc<Frontend>, accepted: AcceptedSocket) {
    let AcceptedSocket { mut socket, peer, deadline, mut permit, _file, tls } = accepted;
    // A socket without a local address is already closed.
    let ends = socket.local_addr().ok().map(|ours| SocketPair { ours, theirs: peer });
    let mut peer = PeerAddress::from(peer);
    if frontend.expects_proxy_header(peer.address, &worker.shared.fleet.load()) {
        deadline.enter(Phase::Header);
        // A load balancer's health checks connect and leave without sending a byte.
        match Box::pin(deadline.limit(read_proxy_header(&mut socket))).await {
            Ok(Ok(ProxiedSource::Proxied(client))) => peer = PeerAddress::from(client),
            // With LOCAL the sender is not the proxy: what it says about itself is not trusted.
            Ok(Ok(ProxiedSource::Local)) => peer = PeerAddress::unknown_behind(peer.socket),
            Ok(Err(error)) => return tracing::debug!(peer = %peer.text, %error, "no PROXY header"),
            Err(_late) => return tracing::debug!(peer = %peer.text, "no PROXY header in time"),
        }
    }
    if let Some(permit) = &mut permit
        && (peer.is_unknown || !frontend.trusts(peer.address, &worker.shared.fleet.load()))
        && !permit.count_for(peer.address)
    {
        worker.shared.metrics.edge_connections_refused.inc();
        return tracing::debug!(peer = %peer.text, "an address has reached its limit of connections");
    }
    let stream = match tls {
        None => Stream::Plain(socket),
        Some(config) => {
            deadline.enter(Phase::Header);
            // A session is larger than all other state of an idle connection: it is boxed, and so never part of the
            // task's own state.
            let handshake = async { TlsAcceptor::from(config).accept(socket).await.map(Box::new) };
            let ended = Box::pin(deadline.limit(handshake)).await;
            worker.shared.metrics.count_handshake(match &ended {
                Ok(Ok(_)) => HandshakeResult::Ok,
                Ok(Err(_)) => HandshakeResult::Failed,
                Err(_late) => HandshakeResult::Late,
            });
            match ended {
                Ok(Ok(session)) if session.get_ref().1.alpn_protocol() == Some(b"h2") => {
                    return Box::pin(http2::serve(worker, frontend, session, peer, deadline)).await;
                }
                Ok(Ok(session)) => Stream::Tls(session),
                Ok(Err(error)) => return tracing::debug!(peer = %peer.text, %error, "a TLS handshake failed"),
                Err(_late) => return tracing::debug!(peer = %peer.text, "a TLS handshake took too long"),
            }
        }
    };
    let passage = frontend.store.as_ref().zip(ends).and_then(|(store, ends)| store.connected(ends));
    let mut client = Client { passage, ..Client::new(worker, frontend, stream, peer, deadline) };
    requests(&mut client).await;
}

/// Reads the header and no byte after it.
async fn read_proxy_header(socket: &mut TcpStream) -> io::Result<ProxiedSource> {
    let mut header = Vec::new();
    let mut bytes = [0; 512];
    loop {
        let peeked = socket.peek(&mut bytes).await?;
        if peeked == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let seen = header.len();
        header.extend_from_slice(&bytes[..peeked]);
        let parsed = proxy_protocol::parse(&header).map_err(io::Error::other)?;
        let (belongs, source) = match parsed {
            ParsedHeader::Complete { len, source } => (len - seen, Some(source)),
            ParsedHeader::Incomplete => (peeked, None),
        };
        socket.read_exact(&mut bytes[..belongs]).await?;
        if let Some(source) = source {
            return Ok(source);
        }
    }
}

async fn requests(client: &mut Client) {
    let mut kept = None;
    loop {
        // A pipelined request was sent before the last answer, so it does not prove that the client received that.
        let is_ahead = kept.is_some();
        let Some(mut request) = next_bytes(client, kept.take()).await else { break };
        client.follow_rules();
        if !is_ahead {
            client.record_read();
        }
        let head = read_head(client, &mut request).await.transpose();
        let after = match head {
            // Boxed for the duration of the request: an idle connection holds only its own state.
            Some(head) => Box::pin(exchange::handle(client, &mut request, head)).await,
            None => Disposition::Close,
        };
        match after {
            Disposition::KeepAlive if request.input.is_empty() => client.worker.requests.put(request),
            Disposition::KeepAlive => kept = Some(request),
            Disposition::Reset => {
                client.stream.reset_on_close();
                client.worker.requests.put(request);
                return;
            }
            Disposition::Close | Disposition::Linger => {
                client.worker.requests.put(request);
                end(client, after).await;
                return;
            }
        }
    }
    // RFC 8446 section 6.1: the side that ends a session sends close_notify, also when idle. On a plain connection the
    // close suffices.
    if !client.stream.is_plain() {
        end(client, Disposition::Close).await;
    }
}

/// Waits for the first bytes of a request, without holding a buffer. `None` at the end of the connection.
async fn next_bytes(client: &mut Client, kept: Option<Box<Request>>) -> Option<Box<Request>> {
    if kept.is_some() {
        return kept;
    }
    client.deadline.enter(Phase::Idle);
    let Client { worker, stream, deadline, .. } = client;
    std::future::poll_fn(|cx| match poll_some(cx, worker, stream, |bytes| first_request(worker, bytes)) {
        Poll::Ready(read) => Poll::Ready(read.ok().flatten()),
        Poll::Pending => deadline.poll(cx).map(|_| None),
    })
    .await
}

fn first_request(worker: &Worker, bytes: &[u8]) -> Option<Box<Request>> {
    if bytes.is_empty() {
        return None;
    }
    let mut request = worker.requests.get();
    request.input.extend_from_slice(bytes);
    Some(request)
}

/// Reads until the head is complete. `None` if the client left without a request.
async fn read_head(client: &mut Client, request: &mut Request) -> Result<Option<usize>, Failure> {
    let limits = client.worker.limits().of_requests();
    let mut entered = false;
    loop {
        let Request { input, input_scan, head, .. } = &mut *request;
        let found = head.read(input, input_scan, limits).map_err(Failure::BadHead)?;
        if found.is_some() {
            return Ok(found);
        }
        if !entered {
            entered = true;
            client.deadline.enter(Phase::Header);
        }
        let Client { worker, stream, deadline, .. } = &mut *client;
        let input = &mut request.input;
        let read = std::future::poll_fn(|cx| {
            let read = poll_some(cx, worker, stream, |bytes| {
                input.extend_from_slice(bytes);
                bytes.len()
            });
            match read {
                Poll::Ready(read) => Poll::Ready(read.map_err(Failure::ClientGone)),
                Poll::Pending => deadline.poll(cx).map(|_: Interrupt| Err(Failure::ClientTimeout)),
            }
        });
        let error = match read.await {
            Ok(0) => Failure::ClientGone(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => continue,
            Err(error) => error,
        };
        // Some clients send a line break behind a body, which belongs to no request (RFC 9112 section 2.2).
        let has_begun = request.input.iter().any(|byte| !matches!(byte, b'\r' | b'\n'));
        return if has_begun { Err(error) } else { Ok(None) };
    }
}

/// Reads once into the worker's scratch buffer and hands the bytes to the callback; an empty slice at the end of the
/// stream.
fn poll_some<T>(
    cx: &mut Context<'_>,
    worker: &Worker,
    stream: &mut Stream,
    take: impl FnOnce(&[u8]) -> T,
) -> Poll<std::io::Result<T>> {
    let mut scratch = worker.scratch.borrow_mut();
    let mut buffer = ReadBuf::new(&mut scratch[..HEAD_READ]);
    match Pin::new(stream).poll_read(cx, &mut buffer) {
        Poll::Ready(Ok(())) => Poll::Ready(Ok(take(buffer.filled()))),
        Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
        Poll::Pending => Poll::Pending,
    }
}

/// Ends a connection. Closing a socket with unread bytes resets it, and the client loses what it has not read yet: so
/// further input is discarded until the client closes, too.
async fn end(client: &mut Client, after: Disposition) {
    if after == Disposition::Close && client.stream.is_plain() {
        // The close has the same effect.
        return;
    }
    client.deadline.enter(Phase::Linger);
    let Client { worker, stream, deadline, .. } = client;
    // An error only means that the client has already gone.
    _ = deadline.limit(stream.shutdown()).await;
    if after != Disposition::Linger {
        return;
    }
    let began = Instant::now();
    while began.elapsed() < LINGER_LIMIT {
        let read = std::future::poll_fn(|cx| match poll_some(cx, worker, stream, <[u8]>::len) {
            Poll::Ready(read) => Poll::Ready(read.unwrap_or(0)),
            Poll::Pending => deadline.poll(cx).map(|_| 0),
        });
        if read.await == 0 {
            return;
        }
        deadline.enter(Phase::Linger);
    }
}
