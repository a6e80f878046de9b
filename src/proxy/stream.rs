//! A client's transport: plain, TLS, or one stream of an HTTP/2 connection.
//!
//! One type and not a type parameter: generic code would be compiled three times, to save a branch per read. The data
//! path reads and writes body bytes in all three; only the head of an answer differs for HTTP/2, see
//! [`super::client::Client::begin_answer`].

pub(super) mod http2;

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

#[cfg(target_os = "linux")]
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use http2::Http2Stream;

/// The client's end of a request.
#[derive(Debug)]
pub(super) enum Stream {
    Plain(TcpStream),
    /// Boxed: a session is a hundred times as large as a socket, and most connections have none.
    Tls(Box<TlsStream<TcpStream>>),
    Http2(Http2Stream),
}

impl Stream {
    /// Whether the bytes on the wire are unencrypted HTTP/1.1.
    pub(super) fn is_plain(&self) -> bool {
        matches!(self, Stream::Plain(_))
    }

    /// Whether there is unread input from the client, as far as known without a system call.
    pub(super) fn has_unread(&mut self) -> bool {
        let mut byte = [0];
        let mut buffer = ReadBuf::new(&mut byte);
        let mut cx = Context::from_waker(Waker::noop());
        match self {
            Stream::Plain(socket) => matches!(socket.poll_peek(&mut cx, &mut buffer), Poll::Ready(Ok(1..))),
            Stream::Tls(_) => true,
            Stream::Http2(_) => false,
        }
    }

    fn socket(&self) -> Option<&TcpStream> {
        match self {
            Stream::Plain(socket) => Some(socket),
            Stream::Tls(session) => Some(session.get_ref().0),
            Stream::Http2(_) => None,
        }
    }

    /// Ready when the client has gone for good. A half-closed client has not: it still waits for its answer. Costs no
    /// system call while idle.
    pub(super) fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut byte = [0];
        match self {
            Stream::Plain(socket) => Poll::Ready(ready!(socket.poll_peek(cx, &mut ReadBuf::new(&mut byte))).map(drop)),
            Stream::Tls(session) => {
                let socket = session.get_mut().0;
                Poll::Ready(ready!(socket.poll_peek(cx, &mut ReadBuf::new(&mut byte))).map(drop))
            }
            Stream::Http2(stream) => stream.poll_gone(cx).map(|()| Err(io::ErrorKind::ConnectionReset.into())),
        }
    }

    /// Ready when the client has closed its side or has gone, with an error; or when it has sent more, behind which neither can be seen
    /// here: see [`Stream::has_closed`].
    pub(super) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let socket = match self {
            Stream::Plain(socket) => socket,
            Stream::Tls(session) => session.get_mut().0,
            Stream::Http2(stream) => return stream.poll_gone(cx).map(|()| Err(io::ErrorKind::ConnectionReset.into())),
        };
        let mut byte = [0];
        let peeked = ready!(socket.poll_peek(cx, &mut ReadBuf::new(&mut byte)));
        Poll::Ready(match peeked {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        })
    }

    /// Whether the client has closed its side, whatever it had sent before: also the end of a TLS session is something sent.
    pub(super) fn has_closed(&self) -> bool {
        #[cfg(target_os = "linux")]
        if let Some(socket) = self.socket() {
            let mut polled = [PollFd::new(socket, PollFlags::RDHUP)];
            let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
            return poll(&mut polled, Some(&at_once)).is_ok_and(|ready| ready > 0);
        }
        false
    }

    /// Makes the next close a reset: a plain one would look like the end of an answer that ends with its connection.
    pub(super) fn reset_on_close(&self) {
        let Some(socket) = self.socket() else { return };
        if let Err(error) = socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO)) {
            tracing::debug!(%error, "the connection of a cut answer could not be reset");
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(socket) => Pin::new(socket).poll_read(cx, buffer),
            Stream::Tls(session) => Pin::new(session).poll_read(cx, buffer),
            Stream::Http2(stream) => stream.poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(socket) => Pin::new(socket).poll_write(cx, bytes),
            Stream::Tls(session) => Pin::new(session).poll_write(cx, bytes),
            Stream::Http2(stream) => stream.poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(socket) => Pin::new(socket).poll_write_vectored(cx, pieces),
            Stream::Tls(session) => Pin::new(session).poll_write_vectored(cx, pieces),
            Stream::Http2(stream) => {
                stream.poll_write(cx, pieces.iter().find(|piece| !piece.is_empty()).map_or(&[], |p| p))
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(_) => Poll::Ready(Ok(())),
            Stream::Tls(session) => Pin::new(session).poll_flush(cx),
            Stream::Http2(stream) => stream.poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Stream::Tls(session) => Pin::new(session).poll_shutdown(cx),
            Stream::Http2(stream) => {
                stream.finish();
                Poll::Ready(Ok(()))
            }
        }
    }
}
