//! The HTTP/1.1 client of the control plane: health checks, messages to replicas, the command line, and the servers that a
//! URL of the configuration names ([`server`]).
//!
//! Who asks connects himself, as only he knows how: with which limit of time, with what before the first request. Traffic
//! goes over connections of its own ([`crate::upstream`]), and so do purges to a Varnish ([`crate::varnish`]), which are
//! written many at once.

pub mod server;

use std::time::Duration;

use http::{Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::task::AbortOnDropHandle;

/// What HTTP is spoken over: a socket, or TLS over one.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> ByteStream for S {}

/// A connection that takes one request after the other. It ends with this value, whatever is under way.
pub struct HttpConnection {
    sender: SendRequest<Full<Bytes>>,
    /// Reads and writes. Its error is the one that the request under way reports.
    _driver: AbortOnDropHandle<hyper::Result<()>>,
}

impl HttpConnection {
    /// HTTP over this stream.
    ///
    /// # Errors
    /// hyper's.
    pub async fn over(stream: impl ByteStream) -> hyper::Result<Self> {
        Self::begin(&Builder::new(), stream).await
    }

    /// The same with `Header-Names` as Magento writes them, to compare the two on the wire.
    ///
    /// # Errors
    /// hyper's.
    pub async fn with_title_case(stream: impl ByteStream) -> hyper::Result<Self> {
        Self::begin(Builder::new().title_case_headers(true), stream).await
    }

    async fn begin(builder: &Builder, stream: impl ByteStream) -> hyper::Result<Self> {
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await?;
        Ok(HttpConnection { sender, _driver: AbortOnDropHandle::new(tokio::spawn(connection)) })
    }

    /// Whether the next request can go out now: nothing is under way, and the other side has not closed, as far as is known.
    pub fn is_ready(&self) -> bool {
        self.sender.is_ready()
    }

    /// Sends a request and waits for the head of its answer, without a limit of time.
    ///
    /// # Errors
    /// hyper's: the connection was lost, or the answer is not HTTP.
    pub async fn send(&mut self, request: Request<Full<Bytes>>) -> hyper::Result<Response<Incoming>> {
        self.sender.send_request(request).await
    }
}

/// Reads a body to its end, of at most `limit` bytes.
///
/// # Errors
/// It is longer, or did not come to its end.
pub async fn read(body: Incoming, limit: usize) -> Result<Bytes, Box<dyn std::error::Error + Send + Sync>> {
    Ok(Limited::new(body, limit).collect().await?.to_bytes())
}

/// Reads a body to its end, of at most `limit` bytes, however long it takes, as long as it never pauses for longer than
/// `silence`. What is known of its length is allocated at once.
///
/// # Errors
/// It is longer, did not come to its end, or paused.
pub async fn read_on(
    body: Incoming,
    limit: usize,
    silence: Duration,
) -> Result<Bytes, Box<dyn std::error::Error + Send + Sync>> {
    let length = body.size_hint().exact().and_then(|length| usize::try_from(length).ok()).unwrap_or(0);
    let mut bytes = Vec::with_capacity(length.min(limit));
    let mut body = Limited::new(body, limit);
    loop {
        let Some(frame) = tokio::time::timeout(silence, body.frame()).await? else { return Ok(bytes.into()) };
        if let Ok(data) = frame?.into_data() {
            bytes.extend_from_slice(&data);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    const SILENCE: Duration = Duration::from_secs(10);

    /// Reads a body that comes in parts, with this pause before each.
    async fn read_in_parts(parts: &'static [&'static str], pause: Duration, limit: usize) -> Option<Bytes> {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        let length: usize = parts.iter().map(|part| part.len()).sum();
        tokio::spawn(async move {
            let (mut stream, _) = server.accept().await.unwrap();
            _ = stream.read(&mut [0; 1024]).await.unwrap();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
            stream.write_all(head.as_bytes()).await.unwrap();
            for part in parts {
                tokio::time::sleep(pause).await;
                // The reader may have given up.
                _ = stream.write_all(part.as_bytes()).await;
            }
        });
        let mut connection = HttpConnection::over(TcpStream::connect(address).await.unwrap()).await.unwrap();
        let request = Request::get("/").body(Full::default()).unwrap();
        let answer = connection.send(request).await.unwrap();
        // From here on time passes only while all wait.
        tokio::time::pause();
        let read = read_on(answer.into_body(), limit, SILENCE).await;
        tokio::time::resume();
        read.ok()
    }

    #[tokio::test]
    async fn a_body_may_take_any_time_but_not_pause_for_long() {
        let parts = &["ab", "cd", "ef"];
        assert_eq!(read_in_parts(parts, SILENCE * 3 / 4, 6).await.as_deref(), Some(&b"abcdef"[..]));
        assert_eq!(read_in_parts(parts, SILENCE * 2, 6).await, None);
        assert_eq!(read_in_parts(parts, Duration::ZERO, 5).await, None);
    }
}
