//! The TLS session under an HTTP/2 connection: hyper speaks over it, and we end it.
//!
//! hyper drops its socket as soon as it has written its last frame. But a client that still reads its last answers goes on
//! to say how much room it has for more; a socket that was closed answers that with a reset, and with it goes whatever the
//! client did not have yet. So the session is shared: when hyper is done, what the client says is read over until it
//! closes, too, as for HTTP/1.1.

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

/// A handle of the session. One is hyper's, and one ours.
#[derive(Clone, Debug)]
pub(super) struct TlsSession(Rc<RefCell<Box<TlsStream<TcpStream>>>>);

impl TlsSession {
    pub(super) fn new(stream: Box<TlsStream<TcpStream>>) -> Self {
        TlsSession(Rc::new(RefCell::new(stream)))
    }

    /// Says that there is no more, and reads over what still comes, as long as it comes.
    pub(super) async fn end(mut self, deadline: &Deadline) {
        deadline.enter(Phase::Linger);
        // A client that is gone already needs no farewell.
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
