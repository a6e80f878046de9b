//! The exchange of one request between hyper and the data path: bytes on both sides.
//!
//! The answer passes through a slot that holds one piece, so neither side can run ahead of the other. Each side learns
//! when the other has gone: the data path that the rest is not wanted, and hyper whether the answer is complete.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use http::header::{CONTENT_LENGTH, STRICT_TRANSPORT_SECURITY, VIA};
use http::{HeaderName, HeaderValue, Response, StatusCode};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use tokio::io::ReadBuf;
use tokio::sync::oneshot;

use crate::http1::{OwnResponse, ResponseHead};

/// The most bytes handed to hyper in one write, and so buffered per stream for the client.
pub(in crate::proxy) const PIECE: usize = 32 * 1024;

/// The slot between the data path and hyper: one piece of the answer, and how it ended.
#[derive(Debug, Default)]
pub(in crate::proxy) struct AnswerSlot {
    piece: Option<Bytes>,
    end: Option<AnswerEnd>,
    /// hyper wants no more: the client cancelled the request, or is gone.
    gone: bool,
    /// hyper holds the other end.
    held: bool,
    writer: Option<Waker>,
    reader: Option<Waker>,
}

impl AnswerSlot {
    /// Ready once hyper has dropped the answer: because it has all of it, or wants no more.
    pub(in crate::proxy) fn poll_let_go(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.held {
            return Poll::Ready(());
        }
        keep_waker(&mut self.writer, cx);
        Poll::Pending
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AnswerEnd {
    Whole,
    Cut,
}

/// The client's end of one request.
#[derive(Debug)]
pub(in crate::proxy) struct Http2Stream {
    /// The request was HEAD, even if its head was later rejected.
    is_head: bool,
    request: Incoming,
    unread: Bytes,
    head: Option<oneshot::Sender<Response<AnswerBody>>>,
    slot: Rc<RefCell<AnswerSlot>>,
}

impl Http2Stream {
    pub(in crate::proxy) fn new(is_head: bool, request: Incoming, head: oneshot::Sender<Response<AnswerBody>>) -> Self {
        Http2Stream { is_head, request, unread: Bytes::new(), head: Some(head), slot: Rc::default() }
    }

    /// Leaves the rest of the answer to hyper. If it is incomplete, the stream is reset.
    pub(in crate::proxy) fn into_slot(self) -> Rc<RefCell<AnswerSlot>> {
        Rc::clone(&self.slot)
    }

    /// Begins the answer. Later writes are its body; `empty` says that it has none. False if the head cannot be
    /// represented, or the client has gone.
    pub(in crate::proxy) fn begin_answer(&mut self, head: &ResponseHead, empty: bool) -> bool {
        head_of(head).is_some_and(|head| self.send_head(head, empty))
    }

    /// Sends an answer of our own, with this body. False if the client has gone, or HTTP/2 cannot carry a field.
    pub(in crate::proxy) fn answer_with(&mut self, answer: &OwnResponse<'_>, body: Bytes) -> bool {
        let mut response = Response::new(());
        let Ok(code) = StatusCode::from_u16(answer.status) else { return false };
        *response.status_mut() = code;
        let mut is_good = true;
        answer.each_field(|name, value| match HeaderValue::from_bytes(value) {
            Ok(value) => _ = response.headers_mut().insert(name, value),
            Err(_) => is_good = false,
        });
        if !is_good {
            return false;
        }
        response.headers_mut().insert(CONTENT_LENGTH, answer.body.len().into());
        let empty = answer.head_only || self.is_head || body.is_empty();
        if !empty {
            self.slot.borrow_mut().piece = Some(body);
        }
        self.send_head(response, empty)
    }

    fn send_head(&mut self, head: Response<()>, empty: bool) -> bool {
        if empty {
            self.slot.borrow_mut().end = Some(AnswerEnd::Whole);
        }
        let body = AnswerBody(Rc::clone(&self.slot));
        self.slot.borrow_mut().held = true;
        self.head.take().is_some_and(|answered| answered.send(head.map(|()| body)).is_ok())
    }

    /// Marks the answer as complete.
    pub(in crate::proxy) fn finish(&mut self) {
        self.end(AnswerEnd::Whole);
    }

    /// Cuts the answer: the client sees a reset stream, never a complete answer.
    pub(in crate::proxy) fn reset(&mut self) {
        self.head = None;
        self.end(AnswerEnd::Cut);
    }

    fn end(&mut self, end: AnswerEnd) {
        let mut slot = self.slot.borrow_mut();
        slot.end.get_or_insert(end);
        if let Some(reader) = slot.reader.take() {
            reader.wake();
        }
    }

    /// Whether the client cancelled the request before its answer was complete.
    pub(in crate::proxy) fn was_cancelled(&self) -> bool {
        self.slot.borrow().gone || self.head.as_ref().is_some_and(oneshot::Sender::is_closed)
    }

    pub(in crate::proxy) fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.head {
            Some(answered) => answered.poll_closed(cx),
            None => Poll::Pending,
        }
    }

    pub(in crate::proxy) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.unread.is_empty() {
            match ready!(Pin::new(&mut self.request).poll_frame(cx)) {
                None if self.request.is_end_stream() => return Poll::Ready(Ok(())),
                // hyper reports a reset request body like a complete one, without an error.
                None => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                // A request's trailers are not forwarded.
                Some(Ok(frame)) => self.unread = frame.into_data().unwrap_or_default(),
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
            }
        }
        let piece = self.unread.split_to(self.unread.len().min(buffer.remaining()));
        buffer.put_slice(&piece);
        Poll::Ready(Ok(()))
    }

    pub(in crate::proxy) fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut slot = self.slot.borrow_mut();
        if slot.gone {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if slot.piece.is_some() {
            keep_waker(&mut slot.writer, cx);
            return Poll::Pending;
        }
        let piece = &bytes[..bytes.len().min(PIECE)];
        slot.piece = Some(Bytes::copy_from_slice(piece));
        if let Some(reader) = slot.reader.take() {
            reader.wake();
        }
        Poll::Ready(Ok(piece.len()))
    }

    /// Never waits. Registers for a wake-up when the client cancels the request: a task that waits for the node would
    /// otherwise notice only with the node's next bytes.
    pub(in crate::proxy) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut slot = self.slot.borrow_mut();
        if slot.gone {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        keep_waker(&mut slot.writer, cx);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Http2Stream {
    /// Dropping without `finish` resets the stream.
    fn drop(&mut self) {
        self.end(AnswerEnd::Cut);
    }
}

/// The body of an answer, as hyper reads it.
#[derive(Debug)]
pub(in crate::proxy) struct AnswerBody(Rc<RefCell<AnswerSlot>>);

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
            Some(AnswerEnd::Whole) => Poll::Ready(None),
            Some(AnswerEnd::Cut) => Poll::Ready(Some(Err(io::ErrorKind::ConnectionAborted.into()))),
            None => {
                slot.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let slot = self.0.borrow();
        slot.piece.is_none() && slot.end == Some(AnswerEnd::Whole)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        let mut slot = self.0.borrow_mut();
        slot.gone = slot.end.is_none() || slot.piece.is_some();
        slot.held = false;
        if let Some(writer) = slot.writer.take() {
            writer.wake();
        }
    }
}

/// Stores the waker of a waiting task.
pub(in crate::proxy) fn keep_waker(kept: &mut Option<Waker>, cx: &Context<'_>) {
    if !kept.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
        *kept = Some(cx.waker().clone());
    }
}

/// Names the request, if it has an id: that is printable ASCII.
fn set_request_id(response: &mut Response<()>, id: &[u8]) {
    if let Ok(id) = HeaderValue::from_bytes(id)
        && !id.is_empty()
    {
        response.headers_mut().insert("x-request-id", id);
    }
}

/// The head of an answer, as hyper wants it. `None` if it has bytes that HTTP/2 cannot carry.
fn head_of(head: &ResponseHead) -> Option<Response<()>> {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(head.status).ok()?;
    let headers = response.headers_mut();
    for (name, value) in head.kept_fields() {
        headers.append(HeaderName::from_bytes(name).ok()?, HeaderValue::from_bytes(value).ok()?);
    }
    for (name, value) in head.added_fields() {
        headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    set_request_id(&mut response, head.request_id());
    let headers = response.headers_mut();
    if !head.strict_transport().is_empty() {
        headers.insert(STRICT_TRANSPORT_SECURITY, HeaderValue::from_bytes(head.strict_transport()).ok()?);
    }
    headers.append(VIA, HeaderValue::from_static("1.1 clearcoat"));
    if let Some(length) = head.announced_length() {
        headers.insert(CONTENT_LENGTH, length.into());
    }
    Some(response)
}
