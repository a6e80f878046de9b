//! HTTP/2 at the edge: hyper speaks the protocol, and each request takes the common request path.
//!
//! A request is written as an HTTP/1.1 head and parsed like any other: one set of checks, one `Head`, one way upstream,
//! for the price of some copying that only HTTP/2 pays. Bodies are bytes on both sides: an [`Http2Stream`] is the
//! client's end of one request as the data path sees it.
//!
//! Informational answers (100, 103) are not forwarded: hyper has no API to send them. Browsers do not wait for them.
//!
//! # Abuse
//!
//! h2 limits concurrent streams, windows, header lists and frames that reset streams. A client that opens streams only
//! to cancel them (CVE-2023-44487) stays within all of these and still costs a request each: a client that cancels most
//! of its requests is disconnected.
//!
//! These do not limit either how long a client may take to receive an answer that hyper already has: hyper has no
//! deadline, and no way to reset a stream whose window is closed. So a request counts as in flight until hyper drops
//! its answer. If that takes too long the connection is shut down: it takes no new streams, and is closed
//! `timeouts.client_body` after the last request that makes progress. hyper has no deadline for a head that never ends
//! either: the screen in front of it says when one has begun.

mod hpack;
mod huffman;
mod screen;
mod session;

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use http::header::{CONTENT_LENGTH, COOKIE, HOST};
use http::{HeaderValue, Method, Request, Response, request};
use hyper::body::{Body, Incoming};
use hyper::rt::Executor;
use hyper::server::conn::http2::Builder;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio_rustls::server::TlsStream;

use super::Frontend;
use super::client::{Client, Disposition, PeerAddress};
use super::deadline::{AwaitedSide, Deadline, Interrupt, Phase};
use super::exchange;
use super::failure::Failure;
use super::stream::Stream;
use super::stream::http2::{AnswerBody, Http2Stream, PIECE, keep_waker};
use super::worker::Worker;
use crate::http1::{BadHead, Scheme};
use screen::{Screen, ScreenedStreams};
use session::TlsSession;

/// Concurrent requests of one connection: what browsers expect (RFC 9113 section 6.5.2 recommends no less).
const MAX_STREAMS: u32 = 100;

/// The window for request bodies, per stream and per connection, in bytes.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;

/// The interval between PINGs to a silent client, and the timeout for the reply.
const PING: Duration = Duration::from_secs(30);
const PONG: Duration = Duration::from_secs(20);

/// Cancelled requests that are tolerated, however few others there were.
const FREE_CANCELS: u64 = 100;

/// Spawns tasks on the worker's own thread.
#[derive(Clone, Copy)]
struct OnThisThread;

impl<F: Future<Output = ()> + 'static> Executor<F> for OnThisThread {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}

/// State shared by the requests of one connection.
struct Http2Connection {
    worker: Rc<Worker>,
    frontend: Rc<Frontend>,
    peer: PeerAddress,
    deadline: Deadline,
    active: Cell<u32>,
    /// Requests that were served so far.
    total: Cell<u64>,
    cancelled: Cell<u64>,
    /// Requests whose heads were refused before they were served, and how many of them were too long.
    refused: Cell<u64>,
    refused_too_long: Cell<u64>,
    /// The client does not read the rest of an answer.
    stuck: Cell<bool>,
    leaving: Cell<bool>,
    /// The head that is arriving, by its number.
    head: Cell<Option<u64>>,
    /// It took too long.
    is_head_late: Cell<bool>,
    /// Wakes the connection's task.
    waker: RefCell<Option<Waker>>,
}

/// Serves a connection until it ends.
pub(super) async fn serve(
    worker: Rc<Worker>,
    frontend: Rc<Frontend>,
    session: Box<TlsStream<TcpStream>>,
    peer: PeerAddress,
    deadline: Deadline,
) {
    let max_head = u32::try_from(worker.limits().max_head).unwrap_or(u32::MAX);
    let connection = Rc::new(Http2Connection {
        worker,
        frontend,
        peer,
        deadline,
        active: Cell::default(),
        total: Cell::default(),
        cancelled: Cell::default(),
        refused: Cell::default(),
        refused_too_long: Cell::default(),
        stuck: Cell::default(),
        leaving: Cell::default(),
        head: Cell::default(),
        is_head_late: Cell::default(),
        waker: RefCell::default(),
    });
    connection.deadline.enter(Phase::Idle);
    let mut builder = Builder::new(OnThisThread);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(max_head)
        .max_send_buf_size(PIECE)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PONG)
        .auto_date_header(false);
    let service = service_fn(|request| answer(Active::begin(Rc::clone(&connection)), request));
    let session = TlsSession::new(session);
    // Boxed, so that it is dropped before the session ends.
    let screened = Screen::new(session.clone(), max_head as usize);
    let passed = screened.passed();
    let mut serving = Box::pin(builder.serve_connection(TokioIo::new(screened), service));
    let is_through = poll_fn(|cx| {
        if let Poll::Ready(end) = serving.as_mut().poll(cx) {
            if let Err(error) = &end {
                tracing::debug!(peer = %connection.peer.text, %error, "an HTTP/2 connection failed");
            }
            return Poll::Ready(end.is_ok());
        }
        keep_waker(&mut connection.waker.borrow_mut(), cx);
        connection.record_refused(&passed);
        connection.follow_head(passed.unfinished.get());
        if connection.is_abused() {
            tracing::info!(peer = %connection.peer.text, "an HTTP/2 client cancels most requests, and is cut");
            return Poll::Ready(false);
        }
        if connection.stuck.get() && !connection.leaving.get() {
            tracing::info!(peer = %connection.peer.text, "an HTTP/2 client does not read an answer, and is cut");
            connection.leave();
            serving.as_mut().graceful_shutdown();
            cx.waker().wake_by_ref();
        }
        if connection.is_head_late.get() && connection.active.get() == 0 {
            return Poll::Ready(false);
        }
        while let Poll::Ready(interrupt) = connection.deadline.poll(cx) {
            let out_of_patience = connection.leaving.get() && interrupt == Interrupt::Timeout;
            if out_of_patience && connection.active.get() == 0 {
                return Poll::Ready(false);
            }
            connection.note_late_head();
            connection.leave();
            serving.as_mut().graceful_shutdown();
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    });
    let is_through = is_through.await;
    drop(serving);
    if is_through {
        session.end(&connection.deadline).await;
    }
}

impl Http2Connection {
    fn is_abused(&self) -> bool {
        let cancelled = self.cancelled.get();
        cancelled > FREE_CANCELS && cancelled > self.total.get() / 2
    }

    /// Counts and logs the requests that h2 has refused by itself. Right after a poll of hyper in which h2 has read everything,
    /// all others are served: hyper accepts until there is no more. Streams that come while the connection ends are no
    /// requests: the client is told to send them elsewhere (RFC 9113 section 6.8).
    fn record_refused(&self, passed: &ScreenedStreams) {
        if !passed.is_read.get() || self.leaving.get() {
            return;
        }
        let count = |of: &Cell<u64>, all: u64| all.saturating_sub(of.replace(all.max(of.get())));
        let refused = count(&self.refused, passed.opened.get().saturating_sub(self.total.get()));
        if refused == 0 {
            return;
        }
        let too_long = count(&self.refused_too_long, passed.too_long.get()).min(refused);
        for number in 0..refused {
            let reason = if number < too_long { BadHead::TooLarge } else { BadHead::Syntax("HTTP/2 forbids it") };
            exchange::record_refused(&self.worker, &self.frontend, &self.peer, &Failure::BadHead(reason));
        }
    }

    /// Notes which head is arriving now. Its time counts from its first byte, whatever else goes on.
    fn follow_head(&self, unfinished: Option<u64>) {
        if self.head.replace(unfinished) != unfinished {
            self.settle();
        }
    }

    /// If a head was awaited for too long, its request is recorded. The client is sent away instead of answered: there is no
    /// stream yet on which it could be.
    fn note_late_head(&self) {
        if self.head.get().is_some() && !self.leaving.get() {
            self.is_head_late.set(true);
            exchange::record_refused(&self.worker, &self.frontend, &self.peer, &Failure::ClientTimeout);
        }
    }

    /// Enters the phase that follows from what the client does.
    fn settle(&self) {
        if !self.leaving.get() {
            self.deadline.enter(match (self.head.get(), self.active.get()) {
                (Some(_), _) => Phase::Header,
                (None, 0) => Phase::Idle,
                (None, _) => Phase::Streams,
            });
        }
    }

    fn leave(&self) {
        self.leaving.set(true);
        self.deadline.enter(Phase::Leaving);
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// A request in flight. While there is one, the connection is not idle.
struct Active(Rc<Http2Connection>);

impl Active {
    fn begin(connection: Rc<Http2Connection>) -> Self {
        connection.active.set(connection.active.get() + 1);
        connection.total.set(connection.total.get().saturating_add(1));
        // Its own head has just ended, and perhaps another one has begun: that is seen when all is read.
        if connection.head.get().is_none() {
            connection.settle();
        }
        Active(connection)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.set(self.0.active.get() - 1);
        if self.0.active.get() > 0 {
            return;
        }
        if self.0.leaving.get() {
            // The client has as long for the rest that hyper holds as for a piece of a body.
            self.0.deadline.enter(Phase::Leaving);
        } else if self.0.head.get().is_none() {
            self.0.settle();
        }
        if self.0.is_head_late.get() {
            self.0.wake();
        }
    }
}

/// Hands one request to its own task, so that its deadline works even if the client reads nothing.
async fn answer(active: Active, request: Request<Incoming>) -> Result<Response<AnswerBody>, io::Error> {
    let (head, answered) = oneshot::channel();
    tokio::task::spawn_local(carry_out(active, request, head));
    // If the node's answer cannot be converted, none arrives here: the stream is reset.
    answered.await.map_err(|_| io::ErrorKind::ConnectionReset.into())
}

/// Serves one request, until hyper has dropped its answer.
async fn carry_out(active: Active, request: Request<Incoming>, head: oneshot::Sender<Response<AnswerBody>>) {
    let connection = &*active.0;
    let Http2Connection { worker, frontend, peer, .. } = connection;
    let (parts, body) = request.into_parts();
    let mut exchanged = worker.requests.get();
    exchanged.head.clear();
    let written = write_head(&mut exchanged.input, &parts, &body);
    let max_fields = worker.limits().max_fields;
    let parsed = written.and_then(|len| exchanged.head.parse(&exchanged.input[..len], max_fields).map(|()| len));
    let stream = Stream::Http2(Http2Stream::new(parts.method == Method::HEAD, body, head));
    let deadline = worker.deadline(frontend);
    let mut client = Client::new(Rc::clone(worker), Rc::clone(frontend), stream, peer.clone(), deadline);
    client.follow_rules();
    let after = exchange::handle(&mut client, &mut exchanged, parsed.map_err(Failure::BadHead)).await;
    worker.requests.put(exchanged);
    let Client { stream: Stream::Http2(mut stream), deadline, .. } = client else { return };
    if stream.was_cancelled() {
        connection.cancelled.set(connection.cancelled.get().saturating_add(1));
        connection.wake();
    }
    // A cut answer has had its time. The rest of a complete one has as long as any piece of it had.
    deadline.end_request();
    deadline.enter(if after == Disposition::Reset { Phase::Linger } else { Phase::Body(AwaitedSide::Client) });
    match after {
        Disposition::Reset => stream.reset(),
        Disposition::KeepAlive | Disposition::Close | Disposition::Linger => stream.finish(),
    }
    let slot = stream.into_slot();
    if deadline.limit(poll_fn(|cx| slot.borrow_mut().poll_let_go(cx))).await.is_err() {
        connection.stuck.set(true);
        connection.wake();
    }
}

/// Writes a request as an HTTP/1.1 head. Returns its length.
///
/// # Errors
/// If `:authority` and `Host` disagree (RFC 9113 section 8.3.1), or there are several `Host` fields. All else is left
/// to the parser.
fn write_head(out: &mut Vec<u8>, parts: &request::Parts, body: &Incoming) -> Result<usize, BadHead> {
    let mut push = |pieces: &[&[u8]]| pieces.iter().for_each(|piece| out.extend_from_slice(piece));
    let authority = parts.uri.authority().map(|authority| authority.as_str().as_bytes());
    let mut hosts = parts.headers.get_all(HOST).iter().map(HeaderValue::as_bytes);
    let host = hosts.next();
    let scheme = if parts.uri.scheme_str() == Some("http") { Scheme::Http } else { Scheme::Https };
    let agrees = |host: &[u8]| authority.is_none_or(|authority| scheme.is_same_host(authority, host));
    if hosts.next().is_some() || host.is_some_and(|host| !agrees(host)) {
        return Err(BadHead::Host);
    }
    let target = parts.uri.path_and_query().map(|target| target.as_str().as_bytes());
    let target = target.or(authority).unwrap_or_default();
    push(&[parts.method.as_str().as_bytes(), b" ", target, b" HTTP/1.1\r\n"]);
    if let Some(host) = authority.or(host) {
        push(&[b"Host: ", host, b"\r\n"]);
    }
    for (name, value) in &parts.headers {
        if name != HOST && name != COOKIE {
            push(&[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
        }
    }
    // Cookies may arrive in several fields, and are joined into one (RFC 9113 section 8.2.3).
    let mut crumbs = parts.headers.get_all(COOKIE).iter();
    if let Some(first) = crumbs.next() {
        push(&[b"Cookie: ", first.as_bytes()]);
        crumbs.for_each(|crumb| push(&[b"; ", crumb.as_bytes()]));
        push(&[b"\r\n"]);
    }
    if !body.is_end_stream() && !parts.headers.contains_key(CONTENT_LENGTH) {
        push(&[b"Transfer-Encoding: chunked\r\n"]);
    }
    push(&[b"\r\n"]);
    Ok(out.len())
}
