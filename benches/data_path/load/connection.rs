//! One connection of the load: its request in flight, and the check of the answer.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use mio::net::TcpStream;
use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, HandshakeKind, StreamOwned};

use super::{Plan, Reuse};
use crate::messages::HOST;

const MAX_FIELDS: usize = 64;

/// State shared by all connections of a load.
pub(super) struct Target {
    address: SocketAddr,
    request: Vec<u8>,
    body: u64,
    reuse: Reuse,
    tls: Option<Arc<ClientConfig>>,
}

impl Target {
    pub(super) fn new(address: SocketAddr, plan: &Plan) -> Self {
        Target {
            address,
            request: plan.exchange.request(plan.reuse == Reuse::KeepAlive),
            body: plan.exchange.download as u64,
            reuse: plan.reuse,
            tls: plan.tls.clone(),
        }
    }
}

/// A slot for one connection after another.
pub(super) struct Connection {
    stream: Option<Stream>,
    phase: Phase,
    /// The incomplete head of an answer.
    partial: Vec<u8>,
    counts_from: Instant,
    /// Includes the sessions made here that can be resumed.
    tls: Option<Arc<ClientConfig>>,
    opened: u64,
}

#[derive(Clone, Copy)]
enum Phase {
    Resting,
    /// The bytes of the request written so far.
    Sending(usize),
    Head,
    /// The remaining bytes of the body.
    Body(u64),
    /// The answer is complete, and the proxy has to close.
    Ending,
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Connection {
    pub(super) fn new(target: &Target) -> Self {
        let with_own_sessions = |shared: &Arc<ClientConfig>| {
            let mut config = ClientConfig::clone(shared);
            config.resumption = match target.reuse {
                Reuse::Resume => Resumption::in_memory_sessions(1),
                Reuse::KeepAlive | Reuse::Close => Resumption::disabled(),
            };
            Arc::new(config)
        };
        Connection {
            stream: None,
            phase: Phase::Resting,
            partial: Vec::new(),
            counts_from: Instant::now(),
            tls: target.tls.as_ref().map(with_own_sessions),
            opened: 0,
        }
    }

    fn connect(&self, address: SocketAddr) -> anyhow::Result<Stream> {
        let stream = TcpStream::connect(address)?;
        let Some(config) = &self.tls else { return Ok(Stream::Plain(stream)) };
        let session = ClientConnection::new(Arc::clone(config), ServerName::try_from(HOST)?)?;
        Ok(Stream::Tls(Box::new(StreamOwned::new(session, stream))))
    }

    /// Begins a request. True if this opened a connection, whose stream must be registered.
    pub(super) fn begin(&mut self, target: &Target, counts_from: Instant) -> anyhow::Result<bool> {
        self.phase = Phase::Sending(0);
        self.counts_from = counts_from;
        let opens = self.stream.is_none();
        if opens {
            self.stream = Some(self.connect(target.address)?);
            self.opened += 1;
        }
        Ok(opens)
    }

    /// The socket, if there is one.
    pub(super) fn stream(&mut self) -> Option<&mut TcpStream> {
        self.stream.as_mut().map(|stream| match stream {
            Stream::Plain(stream) => stream,
            Stream::Tls(stream) => &mut stream.sock,
        })
    }

    /// Does all possible work. Returns the latency if a request was finished.
    pub(super) fn proceed(&mut self, target: &Target, scratch: &mut [u8]) -> anyhow::Result<Option<Duration>> {
        let Some(stream) = &mut self.stream else { return Ok(None) };
        loop {
            match self.phase {
                Phase::Resting => return Ok(None),
                Phase::Sending(sent) => match stream.write(&target.request[sent..]) {
                    Ok(written) if sent + written == target.request.len() => self.phase = Phase::Head,
                    Ok(written) => self.phase = Phase::Sending(sent + written),
                    Err(error) if is_not_yet(&error) => return Ok(None),
                    Err(error) => return Err(error).context("sending a request"),
                },
                Phase::Head | Phase::Body(_) | Phase::Ending => match stream.read(scratch) {
                    Ok(0) if matches!(self.phase, Phase::Ending) => {
                        stream.check_handshake(target.reuse == Reuse::Resume && self.opened > 1)?;
                        self.stream = None;
                        return Ok(Some(self.finish()));
                    }
                    Ok(0) => bail!("the connection was closed before its answer was complete"),
                    Ok(got) => {
                        self.phase = advance(self.phase, &mut self.partial, &scratch[..got], target)?;
                        match self.phase {
                            Phase::Resting => return Ok(Some(self.finish())),
                            // The end of the connection may have arrived with the answer, without another event.
                            Phase::Ending => {}
                            _ if stream.is_drained(got, scratch.len()) => return Ok(None),
                            _ => {}
                        }
                    }
                    Err(error) if is_not_yet(&error) => return Ok(None),
                    Err(error) => return Err(error).context("reading an answer"),
                },
            }
        }
    }

    fn finish(&mut self) -> Duration {
        self.phase = Phase::Resting;
        self.counts_from.elapsed()
    }
}

impl Stream {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Stream::Plain(stream) => stream.write(bytes),
            Stream::Tls(stream) => {
                let written = stream.write(bytes)?;
                // The session buffers the bytes even if the socket does not take them; a request fits into the buffer.
                match stream.flush() {
                    Err(error) if !is_not_yet(&error) => Err(error),
                    _ => Ok(written),
                }
            }
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Stream::Plain(stream) => stream.read(buffer),
            Stream::Tls(stream) => stream.read(buffer),
        }
    }

    /// epoll(7): a read that did not fill its buffer has emptied the socket. A TLS session hands out a record at a time.
    fn is_drained(&self, got: usize, wanted: usize) -> bool {
        matches!(self, Stream::Plain(_)) && got < wanted
    }

    /// A scenario of resumptions must not measure full handshakes, nor vice versa.
    fn check_handshake(&self, wanted: bool) -> anyhow::Result<()> {
        let Stream::Tls(stream) = self else { return Ok(()) };
        let resumed = stream.conn.handshake_kind() == Some(HandshakeKind::Resumed);
        ensure!(resumed == wanted, "a TLS session was {}", if wanted { "not resumed" } else { "resumed" });
        Ok(())
    }
}

/// Processes a part of an answer.
fn advance(phase: Phase, partial: &mut Vec<u8>, input: &[u8], target: &Target) -> anyhow::Result<Phase> {
    let (missing, rest) = match phase {
        Phase::Head if partial.is_empty() => match check_head(input, target)? {
            Some(head) => (target.body, input.len() - head),
            None => {
                partial.extend_from_slice(input);
                return Ok(Phase::Head);
            }
        },
        Phase::Head => {
            partial.extend_from_slice(input);
            let Some(head) = check_head(partial, target)? else { return Ok(Phase::Head) };
            let rest = partial.len() - head;
            partial.clear();
            (target.body, rest)
        }
        Phase::Body(missing) => (missing, input.len()),
        Phase::Resting | Phase::Sending(_) | Phase::Ending => (0, input.len()),
    };
    match missing.checked_sub(rest as u64) {
        None => bail!("bytes behind the end of an answer"),
        Some(0) if target.reuse == Reuse::KeepAlive => Ok(Phase::Resting),
        Some(0) => Ok(Phase::Ending),
        Some(missing) => Ok(Phase::Body(missing)),
    }
}

/// The length of a complete head, which must be that of the expected answer.
fn check_head(input: &[u8], target: &Target) -> anyhow::Result<Option<usize>> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut answer = httparse::Response::new(&mut fields);
    let httparse::Status::Complete(head) = answer.parse(input).context("an answer's head")? else { return Ok(None) };
    let shown = || String::from_utf8_lossy(&input[..head]);
    ensure!(answer.code == Some(200), "a wrong status: {}", shown());
    let (mut length, mut closes) = (None, false);
    for field in answer.headers.iter() {
        if field.name.eq_ignore_ascii_case("content-length") {
            length = std::str::from_utf8(field.value).ok().and_then(|length| length.parse().ok());
        } else if field.name.eq_ignore_ascii_case("connection") {
            closes |= field.value.eq_ignore_ascii_case(b"close");
        }
    }
    ensure!(length == Some(target.body), "a wrong length: {}", shown());
    ensure!(closes == (target.reuse != Reuse::KeepAlive), "the wrong kind of connection: {}", shown());
    Ok(Some(head))
}

/// Whether the error means that the connection is still being established.
fn is_not_yet(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected | ErrorKind::Interrupted)
}
