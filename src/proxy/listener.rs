//! The workers' listening sockets, and a worker's life cycle: start, sweep, drain.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener as StdListener};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use rustls::ServerConfig;
#[cfg(target_os = "linux")]
use socket2::SockFilter;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{mpsc, watch};

use super::connection::{self, AcceptedSocket};
use super::deadline::SWEEP;
use super::worker::{Worker, WorkerContext};
use crate::fleet::Role;
use crate::service_manager::Heartbeat;
use crate::shutdown::Stage;
use crate::upstream;

/// The accept queue: connections that the kernel holds until a worker accepts them.
const BACKLOG: i32 = 4096;

/// One socket of a listener, for one worker.
#[derive(Debug)]
pub struct Listener {
    /// The socket: bound, and listening when a worker gets it.
    pub socket: Socket,
    /// It was there before this process, and outlives it.
    pub is_inherited: bool,
    /// The TLS configuration; `None` for plain connections.
    pub tls: Option<Arc<ArcSwap<ServerConfig>>>,
}

/// What a worker runs for a socket.
type Listen = Box<dyn FnOnce(Rc<Worker>) + Send>;

/// Hands a socket to a worker, at the listener whose requests go to nodes of this role. Connections wait in the kernel until `open` is true.
fn listen(listener: Listener, role: Role, mut open: watch::Receiver<bool>) -> Listen {
    Box::new(move |worker| {
        tokio::task::spawn_local(async move {
            if open.wait_for(|open| *open).await.is_err() {
                return;
            }
            let shutdown = worker.shared.shutdown.clone();
            let drains = shutdown.reached(worker.frontend(role).drains_at);
            if let Err(error) = accept_until(drains, &worker, listener, role).await {
                tracing::error!(%error, "a listener failed");
            }
        });
    })
}

/// Accepts until `end`, and then the connections still in the accept queue: the kernel resets those when a listener
/// closes, though their clients are connected and have sent requests. Those of an inherited socket stay there.
async fn accept_until(
    end: impl Future<Output = ()>,
    worker: &Rc<Worker>,
    Listener { socket, is_inherited, tls }: Listener,
    role: Role,
) -> io::Result<()> {
    let listener = TcpListener::from_std(socket.into())?;
    // Counts like a connection, so that the worker does not end before the accept queue is empty.
    let _in_use = worker.deadline(&worker.frontend(role));
    tokio::select! {
        () = accept(&listener, worker, tls.as_ref(), role) => {}
        () = end => {}
    }
    if is_inherited {
        // Nothing is closed: what waits in the queue is for the next process.
        return Ok(());
    }
    let listener = listener.into_std()?;
    if let Err(error) = begin_no_handshake(&listener) {
        tracing::debug!(%error, "new connections may be reset while this listener closes");
    }
    loop {
        match listener.accept() {
            Ok((stream, peer)) => {
                stream.set_nonblocking(true)?;
                serve(worker, role, tls.as_ref(), TcpStream::from_std(stream)?, peer);
            }
            Err(error) if is_about_one_connection(&error) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Makes the kernel drop every SYN for this listener, so that no connection arrives between the last look at the accept
/// queue and the close. The client retries its SYN in a second, and reaches the next process if there is one.
#[cfg(target_os = "linux")]
fn begin_no_handshake(listener: &StdListener) -> io::Result<()> {
    const SYN: u32 = 0x02;
    let (load_byte, jump_if_set, end) = (0x30, 0x45, 0x06);
    socket2::SockRef::from(listener).attach_filter(&[
        SockFilter::new(load_byte, 0, 0, 13),    // load the flags of the TCP header
        SockFilter::new(jump_if_set, 0, 1, SYN), // SYN set: next line, else the one after it
        SockFilter::new(end, 0, 0, 0),           // drop
        SockFilter::new(end, 0, 0, u32::MAX),    // accept
    ])
}

#[cfg(not(target_os = "linux"))]
fn begin_no_handshake(_listener: &StdListener) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Serves a connection in its own task. It is counted here and not when that task first runs: a worker without
/// connections ends when the process drains.
fn serve(
    worker: &Rc<Worker>,
    role: Role,
    tls: Option<&Arc<ArcSwap<ServerConfig>>>,
    socket: TcpStream,
    peer: SocketAddr,
) {
    let frontend = worker.frontend(role);
    let deadline = worker.deadline(&frontend);
    let file = worker.shared.files_of(role).clients.enter(1);
    worker.shared.metrics.listener(role).accepted.inc();
    let permit = frontend.is_public.then(|| worker.shared.admission.enter());
    let accepted =
        AcceptedSocket { socket, peer, deadline, permit, _file: file, tls: tls.map(|config| config.load_full()) };
    tokio::task::spawn_local(connection::serve(Rc::clone(worker), frontend, accepted));
}

async fn accept(listener: &TcpListener, worker: &Rc<Worker>, tls: Option<&Arc<ArcSwap<ServerConfig>>>, role: Role) {
    loop {
        worker.shared.files_of(role).clients.room().await;
        match listener.accept().await {
            Ok((stream, peer)) => serve(worker, role, tls, stream, peer),
            Err(error) if is_about_one_connection(&error) => {}
            Err(error) => {
                // Out of files or memory in spite of the budget: existing connections must end before new ones can
                // begin.
                worker.shared.metrics.files.accept.note(&error);
                worker.close_unused();
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Whether an error of accept(2) concerns only the new connection, not the listener.
fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

impl Listener {
    /// From now on the kernel gives connections to this socket.
    ///
    /// # Errors
    /// The system's error.
    pub fn listen(&self) -> io::Result<()> {
        // One that was inherited has done so for long, with the backlog that its owner chose.
        if self.is_inherited { Ok(()) } else { self.socket.listen(BACKLOG) }
    }
}

/// Sockets on one address, one for each worker, among which the kernel spreads the connections. Accepted sockets
/// inherit `TCP_NODELAY` and the keepalive settings ([`upstream::KEEP_ALIVE`]). With port 0 all get the same free port.
///
/// They do not listen yet: another process of ours may listen at this address, and would share its connections with this one from
/// then on. If this one could not start after all, it would take those with it.
///
/// # Errors
/// The system's error, usually that the address is in use or not local.
pub fn bind(address: SocketAddr, workers: usize) -> io::Result<Vec<Socket>> {
    let mut sockets: Vec<Socket> = Vec::with_capacity(workers);
    let mut address = address;
    for _ in 0..workers {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        set_options(&socket)?;
        if let IpAddr::V6(ip) = address.ip() {
            socket.set_only_v6(!ip.is_unspecified())?;
        }
        socket.bind(&address.into())?;
        address = local_address(&socket)?;
        sockets.push(socket);
    }
    Ok(sockets)
}

/// What accepted sockets inherit; and accept(2) does not block.
fn set_options(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&upstream::KEEP_ALIVE)?;
    socket.set_nonblocking(true)
}

/// Shares out listening sockets that were there before this process: every socket has a worker, and every worker a socket. Workers
/// with one socket between them share its queue.
///
/// # Errors
/// The system's error.
pub fn adopt(sockets: &[StdListener], workers: usize) -> io::Result<Vec<Vec<Socket>>> {
    let mut shares: Vec<Vec<Socket>> = (0..workers).map(|_| Vec::new()).collect();
    for turn in 0..workers.max(sockets.len()) {
        let socket = SockRef::from(&sockets[turn % sockets.len()]).try_clone()?;
        set_options(&socket)?;
        shares[turn % workers].push(socket);
    }
    Ok(shares)
}

/// The address of a bound socket.
///
/// # Errors
/// If it is none of IP.
pub fn local_address(socket: &Socket) -> io::Result<SocketAddr> {
    socket.local_addr()?.as_socket().ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
}

/// The sockets of one worker at one listener.
#[derive(Debug)]
pub struct Entrance {
    /// One for each address.
    pub sockets: Vec<Listener>,
    /// The role of the nodes that serve its requests.
    pub role: Role,
    /// Whether connections are accepted yet.
    pub open: watch::Receiver<bool>,
}

/// The requests that a worker cut at its end, because the time to finish them was over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CutRequests {
    /// Of clients.
    pub edge: usize,
    /// Of Varnish.
    pub origin: usize,
}

/// A worker thread that has no sockets yet. It ends with this value if it gets none.
#[derive(Debug)]
pub struct IdleWorker {
    sockets: std::sync::mpsc::Sender<Vec<Listen>>,
    thread: JoinHandle<CutRequests>,
}

impl IdleWorker {
    /// Starts a worker thread. It drops `edge_in_use` once it drains and its last client at the edge has gone. `heartbeat` counts
    /// its sweeps.
    ///
    /// # Errors
    /// If the system refuses a thread or an epoll instance.
    pub fn start(
        index: usize,
        shared: WorkerContext,
        edge_in_use: mpsc::Sender<Infallible>,
        heartbeat: Arc<Heartbeat>,
    ) -> io::Result<Self> {
        // Such a runtime cannot move between threads, so its creation succeeds or fails in the new thread.
        let (made, is_made) = std::sync::mpsc::sync_channel(1);
        let (sockets, get_sockets) = std::sync::mpsc::channel::<Vec<Listen>>();
        let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default());
            let runtime = match runtime {
                Ok(runtime) => runtime,
                Err(error) => {
                    // The thread that started us waits for it.
                    _ = made.send(Err(error));
                    return CutRequests::default();
                }
            };
            _ = made.send(Ok(()));
            let Ok(listeners) = get_sockets.recv() else { return CutRequests::default() };
            let worker = Rc::new(Worker::new(index, shared));
            runtime.block_on(async move {
                listeners.into_iter().for_each(|listen| listen(Rc::clone(&worker)));
                tokio::select! {
                    cut = sweep(&worker, edge_in_use, &heartbeat) => cut,
                    never = worker.spin.run() => match never {},
                }
            })
        })?;
        is_made.recv().map_err(io::Error::other)??;
        Ok(IdleWorker { sockets, thread })
    }

    /// Has the worker serve these sockets, which listen by now, until the process has drained.
    pub fn serve(self, entrances: Vec<Entrance>) -> JoinHandle<CutRequests> {
        let listen_all = |Entrance { sockets, role, open }| {
            sockets.into_iter().map(move |socket| listen(socket, role, open.clone())).collect::<Vec<_>>()
        };
        let listeners = entrances.into_iter().flat_map(listen_all).collect();
        // Fails only if the thread has panicked, which whoever joins it sees.
        _ = self.sockets.send(listeners);
        self.thread
    }
}

/// Sweeps the worker's connections until the process has drained. Returns what is cut then.
async fn sweep(worker: &Worker, edge_in_use: mpsc::Sender<Infallible>, heartbeat: &Heartbeat) -> CutRequests {
    let mut edge_in_use = Some(edge_in_use);
    let started = Instant::now();
    let mut ticks = tokio::time::interval(SWEEP);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            // Noticed at once, so that a draining listener no longer offers keep-alive.
            () = worker.shared.shutdown.left(worker.stage()) => {}
        }
        let stage = worker.sweep(started.elapsed());
        heartbeat.beat();
        if stage >= Stage::Draining && worker.deadlines.connections(stage) == 0 {
            drop(edge_in_use.take());
        }
        if stage == Stage::Stopping || (stage >= Stage::Emptying && worker.deadlines.connections(stage) == 0) {
            let (edge, origin) =
                (worker.deadlines.requests(Stage::Draining), worker.deadlines.requests(Stage::Emptying));
            return CutRequests { edge, origin };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_socket_has_a_worker_and_every_worker_a_socket() {
        let sockets: Vec<StdListener> = (0..3).map(|_| StdListener::bind("127.0.0.1:0").unwrap()).collect();
        let [a, b, c] = [0, 1, 2].map(|index| sockets[index].local_addr().unwrap());
        let shares = |sockets: &[StdListener], workers| -> Vec<Vec<SocketAddr>> {
            let shares = adopt(sockets, workers).unwrap();
            shares.iter().map(|share| share.iter().map(|socket| local_address(socket).unwrap()).collect()).collect()
        };
        assert_eq!(shares(&sockets[..1], 2), [[a], [a]]);
        assert_eq!(shares(&sockets, 2), [vec![a, c], vec![b]]);
        assert_eq!(shares(&sockets, 3), [[a], [b], [c]]);
    }
}
