//! A FAKE node with scripted behaviour, since no real one can be made as hostile: it answers late, in pieces, wrongly
//! or not at all, and records what it saw. It answers health checks by itself.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{PATIENCE, eventually};

/// What a fake does after a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Waits for the next request.
    KeepAlive,
    /// Closes, even with unread data.
    Close,
    /// Half-closes, and discards input until the other side closes, too.
    Linger,
    /// Resets the connection.
    Reset,
}

/// How a fake answers health checks, as a web node (200) or as a Varnish (400) depending on the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checks {
    Pass,
    Fail,
    Hang,
}

type Script = Box<dyn Fn(&mut Call<'_>) -> Then + Send + Sync>;

/// A fake node, stopped when this value is dropped.
pub struct Upstream {
    pub address: SocketAddr,
    state: Arc<State>,
    listener: TcpListener,
    acceptor: Option<JoinHandle<Vec<JoinHandle<()>>>>,
}

struct State {
    script: Script,
    checks: AtomicU8,
    ended: AtomicBool,
    /// It is to accept nothing more.
    deaf: AtomicBool,
    /// It accepts nothing more.
    is_deaf: Gate,
    connections: Mutex<Vec<Connection>>,
    calls: Mutex<Vec<Seen>>,
}

/// The state of a connection.
struct Connection {
    kind: Kind,
    received: u64,
    /// A handle to end it with the fake; none once it has ended.
    open: Option<TcpStream>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nothing was read on it yet.
    Unknown,
    Check,
    Traffic,
}

/// A request as it arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The number of its connection.
    pub connection: usize,
    /// The head with its blank line, without what the edge says of the reader.
    pub head: String,
    /// That: the value of `X-Clearcoat-Asked`, which has a name in it that is another each time.
    pub asked: Option<String>,
}

impl Seen {
    /// The value of a header field, names in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }
}

fn header<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    let mut fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    fields.find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

/// A request, for the script.
pub struct Call<'c> {
    pub seen: Seen,
    /// The trailers of its body, once that has been read.
    pub trailers: Vec<String>,
    wire: &'c mut Wire,
}

struct Wire {
    index: usize,
    stream: TcpStream,
    input: Vec<u8>,
    state: Arc<State>,
}

impl Upstream {
    /// Starts a fake. The script is called with each request that is not a health check, on one thread per connection.
    pub fn start(script: impl Fn(&mut Call<'_>) -> Then + Send + Sync + 'static) -> Self {
        Upstream::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), script)
    }

    /// The same at this address.
    pub fn start_at(address: SocketAddr, script: impl Fn(&mut Call<'_>) -> Then + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(address).expect("a free port");
        let address = listener.local_addr().expect("an address");
        let state = Arc::new(State {
            script: Box::new(script),
            checks: AtomicU8::new(Checks::Pass as u8),
            ended: AtomicBool::new(false),
            deaf: AtomicBool::new(false),
            is_deaf: Gate::default(),
            connections: Mutex::default(),
            calls: Mutex::default(),
        });
        let acceptor = std::thread::spawn({
            let (state, listener) = (Arc::clone(&state), listener.try_clone().expect("a handle"));
            move || accept(&listener, &state)
        });
        Upstream { address, state, listener, acceptor: Some(acceptor) }
    }

    /// Accepts nothing more, and fills the kernel's queue of connections, which then answers no SYN, as a machine that is gone.
    /// Lasts as long as the returned connections.
    pub fn becomes_deaf(&self) -> Vec<TcpStream> {
        self.state.deaf.store(true, Ordering::SeqCst);
        // Wakes the acceptor.
        let mut queue = vec![TcpStream::connect(self.address).expect("it accepts so far")];
        self.state.is_deaf.wait("it accepts nothing more");
        // Of a socket that listens already, this shortens the queue.
        socket2::SockRef::from(&self.listener).listen(1).expect("a socket option");
        // The first that finds no room gets no answer.
        while let Ok(connection) = TcpStream::connect_timeout(&self.address, Duration::from_millis(300)) {
            queue.push(connection);
        }
        queue
    }

    /// A fake that answers every request with its path.
    pub fn echo() -> Self {
        Upstream::start(|call| {
            let path = call.path().to_owned();
            if call.body().is_err() {
                return Then::Close;
            }
            call.answer(&path)
        })
    }

    /// Changes how health checks are answered from now on.
    pub fn set_checks(&self, checks: Checks) {
        self.state.checks.store(checks as u8, Ordering::SeqCst);
    }

    /// The requests so far, in order of arrival.
    pub fn calls(&self) -> Vec<Seen> {
        self.state.calls.lock().unwrap().clone()
    }

    /// The requests so far, once all data of all connections was certainly read: the number of bytes without health
    /// checks, and the heads.
    pub fn all_traffic(&self) -> (u64, Vec<Seen>) {
        eventually("every connection to the fake has said what it is", || {
            let connections = self.state.connections.lock().unwrap();
            let undecided = |connection: &Connection| connection.kind == Kind::Unknown && connection.open.is_some();
            (!connections.iter().any(undecided)).then_some(())
        });
        let connections = self.state.connections.lock().unwrap();
        let traffic = connections.iter().filter(|connection| connection.kind != Kind::Check);
        (traffic.map(|connection| connection.received).sum(), self.calls())
    }

    /// The number of client connections to the fake that the kernel has as open: on a busy machine a close arrives with
    /// a delay.
    pub fn established(&self) -> usize {
        kernel_connections().filter(|connection| connection.remote == self.address && connection.state == "01").count()
    }

    /// How many connections with traffic are open.
    pub fn open_connections(&self) -> usize {
        let connections = self.state.connections.lock().unwrap();
        connections.iter().filter(|connection| connection.kind == Kind::Traffic && connection.open.is_some()).count()
    }
}

/// A TCP connection over IPv4, as the kernel lists it.
struct KernelConnection {
    local: SocketAddr,
    remote: SocketAddr,
    /// `01`: established; `08`: the other side has closed, and this one has not yet.
    state: String,
}

fn kernel_connections() -> impl Iterator<Item = KernelConnection> {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the kernel's connections");
    let address = |text: &str| {
        let (ip, port) = text.split_once(':').expect("an address");
        let ip = u32::from_str_radix(ip, 16).expect("an address").to_le_bytes();
        SocketAddr::from((ip, u16::from_str_radix(port, 16).expect("a port")))
    };
    let rows: Vec<KernelConnection> = table
        .lines()
        .skip(1)
        .map(|row| {
            let columns: Vec<&str> = row.split_whitespace().collect();
            KernelConnection { local: address(columns[1]), remote: address(columns[2]), state: columns[3].to_owned() }
        })
        .collect();
    rows.into_iter()
}

/// The local ports of the connections to this address that are established.
pub fn local_ports_to(remote: SocketAddr) -> Vec<u16> {
    let connections = kernel_connections().filter(|connection| connection.remote == remote && connection.state == "01");
    connections.map(|connection| connection.local.port()).collect()
}

/// Whether the server at this address has noticed every connection that its client has closed.
pub fn has_seen_all_ends(address: SocketAddr) -> bool {
    !kernel_connections().any(|connection| connection.local == address && connection.state == "08")
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::SeqCst);
        // Wakes the acceptor, which then ends; an error means that it has ended already.
        if !self.state.deaf.load(Ordering::SeqCst) {
            _ = TcpStream::connect(self.address);
        }
        let acceptor = self.acceptor.take().expect("ends once");
        let Ok(threads) = acceptor.join() else { panic!("a fake could not accept") };
        for connection in self.state.connections.lock().unwrap().iter() {
            if let Some(stream) = &connection.open {
                // It may be closed by the other side already.
                _ = stream.shutdown(std::net::Shutdown::Both);
            }
        }
        let panics = threads.into_iter().map(JoinHandle::join).filter(Result::is_err).count();
        assert!(panics == 0 || std::thread::panicking(), "{panics} scripts of a fake panicked");
    }
}

fn accept(listener: &TcpListener, state: &Arc<State>) -> Vec<JoinHandle<()>> {
    let mut threads = Vec::new();
    for stream in listener.incoming() {
        let stream = stream.expect("a connection");
        if state.ended.load(Ordering::SeqCst) {
            break;
        }
        if state.deaf.load(Ordering::SeqCst) {
            state.is_deaf.open();
            break;
        }
        stream.set_nodelay(true).expect("a socket option");
        let mut connections = state.connections.lock().unwrap();
        let index = connections.len();
        let open = Some(stream.try_clone().expect("a handle"));
        connections.push(Connection { kind: Kind::Unknown, received: 0, open });
        drop(connections);
        let mut wire = Wire { index, stream, input: Vec::new(), state: Arc::clone(state) };
        threads.push(std::thread::spawn(move || {
            let then = wire.serve();
            wire.end(then);
        }));
    }
    threads
}

impl Wire {
    fn serve(&mut self) -> Then {
        while let Ok(head) = self.head() {
            if head.starts_with("GET /health_check.php ") || head.starts_with("PURGE /.clearcoat/probe ") {
                return self.check(&head);
            }
            self.state.connections.lock().unwrap()[self.index].kind = Kind::Traffic;
            let asked = header(&head, "x-clearcoat-asked").map(str::to_owned);
            let line = asked.as_ref().map(|asked| format!("X-Clearcoat-Asked: {asked}\r\n"));
            let head = line.map_or(head.clone(), |line| head.replacen(&line, "", 1));
            let seen = Seen { connection: self.index, head, asked };
            self.state.calls.lock().unwrap().push(seen.clone());
            let state = Arc::clone(&self.state);
            match (state.script)(&mut Call { seen, trailers: Vec::new(), wire: self }) {
                Then::KeepAlive => {}
                end => return end,
            }
        }
        Then::Close
    }

    fn check(&mut self, head: &str) -> Then {
        self.state.connections.lock().unwrap()[self.index].kind = Kind::Check;
        let checks = self.state.checks.load(Ordering::SeqCst);
        let (pass, fail) = if head.starts_with("GET") { (200, 500) } else { (400, 405) };
        let status = if checks == Checks::Pass as u8 { pass } else { fail };
        if checks == Checks::Hang as u8 {
            return Then::Linger;
        }
        // The checker may not want the answer any more.
        _ = write!(self.stream, "HTTP/1.1 {status} As asked\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        Then::Close
    }

    fn head(&mut self) -> io::Result<String> {
        let end = self.find(b"\r\n\r\n")?;
        Ok(self.input.drain(..end).map(char::from).collect())
    }

    /// The number of bytes up to and including this mark.
    fn find(&mut self, mark: &[u8]) -> io::Result<usize> {
        loop {
            if let Some(at) = self.input.windows(mark.len()).position(|window| window == mark) {
                return Ok(at + mark.len());
            }
            self.fill()?;
        }
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut piece = [0; 64 * 1024];
        let read = self.stream.read(&mut piece)?;
        self.state.connections.lock().unwrap()[self.index].received += read as u64;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.input.extend_from_slice(&piece[..read]);
        Ok(())
    }

    fn end(mut self, then: Then) {
        if then == Then::Linger {
            // It may be closed by the other side already.
            _ = self.stream.shutdown(std::net::Shutdown::Write);
            while self.fill().is_ok() {
                self.input.clear();
            }
        }
        if then == Then::Reset {
            socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).expect("a socket option");
        }
        let mut connections = self.state.connections.lock().unwrap();
        drop(connections[self.index].open.take());
        drop(self.stream);
    }
}

impl Call<'_> {
    pub fn path(&self) -> &str {
        self.seen.head.split(' ').nth(1).expect("a request line")
    }

    pub fn is(&self, method: &str) -> bool {
        self.seen.head.split(' ').next() == Some(method)
    }

    /// Reads the body to its end, with the trailers of a chunked one.
    pub fn body(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        self.each_piece(|piece| body.extend_from_slice(piece))?;
        Ok(body)
    }

    /// Reads the body to its end, piece by piece.
    pub fn each_piece(&mut self, mut take: impl FnMut(&[u8])) -> io::Result<()> {
        if self.seen.header("Transfer-Encoding").is_some() {
            loop {
                let end = self.wire.find(b"\r\n")?;
                let size = String::from_utf8_lossy(&self.wire.input[..end - 2]).into_owned();
                self.wire.input.drain(..end);
                let size = usize::from_str_radix(&size, 16).expect("a chunk size of clearcoat's own");
                if size == 0 {
                    return self.read_trailers();
                }
                self.exactly(size, &mut take)?;
                let mut line_end = Vec::new();
                self.exactly(2, |piece| line_end.extend_from_slice(piece))?;
                assert_eq!(line_end, b"\r\n", "a chunk does not end with CR LF");
            }
        }
        let length = self.seen.header("Content-Length").map_or(0, |length| length.parse().expect("a length"));
        self.exactly(length, take)
    }

    /// Reads the trailers after the chunk of size 0, up to the blank line.
    fn read_trailers(&mut self) -> io::Result<()> {
        loop {
            let end = self.wire.find(b"\r\n")?;
            let line: String = self.wire.input.drain(..end).map(char::from).collect();
            match line.trim_end() {
                "" => return Ok(()),
                trailer => self.trailers.push(trailer.to_owned()),
            }
        }
    }

    /// Reads this many bytes as they come, piece by piece.
    pub fn exactly(&mut self, mut length: usize, mut take: impl FnMut(&[u8])) -> io::Result<()> {
        while length > 0 {
            if self.wire.input.is_empty() {
                self.wire.fill()?;
            }
            let piece = length.min(self.wire.input.len());
            take(&self.wire.input[..piece]);
            self.wire.input.drain(..piece);
            length -= piece;
        }
        Ok(())
    }

    /// The rest of the bytes up to the end of the connection, and whether that was clean.
    pub fn rest(&mut self) -> (Vec<u8>, bool) {
        loop {
            if let Err(error) = self.wire.fill() {
                return (std::mem::take(&mut self.wire.input), error.kind() == io::ErrorKind::UnexpectedEof);
            }
        }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.wire.stream.write_all(bytes.as_ref())
    }

    /// Sends bytes, then returns `then`: even if the other side has gone already.
    pub fn send_then(&mut self, bytes: impl AsRef<[u8]>, then: Then) -> Then {
        if self.send(bytes).is_ok() { then } else { Then::Close }
    }

    /// Answers 200 with this text, and keeps the connection.
    pub fn answer(&mut self, text: &str) -> Then {
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len());
        self.send_then(answer, Then::KeepAlive)
    }

    /// Holds the request until the gate is open. False if the fake ends first.
    pub fn wait(&self, gate: &Gate) -> bool {
        gate.wait_unless(|| self.wire.state.ended.load(Ordering::SeqCst))
    }

    pub fn stream(&self) -> &TcpStream {
        &self.wire.stream
    }
}

/// An event that a fake waits for, or signals.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    /// An open gate.
    pub fn opened() -> Self {
        let gate = Gate::default();
        gate.open();
        gate
    }

    pub fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    /// Waits until it is open.
    pub fn wait(&self, what: &str) {
        assert!(self.wait_unless(|| false), "gave up waiting until {what}");
    }

    fn wait_unless(&self, ended: impl Fn() -> bool) -> bool {
        let began = Instant::now();
        let mut open = self.0.0.lock().unwrap();
        while !*open {
            if ended() || began.elapsed() > PATIENCE {
                return false;
            }
            open = self.0.1.wait_timeout(open, Duration::from_millis(20)).unwrap().0;
        }
        true
    }
}
