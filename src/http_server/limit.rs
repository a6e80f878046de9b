//! Limits the size of a request, head and body together; and adds a text to hyper's own errors.
//!
//! hyper limits its buffer, and answers 431 to a head that does not fit. Our contract is 413 for any request that is
//! too large, so the bytes are counted below hyper, and the answer is written there: no other answer can be in
//! progress, since a connection's requests are answered one at a time.
//!
//! hyper answers requests that it cannot parse by itself, with a status alone, and closes. Our answers always have a
//! `Content-Type`, so an answer without one is hyper's, and is replaced by one with a reason.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// The most header fields of a request: hyper's own default.
pub(super) const MAX_FIELDS: usize = 100;

/// An answer that bypasses hyper, and is the last one of its connection.
fn refusal(status: &str, error: &str) -> Vec<u8> {
    let body = serde_json::json!({ "error": error }).to_string();
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n");
    format!("{head}Connection: close\r\n\r\n{body}").into_bytes()
}

fn too_large() -> Vec<u8> {
    refusal("413 Content Too Large", "request is too large")
}

/// The offset of hyper's own answer in its output, if there is one. It is the last of its connection.
fn own_answer(bytes: &[u8]) -> Option<usize> {
    const STATUS_LINE: &[u8] = b"HTTP/1.1 4";
    let at = bytes.ends_with(b"\r\n\r\n").then(|| memchr::memmem::rfind(bytes, STATUS_LINE)).flatten()?;
    let is_ours = memchr::memmem::find(&bytes[at..], b"\r\ncontent-type: ").is_some();
    (!is_ours).then_some(at)
}

/// The replacement for hyper's own answer, which begins with its status line.
fn in_words(answer: &[u8]) -> Vec<u8> {
    match answer.get(b"HTTP/1.1 ".len()..b"HTTP/1.1 431".len()) {
        Some(b"431") => refusal("413 Content Too Large", &format!("more than {MAX_FIELDS} header fields")),
        Some(b"414") => refusal("413 Content Too Large", "the request target is too long: more than 65,534 bytes"),
        _ => refusal(
            "400 Bad Request",
            "the request is malformed: a method, a target without blanks (other characters than letters and digits \
             percent-encoded), HTTP/1.0 or 1.1, and header fields as in RFC 9112 are wanted",
        ),
    }
}

/// A connection that counts what it reads.
pub(super) struct Limited {
    stream: TcpStream,
    meter: Meter,
}

/// A connection's byte count, and its limit.
#[derive(Clone)]
pub(super) struct Meter {
    read: Arc<AtomicUsize>,
    limit: usize,
}

impl Meter {
    /// Resets the count after an answered request.
    pub(super) fn next_request(&self) {
        self.read.store(0, Ordering::Relaxed);
    }

    /// Whether the limit was exceeded: the connection has been answered 413 and ends.
    pub(super) fn is_over(&self) -> bool {
        self.read.load(Ordering::Relaxed) > self.limit
    }
}

impl Limited {
    pub(super) fn new(stream: TcpStream, limit: usize) -> (Self, Meter) {
        let meter = Meter { read: Arc::default(), limit };
        (Limited { stream, meter: meter.clone() }, meter)
    }
}

impl AsyncRead for Limited {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buffer))?;
        let read = buffer.filled().len() - before;
        this.meter.read.fetch_add(read, Ordering::Relaxed);
        if !this.meter.is_over() {
            return Poll::Ready(Ok(()));
        }
        // The socket buffer is empty, so the answer fits. An error means that the client has gone.
        _ = this.stream.try_write(&too_large());
        Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "request is too large")))
    }
}

impl AsyncWrite for Limited {
    /// Not vectored, so that hyper's own answer arrives in one piece: these connections are few and their answers
    /// short.
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let stream = Pin::new(&mut self.get_mut().stream);
        match own_answer(bytes) {
            None => stream.poll_write(cx, bytes),
            Some(0) => {
                ready!(stream.poll_write_ready(cx))?;
                // All earlier output was flushed, so there is room for this answer.
                _ = stream.try_write(&in_words(bytes));
                Poll::Ready(Ok(bytes.len()))
            }
            Some(at) => stream.poll_write(cx, &bytes[..at]),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
