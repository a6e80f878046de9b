//! A bound on what one request may send, head and body together.
//!
//! hyper bounds its buffer, and answers 431 to a head that does not fit. Our contract is 413 for any request that is
//! too large, so the bytes are counted below hyper, and the answer is given there: nothing else can be on its way at
//! that moment, since the requests of a connection are answered one after the other.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

const TOO_LARGE: &[u8] = b"HTTP/1.1 413 Content Too Large\r\nContent-Type: application/json\r\nContent-Length: 32\r\n\
    Connection: close\r\n\r\n{\"error\":\"request is too large\"}";

/// A connection that counts what it reads.
pub(super) struct Limited {
    stream: TcpStream,
    meter: Meter,
}

/// The count of a connection, and its limit.
#[derive(Clone)]
pub(super) struct Meter {
    read: Arc<AtomicUsize>,
    limit: usize,
}

impl Meter {
    /// A request was answered: the next one has the whole limit again.
    pub(super) fn next_request(&self) {
        self.read.store(0, Ordering::Relaxed);
    }

    /// Whether the limit is passed: the connection has been answered 413 and is at its end.
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
        // The socket buffer is empty, so the answer fits. A client that is gone needs none.
        _ = this.stream.try_write(TOO_LARGE);
        Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "request is too large")))
    }
}

impl AsyncWrite for Limited {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
