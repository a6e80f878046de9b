//! A link to etcd that a test can cut.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, Type};

use super::super::{PATIENCE, eventually};
use super::loopback::Loopback;

const PORT: u16 = 23_990;

/// How long a write waits for an end that does not read before it checks whether the link still exists.
const PAUSE: Duration = Duration::from_millis(20);

/// A TCP relay in place of the network between a client and etcd, which a test cannot cut without administrator rights.
///
/// One difference to a network: the kernel still acknowledges the client's data over a cut link, so that TCP keepalive
/// and timeouts see a live peer. An application-level request gets no answer.
pub struct Link {
    scheme: String,
    address: SocketAddr,
    relay: Arc<Relay>,
    listener: Option<Listener>,
    _loopback: Loopback,
}

impl Link {
    /// A link to this endpoint, a URL with an address and a port. The link has its own address.
    pub fn to(endpoint: &str) -> Self {
        let (scheme, target) = endpoint.split_once("://").expect("a URL");
        let target = target.parse().expect("an address and a port");
        let loopback = Loopback::claim(&[PORT]);
        let address = SocketAddr::from((loopback.ip(), PORT));
        let relay = Arc::new(Relay { source: loopback.ip(), target, state: Mutex::new(State::new()) });
        let listener = Some(Listener::open(address, &relay));
        Link { scheme: scheme.to_owned(), address, relay, listener, _loopback: loopback }
    }

    /// The URL for clients, in place of etcd's endpoint.
    pub fn endpoint(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    /// Drops everything: after this returns no byte and no end of a connection gets through, either way. New
    /// connections are accepted, but not relayed.
    pub fn cut(&self) {
        self.relay.state().turn(Way::Cut);
    }

    /// Resets all connections, and refuses new ones.
    pub fn close(&mut self) {
        let ending = self.relay.state().turn(Way::Closed);
        self.listener = None;
        ended(&ending);
    }

    /// Relays new connections again. Those that were cut are reset.
    pub fn mend(&mut self) {
        let ending = self.relay.state().turn(Way::Open);
        ended(&ending);
        self.listener.get_or_insert_with(|| Listener::open(self.address, &self.relay));
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.relay.state().turn(Way::Closed);
    }
}

/// Waits until the reset connections have ended.
fn ended(connections: &[Weak<Connection>]) {
    eventually("the connections of a link are reset", || {
        connections.iter().all(|connection| connection.strong_count() == 0).then_some(())
    });
}

/// State shared by the threads of a link.
struct Relay {
    source: Ipv4Addr,
    target: SocketAddr,
    state: Mutex<State>,
}

struct State {
    way: Way,
    /// The number of changes: a connection that is still being set up belongs to the state in which it arrived.
    turns: usize,
    /// The relayed connections, while their pumps run.
    connections: Vec<Weak<Connection>>,
    /// The cut connections, kept open whatever happens to their pumps.
    stuck: Vec<Arc<Connection>>,
    /// Connections that arrived while the link was cut.
    unanswered: Vec<TcpStream>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Open,
    Cut,
    Closed,
}

impl State {
    fn new() -> Self {
        State { way: Way::Open, turns: 0, connections: vec![], stuck: vec![], unanswered: vec![] }
    }

    /// Changes the state for all connections, and returns those that end by it.
    fn turn(&mut self, way: Way) -> Vec<Weak<Connection>> {
        if way == self.way {
            return vec![];
        }
        (self.way, self.turns) = (way, self.turns + 1);
        let passing = std::mem::take(&mut self.connections);
        let mut connections: Vec<Arc<Connection>> = passing.iter().filter_map(Weak::upgrade).collect();
        connections.append(&mut self.stuck);
        if way == Way::Cut {
            connections.iter().for_each(|connection| connection.stop());
            self.stuck = connections;
            return vec![];
        }
        self.unanswered.drain(..).for_each(reset);
        connections.iter().for_each(|connection| connection.reset());
        connections.iter().map(Arc::downgrade).collect()
    }
}

impl Relay {
    /// A poisoned lock is tolerated, so that a failed test ends the link like any other.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        loop {
            let client = match listener.accept() {
                Ok((client, _)) => client,
                Err(error) => {
                    assert_eq!(self.state().way, Way::Closed, "a link cannot accept: {error}");
                    return;
                }
            };
            let mut state = self.state();
            match state.way {
                Way::Open => {
                    let (relay, turns) = (Arc::clone(self), state.turns);
                    // Ends with its connection.
                    thread::spawn(move || relay.carry(client, turns));
                }
                Way::Cut => state.unanswered.push(client),
                Way::Closed => reset(client),
            }
        }
    }

    /// Comes from the address of the link, by which the target may know it.
    fn connect(&self) -> std::io::Result<TcpStream> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((self.source, 0)).into())?;
        socket.connect_timeout(&self.target.into(), PATIENCE)?;
        Ok(socket.into())
    }

    /// Connects a client to the target, and passes what comes until both have ended.
    fn carry(&self, client: TcpStream, turns: usize) {
        let Ok(server) = self.connect() else { return reset(client) };
        let mut state = self.state();
        if state.turns != turns {
            match state.way {
                Way::Cut => state.unanswered.extend([client, server]),
                Way::Open | Way::Closed => [client, server].into_iter().for_each(reset),
            }
            return;
        }
        let connection = Arc::new(Connection::new([client, server]));
        state.connections.retain(|connection| connection.strong_count() > 0);
        state.connections.push(Arc::downgrade(&connection));
        drop(state);
        let answers = Arc::clone(&connection);
        thread::spawn(move || answers.pump(1));
        connection.pump(0);
    }
}

/// A client and etcd.
struct Connection {
    ends: [TcpStream; 2],
    passes: AtomicBool,
    /// Held by the pump from each end while it touches the other one.
    lanes: [Mutex<()>; 2],
}

impl Connection {
    fn new(ends: [TcpStream; 2]) -> Self {
        for end in &ends {
            end.set_nodelay(true).expect("a socket option");
            end.set_write_timeout(Some(PAUSE)).expect("a socket option");
        }
        Connection { ends, passes: AtomicBool::new(true), lanes: Default::default() }
    }

    /// Copies the bytes from one end to the other.
    fn pump(&self, from: usize) {
        let (mut source, mut sink) = (&self.ends[from], &self.ends[1 - from]);
        let mut piece = vec![0; 64 * 1024];
        loop {
            match source.read(&mut piece) {
                Ok(0) => {
                    self.pass(from, || _ = sink.shutdown(Shutdown::Write));
                    return;
                }
                Ok(read) => {
                    let mut rest = &piece[..read];
                    while !rest.is_empty() {
                        let Some(written) = self.pass(from, || sink.write(rest)) else { return };
                        match written {
                            Ok(written) => rest = &rest[written..],
                            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                            Err(_) => return self.fail(from),
                        }
                    }
                }
                Err(_) => return self.fail(from),
            }
        }
    }

    /// One end was reset: reset the other.
    fn fail(&self, from: usize) {
        self.pass(from, || self.reset());
    }

    /// Runs `act`, unless the connection is stopped.
    fn pass<T>(&self, from: usize, act: impl FnOnce() -> T) -> Option<T> {
        // Checked before the lock, for which a stop waits, and again after it, which is decisive.
        let passes = || self.passes.load(Ordering::SeqCst);
        let _lane = passes().then(|| self.lanes[from].lock().unwrap())?;
        passes().then(act)
    }

    /// After this returns nothing is relayed.
    fn stop(&self) {
        self.passes.store(false, Ordering::SeqCst);
        self.lanes.iter().for_each(|lane| drop(lane.lock().unwrap()));
    }

    /// Ends its pumps, and makes the sockets, which close with the last of them, report a reset.
    fn reset(&self) {
        self.passes.store(false, Ordering::SeqCst);
        for end in &self.ends {
            SockRef::from(end).set_linger(Some(Duration::ZERO)).expect("a socket option");
            // Wakes its pump. Fails if the other side has reset it already.
            _ = end.shutdown(Shutdown::Read);
        }
    }
}

fn reset(socket: TcpStream) {
    SockRef::from(&socket).set_linger(Some(Duration::ZERO)).expect("a socket option");
    drop(socket);
}

/// The listening socket of a link, and its thread.
struct Listener {
    socket: Arc<TcpListener>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    fn open(address: SocketAddr, relay: &Arc<Relay>) -> Self {
        let socket = Arc::new(TcpListener::bind(address).expect("an address of our own"));
        let (relay, listener) = (Arc::clone(relay), Arc::clone(&socket));
        Listener { socket, thread: Some(thread::spawn(move || relay.accept(&listener))) }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Makes accept() fail.
        _ = SockRef::from(&*self.socket).shutdown(Shutdown::Both);
        // If it has panicked, it has reported why.
        _ = self.thread.take().expect("our thread").join();
    }
}
