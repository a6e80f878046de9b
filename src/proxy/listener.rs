//! The workers' listening sockets, and a worker's life cycle: start, sweep, drain.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener as StdListener};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustls::ServerConfig;
#[cfg(target_os = "linux")]
use socket2::SockFilter;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{mpsc, watch};

use super::Frontend;
use super::connection::{self, AcceptedSocket};
use super::deadline::SWEEP;
use super::worker::{Worker, WorkerContext};
use crate::shutdown::Stage;
use crate::upstream;

/// The accept queue: connections that the kernel holds until a worker accepts them.
const BACKLOG: i32 = 4096;

/// One socket of a listener, for one worker.
#[derive(Debug)]
pub struct Listener {
    /// The socket.
    pub socket: StdListener,
    /// The TLS configuration; `None` for plain connections.
    pub tls: Option<Arc<ServerConfig>>,
}

/// What a worker runs for a socket.
type Listen = Box<dyn FnOnce(Rc<Worker>) + Send>;

/// Hands a socket and its frontend to a worker. Connections wait in the kernel until `open` is true.
fn listen(listener: Listener, frontend: Frontend, mut open: watch::Receiver<bool>) -> Listen {
    Box::new(move |worker| {
        tokio::task::spawn_local(async move {
            if open.wait_for(|open| *open).await.is_err() {
                return;
            }
            let shutdown = worker.shared.shutdown.clone();
            let drains = shutdown.reached(frontend.drains_at);
            if let Err(error) = accept_until(drains, &worker, listener, &Rc::new(frontend)).await {
                tracing::error!(%error, "a listener failed");
            }
        });
    })
}

/// Accepts until `end`, and then the connections still in the accept queue: the kernel resets those when a listener
/// closes, though their clients are connected and have sent requests.
async fn accept_until(
    end: impl Future<Output = ()>,
    worker: &Rc<Worker>,
    Listener { socket, tls }: Listener,
    frontend: &Rc<Frontend>,
) -> io::Result<()> {
    let listener = TcpListener::from_std(socket)?;
    // Counts like a connection, so that the worker does not end before the accept queue is empty.
    let _in_use = worker.deadline(frontend);
    tokio::select! {
        () = accept(&listener, worker, tls.as_ref(), frontend) => {}
        () = end => {}
    }
    let listener = listener.into_std()?;
    if let Err(error) = begin_no_handshake(&listener) {
        tracing::debug!(%error, "new connections may be reset while this listener closes");
    }
    loop {
        match listener.accept() {
            Ok((stream, peer)) => {
                stream.set_nonblocking(true)?;
                serve(worker, frontend, tls.as_ref(), TcpStream::from_std(stream)?, peer);
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
    frontend: &Rc<Frontend>,
    tls: Option<&Arc<ServerConfig>>,
    socket: TcpStream,
    peer: SocketAddr,
) {
    let deadline = worker.deadline(frontend);
    let file = worker.shared.files_of(frontend.role).clients.enter(1);
    worker.shared.metrics.listener(frontend.role).accepted.inc();
    let permit = frontend.is_public.then(|| worker.shared.admission.enter());
    let accepted = AcceptedSocket { socket, peer, deadline, permit, _file: file, tls: tls.cloned() };
    tokio::task::spawn_local(connection::serve(Rc::clone(worker), Rc::clone(frontend), accepted));
}

async fn accept(listener: &TcpListener, worker: &Rc<Worker>, tls: Option<&Arc<ServerConfig>>, frontend: &Rc<Frontend>) {
    loop {
        worker.shared.files_of(frontend.role).clients.room().await;
        match listener.accept().await {
            Ok((stream, peer)) => serve(worker, frontend, tls, stream, peer),
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

/// Sockets on one address, one for each worker, among which the kernel spreads the connections. Accepted sockets
/// inherit `TCP_NODELAY` and the keepalive settings ([`upstream::KEEP_ALIVE`]). With port 0 all get the same free port.
///
/// # Errors
/// The system's error, usually that the address is in use or not local.
pub fn bind(address: SocketAddr, workers: usize) -> io::Result<Vec<StdListener>> {
    let mut sockets: Vec<StdListener> = Vec::with_capacity(workers);
    let mut address = address;
    for _ in 0..workers {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_keepalive(&upstream::KEEP_ALIVE)?;
        socket.set_nonblocking(true)?;
        if let IpAddr::V6(ip) = address.ip() {
            socket.set_only_v6(!ip.is_unspecified())?;
        }
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let listener = StdListener::from(socket);
        address = listener.local_addr()?;
        sockets.push(listener);
    }
    Ok(sockets)
}

/// The sockets of one worker at one frontend.
#[derive(Debug)]
pub struct Entrance {
    /// One for each address.
    pub sockets: Vec<Listener>,
    /// Their frontend.
    pub frontend: Frontend,
    /// Whether connections are accepted yet.
    pub open: watch::Receiver<bool>,
}

/// Starts a worker thread that serves these sockets of edge and origin until the process has drained. It drops
/// `edge_in_use` once it drains and its last client at the edge has gone.
///
/// # Errors
/// If the system refuses a thread or an epoll instance.
pub fn spawn(
    index: usize,
    shared: WorkerContext,
    entrances: Vec<Entrance>,
    edge_in_use: mpsc::Sender<Infallible>,
) -> io::Result<JoinHandle<()>> {
    let listen_all = |Entrance { sockets, frontend, open }| {
        sockets.into_iter().map(move |socket| listen(socket, frontend.clone(), open.clone())).collect::<Vec<_>>()
    };
    let listeners: Vec<Listen> = entrances.into_iter().flat_map(listen_all).collect();
    // Such a runtime cannot move between threads, so its creation succeeds or fails in the new thread.
    let (made, is_made) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default());
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => {
                // The thread that started us waits for it.
                _ = made.send(Err(error));
                return;
            }
        };
        _ = made.send(Ok(()));
        let worker = Rc::new(Worker::new(index, shared));
        runtime.block_on(async move {
            listeners.into_iter().for_each(|listen| listen(Rc::clone(&worker)));
            tokio::select! {
                () = sweep(&worker, edge_in_use) => {}
                () = worker.spin.run() => {}
            }
        });
    })?;
    is_made.recv().map_err(io::Error::other)??;
    Ok(thread)
}

/// Sweeps the worker's connections until the process has drained.
async fn sweep(worker: &Worker, edge_in_use: mpsc::Sender<Infallible>) {
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
        if stage >= Stage::Draining && worker.deadlines.connections(stage) == 0 {
            drop(edge_in_use.take());
        }
        if stage == Stage::Stopping || (stage >= Stage::Emptying && worker.deadlines.connections(stage) == 0) {
            return;
        }
    }
}
