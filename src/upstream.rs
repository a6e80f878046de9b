//! Connections to nodes: one pool a worker, last in first out, no lock.
//!
//! A pool of its own for each worker costs some more connections than a shared one and saves every hand-over between
//! cores. Last in, first out keeps the few connections in use warm and lets the others grow old and go.
//!
//! The race that every keep-alive client has (the server closes just as we send) is met three times: idle
//! connections are dropped before common servers would drop them, one that was closed is noticed when it is taken,
//! and what still slips through is told apart as `reused`, so that the caller can repeat the request, if that may be
//! repeated. One that may not be is worth a system call when its connection is taken ([`Openness::Asked`]): then the
//! window is the time that the end of a connection takes from the node to us. The alternative, a new connection for each
//! of them, would close that too, for a round trip and a local port a minute for each POST.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;

use crate::files::{FilePermit, is_ours};
use crate::fleet::{Live, Node};
use crate::telemetry::{Metrics, NodeMetrics};

/// How long an unused connection is kept. Below the 5 s after which Varnish (`timeout_idle`) and Apache
/// (`KeepAliveTimeout`) close theirs.
const IDLE_LIMIT: Duration = Duration::from_secs(4);

/// When a silent peer is asked whether it is there still: an answer under way lives as long as both of its connections do,
/// and a machine that lost its power would else keep one for an hour. Gone after 60 s and three questions, 10 s apart.
pub const KEEP_ALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(10)).with_retries(3);

/// Unused connections per node and worker. More were needed at once only in a burst.
const IDLE_MAX: usize = 256;

/// A connection to a node, and its place among the files of the traffic.
#[derive(Debug)]
pub struct NodeConnection {
    /// The socket.
    pub stream: TcpStream,
    _file: FilePermit,
}

/// The connections of one worker.
#[derive(Debug)]
pub struct Pools {
    /// In a tree, because finding one among few numbers costs less than to hash it.
    nodes: RefCell<BTreeMap<u64, NodePool>>,
    metrics: Arc<Metrics>,
}

/// How it is known that an idle connection is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Openness {
    /// As of the last time that the runtime looked.
    AsKnown,
    /// The system was asked now.
    Asked,
}

#[derive(Debug)]
struct NodePool {
    /// Gone when neither the fleet nor a request has the node any more.
    live: Weak<Live>,
    idle: Vec<Idle>,
    metrics: Arc<NodeMetrics>,
}

#[derive(Debug)]
struct Idle {
    connection: NodeConnection,
    since: Instant,
    /// The only client that it may be used for.
    owner: Option<SocketAddr>,
}

impl Pools {
    /// Empty pools.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Pools { nodes: RefCell::default(), metrics }
    }

    /// The metric handles of a node.
    pub fn metrics(&self, node: &Node) -> Arc<NodeMetrics> {
        self.with_pool(node, |pool| Arc::clone(&pool.metrics))
    }

    /// The connection to this node that was used last and is open still. `owner` is the client, where the node was told
    /// who it is.
    pub fn get(&self, node: &Node, owner: Option<SocketAddr>, openness: Openness) -> Option<NodeConnection> {
        self.with_pool(node, |pool| {
            while let Some(at) = pool.idle.iter().rposition(|idle| idle.owner == owner) {
                let mut idle = pool.idle.remove(at);
                let stream = &mut idle.connection.stream;
                if is_quiet(stream) && (openness == Openness::AsKnown || is_quiet_now(stream)) {
                    return Some(idle.connection);
                }
            }
            None
        })
    }

    /// Keeps a connection on which the last answer came to its end.
    pub fn put(&self, node: &Node, connection: NodeConnection, owner: Option<SocketAddr>, now: Instant) {
        self.with_pool(node, |pool| {
            // The oldest goes: the client that it is for may have gone, too, and this one has only just been here.
            if pool.idle.len() == IDLE_MAX {
                pool.idle.remove(0);
            }
            pool.idle.push(Idle { connection, since: now, owner });
        });
    }

    /// Opens a connection, for which `file` is the room.
    ///
    /// # Errors
    /// What the system says; it is counted, as an error of the node unless it [is ours](is_ours).
    pub async fn connect(&self, node: &Node, file: FilePermit) -> io::Result<NodeConnection> {
        let stream = TcpStream::connect(node.spec.address).await.inspect_err(|error| {
            if is_ours(error) {
                self.metrics.files.connect.note(error);
            } else {
                self.count_connect_error(node);
            }
        })?;
        stream.set_nodelay(true)?;
        SockRef::from(&stream).set_tcp_keepalive(&KEEP_ALIVE)?;
        Ok(NodeConnection { stream, _file: file })
    }

    /// Closes every unused connection: somebody needs the room.
    pub fn close_unused(&self) {
        self.nodes.borrow_mut().values_mut().for_each(|pool| pool.idle.clear());
    }

    /// Counts a connection that could not be opened, also one that took too long.
    pub fn count_connect_error(&self, node: &Node) {
        self.with_pool(node, |pool| pool.metrics.connect_errors.inc());
    }

    /// Closes what has been idle for too long, or leads to a node that is not in the fleet any more. Such a node is
    /// forgotten when its last request is: made anew for that one, its metrics would never go.
    pub fn sweep(&self, now: Instant, in_fleet: impl Fn(u64) -> bool) {
        let mut nodes = self.nodes.borrow_mut();
        nodes.retain(|&endpoint_id, pool| {
            let in_fleet = in_fleet(endpoint_id);
            // The oldest are at the front: taken and given at the back.
            let has_expired = |idle: &Idle| !in_fleet || now.duration_since(idle.since) > IDLE_LIMIT;
            let expired = pool.idle.partition_point(has_expired);
            pool.idle.drain(..expired);
            in_fleet || pool.live.strong_count() > 0
        });
    }

    fn with_pool<T>(&self, node: &Node, f: impl FnOnce(&mut NodePool) -> T) -> T {
        let mut nodes = self.nodes.borrow_mut();
        let pool = nodes.entry(node.endpoint_id).or_insert_with(|| NodePool {
            live: Arc::downgrade(&node.live),
            idle: Vec::new(),
            metrics: self.metrics.node(node.spec.role, node.id()),
        });
        f(pool)
    }
}

/// Whether an idle connection is open and silent. Anything to read on it is an end, or an answer to nobody. Costs no
/// system call while nothing happened: tokio knows from its last poll that the socket was empty.
fn is_quiet(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    let mut buffer = ReadBuf::new(&mut byte);
    let poll = Pin::new(stream).poll_read(&mut Context::from_waker(Waker::noop()), &mut buffer);
    matches!(poll, Poll::Pending)
}

/// The same, as the system knows it at this moment.
fn is_quiet_now(stream: &TcpStream) -> bool {
    let peeked = socket2::SockRef::from(stream).peek(&mut [MaybeUninit::uninit()]);
    peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}
