//! A load of HTTP/2 over TLS, by hyper's client, whose cost does not count, as it runs on its own core.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use super::{Load, PATIENCE, Sample};
use crate::messages::{Exchange, HOST};

/// Connections with several streams each, all of which send their next request once they have their answer.
pub(crate) struct Http2 {
    runtime: Runtime,
    address: SocketAddr,
    exchange: Exchange,
    connections: usize,
    streams: usize,
    tls: Arc<ClientConfig>,
    senders: Vec<SendRequest<Empty<Bytes>>>,
}

impl Http2 {
    /// A load for the proxy at this address, with this many streams per connection.
    ///
    /// # Errors
    /// The system's error.
    pub(crate) fn new(
        address: SocketAddr,
        exchange: Exchange,
        (connections, streams): (usize, usize),
        tls: &Arc<ClientConfig>,
    ) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut tls = ClientConfig::clone(tls);
        tls.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Http2 { runtime, address, exchange, connections, streams, tls: Arc::new(tls), senders: Vec::new() })
    }
}

impl Load for Http2 {
    fn run(&mut self, time: Duration) -> anyhow::Result<Sample> {
        while self.senders.len() < self.connections {
            self.senders.push(self.runtime.block_on(connect(self.address, &self.tls))?);
        }
        let until = Instant::now() + time;
        let (senders, exchange, streams) = (&self.senders, self.exchange, self.streams);
        self.runtime.block_on(async {
            let mut tasks = JoinSet::new();
            for sender in senders {
                (0..streams).for_each(|_| _ = tasks.spawn(ask_until(until, sender.clone(), exchange)));
            }
            let mut all = Sample::default();
            let patience = tokio::time::Instant::from_std(until + PATIENCE);
            while let Some(latencies) =
                tokio::time::timeout_at(patience, tasks.join_next()).await.context("no answer at the end")?
            {
                all.latencies.extend(latencies??);
            }
            Ok(all)
        })
    }
}

async fn connect(address: SocketAddr, tls: &Arc<ClientConfig>) -> anyhow::Result<SendRequest<Empty<Bytes>>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let stream = tokio_rustls::TlsConnector::from(Arc::clone(tls)).connect(ServerName::try_from(HOST)?, stream).await?;
    ensure!(stream.get_ref().1.alpn_protocol() == Some(b"h2"), "HTTP/2 was not chosen");
    let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    // Its end is reported as an error of every request on it.
    tokio::spawn(connection);
    Ok(sender)
}

async fn ask_until(
    until: Instant,
    mut sender: SendRequest<Empty<Bytes>>,
    exchange: Exchange,
) -> anyhow::Result<Vec<u32>> {
    let mut latencies = Vec::new();
    while Instant::now() < until {
        let began = Instant::now();
        let mut request = http::Request::get(format!("https://{HOST}{}", exchange.path));
        for (name, value) in exchange.fields() {
            request = request.header(*name, *value);
        }
        sender.ready().await?;
        let answer = sender.send_request(request.body(Empty::new())?).await?;
        ensure!(answer.status() == 200, "a wrong status: {answer:?}");
        let mut body = answer.into_body();
        let mut length = 0;
        while let Some(frame) = body.frame().await {
            length += frame?.data_ref().map_or(0, Bytes::len);
        }
        ensure!(length == exchange.download, "a wrong length: {length}");
        latencies.push(u32::try_from(began.elapsed().as_nanos()).unwrap_or(u32::MAX));
    }
    Ok(latencies)
}
