//! One request to a running clearcoat, over a connection of its own.

use std::str::FromStr;

use anyhow::{Context, bail};
use http::uri::Authority;
use http::{Request, Response, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// The listener of a running clearcoat, as `http://HOST:PORT`.
#[derive(Clone, Debug)]
pub(super) struct Endpoint(Authority);

impl Endpoint {
    /// `HOST:PORT` as it was written, for the `Host` header.
    pub(super) fn authority(&self) -> &str {
        self.0.as_str()
    }

    /// Sends a request and reads the answer to its end, of at most `limit` bytes.
    pub(super) async fn send(&self, request: Request<Empty<Bytes>>, limit: usize) -> anyhow::Result<Response<Bytes>> {
        let host = self.0.host().trim_start_matches('[').trim_end_matches(']');
        let address = (host, self.0.port_u16().unwrap_or(80));
        let stream = TcpStream::connect(address).await.with_context(|| format!("cannot connect to {self}"))?;
        let mut client = hyper::client::conn::http1::Builder::new();
        // Header names as Magento writes them, for whoever compares the two on the wire.
        client.title_case_headers(true);
        let (mut sender, connection) = client.handshake(TokioIo::new(stream)).await?;
        // Ends with the answer; its error is the one that `send_request` reports.
        let connection = tokio::spawn(connection);
        let answer = async {
            let (head, body) = sender.send_request(request).await?.into_parts();
            let body = match Limited::new(body, limit).collect().await {
                Ok(body) => body.to_bytes(),
                Err(cause) => bail!("cannot read the answer: {cause}"),
            };
            Ok(Response::from_parts(head, body))
        };
        let answer = answer.await.with_context(|| format!("{self} did not answer as a clearcoat does"));
        connection.abort();
        answer
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "http://{}", self.0)
    }
}

impl FromStr for Endpoint {
    type Err = &'static str;

    fn from_str(url: &str) -> Result<Self, Self::Err> {
        const WANTED: &str = "wanted http://HOST:PORT";
        let uri: Uri = url.parse().map_err(|_| WANTED)?;
        if uri.scheme_str() == Some("https") {
            return Err("https is not supported here; clearcoat's purge and admin listeners speak http");
        }
        let is_plain = uri.scheme_str() == Some("http") && uri.path() == "/" && uri.query().is_none();
        match uri.authority() {
            Some(authority) if is_plain && !authority.as_str().contains('@') => Ok(Endpoint(authority.clone())),
            _ => Err(WANTED),
        }
    }
}
