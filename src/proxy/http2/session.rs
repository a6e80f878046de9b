//! The TLS session of an HTTP/2 connection: hyper speaks over it, and we end it.
//!
//! hyper drops its socket as soon as it has written its last frame. But a client that still reads its last answers
//! keeps sending window updates; a closed socket answers those with a reset, and the client loses what it has not read
//! yet. So the session is shared: when hyper is done, input is discarded until the client closes, too, as for HTTP/1.1.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use crate::proxy::deadline::{Deadline, Phase};

/// How long a client may go on after our last frame: as long as with HTTP/1.1.
const LINGER_LIMIT: Duration = Duration::from_secs(30);

/// A handle of the session. hyper has one, and we have one.
#[derive(Clone, Debug)]
pub(super) struct TlsSession(Rc<RefCell<Box<TlsStream<TcpStream>>>>);

impl TlsSession {
    pub(super) fn new(stream: Box<TlsStream<TcpStream>>) -> Self {
        TlsSession(Rc::new(RefCell::new(stream)))
    }

    /// Sends close_notify, and discards input until the client closes.
    pub(super) async fn end(mut self, deadline: &Deadline) {
        deadline.enter(Phase::Linger);
        // An error only means that the client has already gone.
        _ = deadline.limit(self.shutdown()).await;
        let began = Instant::now();
        let mut unheard = [0; 1024];
        while began.elapsed() < LINGER_LIMIT {
            deadline.enter(Phase::Linger);
            match deadline.limit(self.read(&mut unheard)).await {
                Ok(Ok(read)) if read > 0 => {}
                _ => return,
            }
        }
    }
}

impl AsyncRead for TlsSession {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut **self.0.borrow_mut()).poll_read(cx, buffer)
    }
}

impl AsyncWrite for TlsSession {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut **self.0.borrow_mut()).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut **self.0.borrow_mut()).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.borrow().is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut **self.0.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut **self.0.borrow_mut()).poll_shutdown(cx)
    }
}
