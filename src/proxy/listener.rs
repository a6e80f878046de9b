//! The sockets that workers listen on, and the life of a worker: started, swept, drained.

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

/// Connections that the kernel holds for us between two turns of a worker.
const BACKLOG: i32 = 4096;

/// One socket of a listener, for one worker.
#[derive(Debug)]
pub struct Listener {
    /// The socket.
    pub socket: StdListener,
    /// How its connections are encrypted; `None` for plain ones.
    pub tls: Option<Arc<ServerConfig>>,
}

/// What a worker does with a socket.
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

/// Accepts until `end`, and then what the kernel has accepted for us by then: that is reset when a listener closes,
/// though its clients were told that they are connected and have sent their requests.
async fn accept_until(
    end: impl Future<Output = ()>,
    worker: &Rc<Worker>,
    Listener { socket, tls }: Listener,
    frontend: &Rc<Frontend>,
) -> io::Result<()> {
    let listener = TcpListener::from_std(socket)?;
    // Counts like a connection: the worker must not end before this has come to its end.
    let _in_use = worker.deadline(frontend);
    tokio::select! {
        () = accept(&listener, worker, tls.as_ref(), frontend) => {}
        () = end => {}
    }
    let listener = listener.into_std()?;
    if let Err(error) = begin_no_handshake(&listener) {
        tracing::debug!(%error, "connections that begin at this moment may be reset");
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

/// Makes the kernel drop every SYN for this listener, so that nothing arrives between the last look at its queue and its
/// close. Whoever is dropped asks again in a second, and meets whoever listens then, or nobody.
#[cfg(target_os = "linux")]
fn begin_no_handshake(listener: &StdListener) -> io::Result<()> {
    const SYN: u32 = 0x02;
    let (load_byte, jump_if_set, end) = (0x30, 0x45, 0x06);
    socket2::SockRef::from(listener).attach_filter(&[
        SockFilter::new(load_byte, 0, 0, 13),    // the flags of the TCP header
        SockFilter::new(jump_if_set, 0, 1, SYN), // set: the next line, else the one behind it
        SockFilter::new(end, 0, 0, 0),           // drop
        SockFilter::new(end, 0, 0, u32::MAX),    // keep all of it
    ])
}

#[cfg(not(target_os = "linux"))]
fn begin_no_handshake(_listener: &StdListener) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Serves a connection in a task of its own. It counts as one from now on, and not only once that task runs: a worker
/// without connections ends when the process drains.
fn serve(
    worker: &Rc<Worker>,
    frontend: &Rc<Frontend>,
    tls: Option<&Arc<ServerConfig>>,
    socket: TcpStream,
    peer: SocketAddr,
) {
    let deadline = worker.deadline(frontend);
    let file = worker.shared.files_of(frontend.role).clients.enter(1);
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
                // Out of files or memory, in spite of the budget: what runs must end before more can begin.
                worker.shared.metrics.files.accept.note(&error);
                worker.close_unused();
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// accept(2): errors of the new connection are handed out by accept, and say nothing about the listener.
fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

/// Sockets on one address, one for each worker, among which the kernel spreads the connections. `TCP_NODELAY` is
/// inherited by what they accept, and so is that a silent client is asked whether it is there ([`upstream::KEEP_ALIVE`]).
/// With port 0 all get the same free port.
///
/// # Errors
/// What the system says, as a rule that the address is in use or not ours.
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
    /// What they are the sockets of.
    pub frontend: Frontend,
    /// Whether connections are taken yet.
    pub open: watch::Receiver<bool>,
}

/// Starts a worker thread that serves these sockets of edge and origin, until the process has drained. It drops
/// `edge_in_use` when it drains and the last client at its edge has gone.
///
/// # Errors
/// If the system gives no thread, or no epoll instance.
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
    // A runtime of this kind never leaves its thread, so whether there is one is known only there.
    let (made, is_made) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default());
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => {
                // Who started us waits for it.
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

/// Looks after the worker's connections until the process has drained.
async fn sweep(worker: &Worker, edge_in_use: mpsc::Sender<Infallible>) {
    let mut edge_in_use = Some(edge_in_use);
    let started = Instant::now();
    let mut ticks = tokio::time::interval(SWEEP);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            // Noticed at once, so that no answer of a listener that drains invites another request.
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
