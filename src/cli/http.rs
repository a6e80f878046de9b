//! One request to a running clearcoat, over a connection of its own.

use std::str::FromStr;

use anyhow::{Context, anyhow};
use http::uri::Authority;
use http::{HeaderValue, Request, Response, Uri, header};
use http_body_util::Full;
use hyper::body::Bytes;
use tokio::net::TcpStream;

use crate::http_client::{self, HttpConnection};

/// The listener of a running clearcoat, as `http://HOST:PORT`.
#[derive(Clone, Debug)]
pub(super) struct Endpoint(Authority);

impl Endpoint {
    /// `HOST:PORT` as it was written, for the `Host` header.
    pub(super) fn authority(&self) -> &str {
        self.0.as_str()
    }

    /// Sends a request and reads the whole answer. A body of more than `limit` bytes is an error. A request without a `Host` gets
    /// the address that was connected to: the admin listener answers to that, whatever names it knows.
    pub(super) async fn send(
        &self,
        mut request: Request<Full<Bytes>>,
        limit: usize,
    ) -> anyhow::Result<Response<Bytes>> {
        let host = self.0.host().trim_start_matches('[').trim_end_matches(']');
        let address = (host, self.0.port_u16().unwrap_or(80));
        let stream = TcpStream::connect(address).await.with_context(|| format!("cannot connect to {self}"))?;
        let address = HeaderValue::from_str(&stream.peer_addr()?.to_string())?;
        request.headers_mut().entry(header::HOST).or_insert(address);
        let mut connection = HttpConnection::with_title_case(stream).await?;
        let answer = async {
            let (head, body) = connection.send(request).await?.into_parts();
            let body =
                http_client::read(body, limit).await.map_err(|cause| anyhow!("cannot read the answer: {cause}"))?;
            anyhow::Ok(Response::from_parts(head, body))
        };
        answer.await.with_context(|| format!("{self} did not answer as a clearcoat does"))
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
