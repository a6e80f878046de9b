//! HTTP/2 at the edge: hyper speaks it, and each of its requests takes the same path as any other.
//!
//! A request is written down as the head of an HTTP/1.1 request and read again by the parser that all others pass: one
//! set of checks, one `Head`, one way upstream, for the price of some copying that only HTTP/2 pays. Bodies are bytes on
//! both sides: a [`Half`] is the client's end of one request as the data path sees it. What hyper and the data path hand
//! each other waits in a slot that holds one piece, so neither can run ahead of the other.
//!
//! Informational answers (100, 103) are not passed on: hyper has no way to send them. Browsers do not wait for them.
//!
//! # Abuse
//!
//! Streams at once, windows, header lists and frames that reset streams are bounded by h2. A client that opens streams
//! only to cancel them (CVE-2023-44487) stays within all of these and still costs a request each: whoever cancels most of
//! what it asks for is cut.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use http::header::{CONTENT_LENGTH, COOKIE, HOST, VIA};
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, request};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::rt::Executor;
use hyper::server::conn::http2::Builder;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::ReadBuf;
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio_rustls::server::TlsStream;

use super::Route;
use super::client::{After, Client, Peer};
use super::deadline::{Deadline, Interrupt, Phase};
use super::exchange;
use super::failure::Failure;
use super::stream::Stream;
use super::worker::Worker;
use crate::http1::{BadHead, ResponseHead, push_decimal};

/// Requests of one connection at once: what browsers expect to have (RFC 9113 section 6.5.2 recommends no less).
const MAX_STREAMS: u32 = 100;

/// How much of request bodies may be on its way, per stream and per connection, in bytes.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;

/// The most that one write hands to hyper, in bytes: that much may wait for the client per stream.
const PIECE: usize = 32 * 1024;

/// How often a silent client is asked whether it is still there, and how long it may take to say so.
const PING: Duration = Duration::from_secs(30);
const PONG: Duration = Duration::from_secs(20);

/// Cancelled requests that nobody minds, however few others there were.
const FREE_CANCELS: u32 = 100;

/// Spawns on the worker's own thread.
#[derive(Clone, Copy)]
struct OnThisThread;

impl<F: Future<Output = ()> + 'static> Executor<F> for OnThisThread {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}

/// What the requests of one connection have in common.
struct Connection<R> {
    worker: Rc<Worker>,
    route: Rc<R>,
    peer: Peer,
    deadline: Deadline,
    active: Cell<u32>,
    total: Cell<u32>,
    cancelled: Cell<u32>,
    leaving: Cell<bool>,
}

/// Serves a connection to its end.
pub(super) async fn serve<R: Route>(
    worker: Rc<Worker>,
    route: Rc<R>,
    session: Box<TlsStream<TcpStream>>,
    peer: Peer,
    deadline: Deadline,
) {
    let max_head = u32::try_from(worker.shared.limits.max_head).unwrap_or(u32::MAX);
    let connection = Rc::new(Connection {
        worker,
        route,
        peer,
        deadline,
        active: Cell::default(),
        total: Cell::default(),
        cancelled: Cell::default(),
        leaving: Cell::default(),
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
    let service = service_fn(|request| answer(Rc::clone(&connection), request));
    let mut serving = pin!(builder.serve_connection(TokioIo::new(session), service));
    poll_fn(|cx| {
        if let Poll::Ready(end) = serving.as_mut().poll(cx) {
            if let Err(error) = end {
                tracing::debug!(peer = %connection.peer.text, %error, "an HTTP/2 connection failed");
            }
            return Poll::Ready(());
        }
        if connection.is_abused() {
            tracing::info!(peer = %connection.peer.text, "an HTTP/2 client cancels what it asks for, and is cut");
            return Poll::Ready(());
        }
        while let Poll::Ready(interrupt) = connection.deadline.poll(cx) {
            let out_of_patience = connection.leaving.get() && interrupt == Interrupt::Timeout;
            if out_of_patience && connection.active.get() == 0 {
                return Poll::Ready(());
            }
            connection.leaving.set(true);
            connection.deadline.enter(Phase::Leaving);
            serving.as_mut().graceful_shutdown();
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    })
    .await;
}

impl<R> Connection<R> {
    fn is_abused(&self) -> bool {
        let cancelled = self.cancelled.get();
        cancelled > FREE_CANCELS && cancelled > self.total.get() / 2
    }

    fn enter(&self, phase: Phase) {
        if !self.leaving.get() {
            self.deadline.enter(phase);
        }
    }
}

/// A request is under way. While any is, the connection itself cannot be idle for too long.
struct Active<R>(Rc<Connection<R>>);

impl<R> Active<R> {
    fn begin(connection: Rc<Connection<R>>) -> Self {
        connection.active.set(connection.active.get() + 1);
        connection.total.set(connection.total.get().saturating_add(1));
        connection.enter(Phase::Streams);
        Active(connection)
    }
}

impl<R> Drop for Active<R> {
    fn drop(&mut self) {
        self.0.active.set(self.0.active.get() - 1);
        if self.0.active.get() == 0 {
            self.0.enter(Phase::Idle);
        }
    }
}

/// Carries out one request in a task of its own, so that its deadline works also while the client takes nothing.
async fn answer<R: Route>(
    connection: Rc<Connection<R>>,
    request: Request<Incoming>,
) -> Result<Response<AnswerBody>, io::Error> {
    let (head, answered) = oneshot::channel();
    let active = Active::begin(Rc::clone(&connection));
    tokio::task::spawn_local(async move {
        let (parts, body) = request.into_parts();
        let Connection { worker, route, peer, .. } = &*active.0;
        let mut buffers = worker.stock.take();
        let written = write_head(&mut buffers.input, &parts, &body);
        let stream = Stream::Http2(Half::new(body, head));
        let deadline = worker.deadline::<R>();
        let mut client = Client::new(Rc::clone(worker), Rc::clone(route), stream, peer.clone(), deadline);
        let after = exchange::handle(&mut client, &mut buffers, written.map_err(Failure::BadHead)).await;
        if let Stream::Http2(half) = &mut client.stream {
            match after {
                After::Reset => half.reset(),
                After::KeepAlive | After::Close | After::Linger => half.finish(),
            }
            if half.was_cancelled() {
                active.0.cancelled.set(active.0.cancelled.get() + 1);
            }
        }
        worker.stock.give_back(buffers);
    });
    // Nobody answers where the node's answer cannot be passed on: the stream is reset.
    answered.await.map_err(|_| io::ErrorKind::ConnectionReset.into())
}

/// Writes a request down as the head of an HTTP/1.1 request. Returns its length.
///
/// # Errors
/// `:authority` and `Host` that disagree (RFC 9113 section 8.3.1). Everything else is left to the parser.
fn write_head(out: &mut Vec<u8>, parts: &request::Parts, body: &Incoming) -> Result<usize, BadHead> {
    let mut push = |pieces: &[&[u8]]| pieces.iter().for_each(|piece| out.extend_from_slice(piece));
    let authority = parts.uri.authority().map(|authority| authority.as_str().as_bytes());
    let host = parts.headers.get(HOST).map(HeaderValue::as_bytes);
    if let (Some(authority), Some(host)) = (authority, host)
        && !authority.eq_ignore_ascii_case(host)
    {
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
    // Cookies may come in crumbs, and go on as one field (RFC 9113 section 8.2.3).
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

/// The head of an answer, as hyper wants it. `None` where it has bytes that HTTP/2 cannot carry.
fn head_of(head: &ResponseHead, bytes: &[u8]) -> Option<Response<()>> {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(head.status).ok()?;
    let headers = response.headers_mut();
    for (name, value) in head.kept_fields(bytes) {
        headers.append(HeaderName::from_bytes(name).ok()?, HeaderValue::from_bytes(value).ok()?);
    }
    headers.append(VIA, HeaderValue::from_static("1.1 clearcoat"));
    if let Some(length) = head.announced_length() {
        headers.insert(CONTENT_LENGTH, length.into());
    }
    Some(response)
}

/// What waits between the data path and hyper: one piece of the answer, and how it ended.
#[derive(Debug, Default)]
struct Slot {
    piece: Option<Bytes>,
    end: Option<End>,
    /// hyper wants nothing more: the client cancelled the request, or is gone.
    gone: bool,
    writer: Option<Waker>,
    reader: Option<Waker>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Whole,
    Cut,
}

/// The client's end of one request.
#[derive(Debug)]
pub(super) struct Half {
    request: Incoming,
    unread: Bytes,
    head: Option<oneshot::Sender<Response<AnswerBody>>>,
    slot: Rc<RefCell<Slot>>,
}

impl Half {
    fn new(request: Incoming, head: oneshot::Sender<Response<AnswerBody>>) -> Self {
        Half { request, unread: Bytes::new(), head: Some(head), slot: Rc::default() }
    }

    /// Begins the answer. Its body is what is written from now on; `empty` says that there is none. False where the head
    /// cannot be carried, or nobody waits for it.
    pub(super) fn begin_answer(&mut self, head: &ResponseHead, bytes: &[u8], empty: bool) -> bool {
        head_of(head, bytes).is_some_and(|head| self.send_head(head, empty))
    }

    /// An answer of our own.
    pub(super) fn answer_with(&mut self, status: u16, text: &str, head_only: bool) -> bool {
        let mut response = Response::new(());
        let Ok(code) = StatusCode::from_u16(status) else { return false };
        *response.status_mut() = code;
        let fields = crate::http1::error_fields(status);
        for (name, value) in fields {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        let text = format!("{text}\n");
        let mut length = Vec::new();
        push_decimal(&mut length, text.len() as u64);
        if let Ok(length) = HeaderValue::from_bytes(&length) {
            response.headers_mut().insert(CONTENT_LENGTH, length);
        }
        if !head_only {
            self.slot.borrow_mut().piece = Some(Bytes::from(text));
        }
        self.send_head(response, head_only)
    }

    fn send_head(&mut self, head: Response<()>, empty: bool) -> bool {
        if empty {
            self.slot.borrow_mut().end = Some(End::Whole);
        }
        let body = AnswerBody(Rc::clone(&self.slot));
        self.head.take().is_some_and(|answered| answered.send(head.map(|()| body)).is_ok())
    }

    /// The answer is complete.
    pub(super) fn finish(&mut self) {
        self.end(End::Whole);
    }

    /// The answer is cut: the client sees a reset stream, never a complete answer.
    pub(super) fn reset(&mut self) {
        self.head = None;
        self.end(End::Cut);
    }

    fn end(&mut self, end: End) {
        let mut slot = self.slot.borrow_mut();
        slot.end.get_or_insert(end);
        if let Some(reader) = slot.reader.take() {
            reader.wake();
        }
    }

    /// Whether the client gave up before it had its answer.
    pub(super) fn was_cancelled(&self) -> bool {
        self.slot.borrow().gone || self.head.as_ref().is_some_and(oneshot::Sender::is_closed)
    }

    pub(super) fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.head {
            Some(answered) => answered.poll_closed(cx),
            None => Poll::Pending,
        }
    }

    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.unread.is_empty() {
            match ready!(Pin::new(&mut self.request).poll_frame(cx)) {
                None if self.request.is_end_stream() => return Poll::Ready(Ok(())),
                // hyper tells a request that was reset without an error like one that has ended.
                None => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                // Trailers of a request are not passed on.
                Some(Ok(frame)) => self.unread = frame.into_data().unwrap_or_default(),
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
            }
        }
        let piece = self.unread.split_to(self.unread.len().min(buffer.remaining()));
        buffer.put_slice(&piece);
        Poll::Ready(Ok(()))
    }

    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut slot = self.slot.borrow_mut();
        if slot.gone {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if slot.piece.is_some() {
            slot.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let piece = &bytes[..bytes.len().min(PIECE)];
        slot.piece = Some(Bytes::copy_from_slice(piece));
        if let Some(reader) = slot.reader.take() {
            reader.wake();
        }
        Poll::Ready(Ok(piece.len()))
    }
}

impl Drop for Half {
    /// Nothing ends well that was not said to.
    fn drop(&mut self) {
        self.end(End::Cut);
    }
}

/// The body of an answer, as hyper takes it.
#[derive(Debug)]
struct AnswerBody(Rc<RefCell<Slot>>);

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let mut slot = self.0.borrow_mut();
        if let Some(piece) = slot.piece.take() {
            if let Some(writer) = slot.writer.take() {
                writer.wake();
            }
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        match slot.end {
            Some(End::Whole) => Poll::Ready(None),
            Some(End::Cut) => Poll::Ready(Some(Err(io::ErrorKind::ConnectionAborted.into()))),
            None => {
                slot.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let slot = self.0.borrow();
        slot.piece.is_none() && slot.end == Some(End::Whole)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        let mut slot = self.0.borrow_mut();
        slot.gone = slot.end.is_none() || slot.piece.is_some();
        if let Some(writer) = slot.writer.take() {
            writer.wake();
        }
    }
}
