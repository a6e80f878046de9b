//! The server behind every proxy: it plays a Varnish with everything cached, and the web node.
//!
//! Answers are prepared in memory and written unchanged, so that the proxy and not the origin is measured. Health
//! checks are answered as by Varnish and Magento.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, bail};
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};
use socket2::{Domain, Socket, Type};

use crate::messages::{ECHO, Page, answer, pages};
use crate::namespace::pin;

const LISTENER: Token = Token(0);
const WAKER: Token = Token(1);
/// The first token of a connection.
const FIRST: usize = 2;

const MAX_FIELDS: usize = 64;
const READ_BUFFER: usize = 64 << 10;
const BACKLOG: i32 = 4096;

/// The running origin, stopped when this value is dropped: a thread on each of its cores, all on one address.
pub(crate) struct Origin {
    pub(crate) address: SocketAddr,
    threads: Vec<(Arc<Waker>, JoinHandle<anyhow::Result<()>>)>,
}

impl Origin {
    /// Starts it.
    ///
    /// # Errors
    /// The system's error.
    pub(crate) fn start(cores: &[usize]) -> anyhow::Result<Self> {
        // At all addresses: a node of a large fleet has one of its own.
        let mut bound = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let mut threads = Vec::new();
        for &core in cores {
            let listener = bind(bound)?;
            bound = listener.local_addr()?;
            let poll = Poll::new()?;
            let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
            let thread = std::thread::Builder::new().name(format!("origin-{core}")).spawn(move || {
                pin(core)?;
                Server::new(poll, listener)?.run().context("the origin")
            })?;
            threads.push((waker, thread));
        }
        Ok(Origin { address: SocketAddr::from((Ipv4Addr::LOCALHOST, bound.port())), threads })
    }

    /// Stops it, and reports an error of its threads.
    ///
    /// # Errors
    /// The error.
    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
        self.join()
    }

    fn join(&mut self) -> anyhow::Result<()> {
        for (waker, thread) in self.threads.drain(..) {
            waker.wake()?;
            match thread.join() {
                Ok(result) => result?,
                Err(_) => bail!("the origin panicked"),
            }
        }
        Ok(())
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        if let Err(error) = self.join() {
            eprintln!("{error:#}");
        }
    }
}

fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_port(true)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(TcpListener::from_std(socket.into()))
}

struct Server {
    poll: Poll,
    listener: TcpListener,
    connections: slab::Slab<Connection>,
    pages: Pages,
}

/// Complete answers by path: for a connection that closes, and for one that is kept.
type Pages = HashMap<&'static str, [Arc<[u8]>; 2]>;

struct Connection {
    stream: TcpStream,
    /// An incomplete request.
    partial: Vec<u8>,
    /// The answer being written, and the bytes written so far.
    pending: Option<(Arc<[u8]>, usize)>,
    keep: bool,
}

impl Server {
    fn new(poll: Poll, mut listener: TcpListener) -> anyhow::Result<Self> {
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
        let pages =
            pages().into_iter().map(|Page { path, kept, closing }| (path, [closing.into(), kept.into()])).collect();
        Ok(Server { poll, listener, connections: slab::Slab::new(), pages })
    }

    fn run(mut self) -> anyhow::Result<()> {
        let mut events = Events::with_capacity(1024);
        let mut buffer = vec![0; READ_BUFFER];
        loop {
            match self.poll.poll(&mut events, None) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                polled => polled?,
            }
            for event in &events {
                match event.token() {
                    WAKER => return Ok(()),
                    LISTENER => self.accept()?,
                    Token(token) => self.serve(token - FIRST, &mut buffer)?,
                }
            }
        }
    }

    fn accept(&mut self) -> anyhow::Result<()> {
        loop {
            match self.listener.accept() {
                Ok((mut stream, _)) => {
                    let entry = self.connections.vacant_entry();
                    let token = Token(FIRST + entry.key());
                    self.poll.registry().register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
                    entry.insert(Connection { stream, partial: Vec::new(), pending: None, keep: true });
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(error).context("accepting"),
            }
        }
    }

    /// Does all possible work on a connection. An event may be left over from one that was closed meanwhile.
    fn serve(&mut self, index: usize, buffer: &mut [u8]) -> anyhow::Result<()> {
        let Some(connection) = self.connections.get_mut(index) else { return Ok(()) };
        match connection.converse(&self.pages, buffer) {
            Ok(()) => Ok(()),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock => Ok(()),
                // A proxy may close at any time.
                ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                    self.connections.remove(index);
                    Ok(())
                }
                _ => Err(error.into()),
            },
        }
    }
}

impl Connection {
    /// Reads and answers until the connection would block. The end of the connection is an error.
    fn converse(&mut self, pages: &Pages, buffer: &mut [u8]) -> std::io::Result<()> {
        loop {
            self.flush()?;
            let got = if self.keep { self.stream.read(buffer)? } else { 0 };
            if got == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            self.take(pages, &buffer[..got])?;
            self.flush()?;
            // epoll(7): a read that did not fill its buffer has emptied the socket.
            if got < buffer.len() && self.keep {
                return Ok(());
            }
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        while let Some((bytes, done)) = &mut self.pending {
            *done += self.stream.write(&bytes[*done..])?;
            if *done == bytes.len() {
                self.pending = None;
            }
        }
        Ok(())
    }

    /// Processes input. A proxy sends one request at a time, never two at once.
    fn take(&mut self, pages: &Pages, input: &[u8]) -> std::io::Result<()> {
        if self.partial.is_empty() {
            match respond(pages, input)? {
                Some((answer, keep)) => (self.pending, self.keep) = (Some((answer, 0)), keep),
                None => self.partial.extend_from_slice(input),
            }
        } else {
            self.partial.extend_from_slice(input);
            if let Some((answer, keep)) = respond(pages, &self.partial)? {
                (self.pending, self.keep) = (Some((answer, 0)), keep);
                self.partial.clear();
            }
        }
        Ok(())
    }
}

/// The answer to a request, and whether its connection is kept; `None` if the request is incomplete.
fn respond(pages: &Pages, input: &[u8]) -> std::io::Result<Option<(Arc<[u8]>, bool)>> {
    let malformed = |what: &str| {
        let shown = String::from_utf8_lossy(&input[..input.len().min(256)]);
        std::io::Error::new(ErrorKind::InvalidData, format!("a proxy sent {what}: {shown:?}"))
    };
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    let head = match request.parse(input) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(malformed(&error.to_string())),
    };
    let (mut body, mut keep) = (0, request.version == Some(1));
    for field in request.headers.iter() {
        if field.name.eq_ignore_ascii_case("content-length") {
            let length = std::str::from_utf8(field.value).ok().and_then(|length| length.parse().ok());
            body = length.ok_or_else(|| malformed("an odd length"))?;
        } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(malformed("a body without length"));
        } else if field.name.eq_ignore_ascii_case("connection") {
            keep &= !field.value.eq_ignore_ascii_case(b"close");
        }
    }
    if input.len() < head + body {
        return Ok(None);
    }
    if input.len() > head + body {
        return Err(malformed("more than one request"));
    }
    let path = request.path.unwrap_or_default();
    let answer = match (request.method.unwrap_or_default(), pages.get(path)) {
        (_, Some(page)) => Arc::clone(&page[usize::from(keep)]),
        // Stock VCL's answer to a purge without a pattern from an address that may purge.
        ("PURGE", None) => answer("400 Bad Request", &[], b"", keep).into(),
        (_, None) if path == ECHO => answer("200 OK", &[], &input[..head], keep).into(),
        (_, None) if path == "/health_check.php" => answer("200 OK", &[], b"ok", keep).into(),
        (_, None) => answer("404 Not Found", &[], b"", keep).into(),
    };
    Ok(Some((answer, keep)))
}
