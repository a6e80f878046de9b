//! The HTTP/1.1 client of the control plane: health checks, messages to replicas, the command line.
//!
//! Who asks connects himself, as only he knows how: with which limit of time, with what before the first request. Traffic
//! goes over connections of its own ([`crate::upstream`]), and so do purges to a Varnish ([`crate::varnish`]), which are
//! written many at once.

use http::{Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

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
    pub async fn over(stream: TcpStream) -> hyper::Result<Self> {
        Self::begin(&Builder::new(), stream).await
    }

    /// The same with `Header-Names` as Magento writes them, to compare the two on the wire.
    ///
    /// # Errors
    /// hyper's.
    pub async fn with_title_case(stream: TcpStream) -> hyper::Result<Self> {
        Self::begin(Builder::new().title_case_headers(true), stream).await
    }

    async fn begin(builder: &Builder, stream: TcpStream) -> hyper::Result<Self> {
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
