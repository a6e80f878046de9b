//! Connections to nodes: one pool per worker, last in first out, no lock.
//!
//! A pool per worker costs some more connections than a shared one and avoids every hand-over between cores. Last in,
//! first out keeps the connections in use warm and lets the others time out.
//!
//! The race of every keep-alive client (the server closes just as we send) is handled three times: idle connections are
//! dropped before common servers would close them, a closed one is noticed when it is taken, and a remaining failure is
//! marked as `reused`, so that the caller can retry the request if that is allowed. A request that must not be retried
//! is worth a system call when its connection is taken ([`Openness::Asked`]): that reduces the window to the latency
//! from the node to us. The alternative, a new connection for each such request, would close it completely, for a round
//! trip and a local port a minute for each POST.

use std::cell::{Cell, RefCell};
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

/// Keepalive probes for a silent peer: an answer in flight lives as long as both of its connections, and without probes
/// a machine that lost its power would hold one for an hour. Dead after 60 s and three probes, 10 s apart.
pub const KEEP_ALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(10)).with_retries(3);

/// The most idle connections per node and worker. More were in use at once only in a burst.
const IDLE_MAX: usize = 256;

/// A connection to a node, and its file permit.
#[derive(Debug)]
pub struct UpstreamConnection {
    /// The socket.
    pub stream: TcpStream,
    _file: FilePermit,
}

/// The connections of one worker.
#[derive(Debug)]
pub struct Pools {
    /// A tree, because searching a few numbers costs less than hashing one.
    nodes: RefCell<BTreeMap<u64, NodePool>>,
    /// How long an idle connection is kept; zero: not at all.
    idle_limit: Cell<Duration>,
    /// When they were last swept: exact enough for `idle_limit`, and no clock is read for each request.
    swept: Cell<Instant>,
    metrics: Arc<Metrics>,
}

/// How to check that an idle connection is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Openness {
    /// By the runtime's last poll.
    AsKnown,
    /// By a system call now.
    Asked,
}

#[derive(Debug)]
struct NodePool {
    /// Dropped once neither the fleet nor a request has the node any more.
    live: Weak<Live>,
    idle: Vec<Idle>,
    metrics: Arc<NodeMetrics>,
}

#[derive(Debug)]
struct Idle {
    connection: UpstreamConnection,
    /// The last sweep before it was kept.
    since: Instant,
    /// The only client that may use it.
    owner: Option<SocketAddr>,
}

impl Pools {
    /// Empty pools, in which an idle connection is kept for as long as `idle_limit`; if that is zero, not at all.
    pub fn new(metrics: Arc<Metrics>, idle_limit: Duration) -> Self {
        Pools {
            nodes: RefCell::default(),
            idle_limit: Cell::new(idle_limit),
            swept: Cell::new(Instant::now()),
            metrics,
        }
    }

    /// Keeps idle connections for so long from now on, those that are idle now as well.
    pub fn set_idle_limit(&self, idle_limit: Duration) {
        self.idle_limit.set(idle_limit);
    }

    /// The metric handles of a node.
    pub fn metrics(&self, node: &Node) -> Arc<NodeMetrics> {
        self.with_pool(node, |pool| Arc::clone(&pool.metrics))
    }

    /// The most recently used open connection to this node. `owner` is the client, if the node was told the client's
    /// address.
    pub fn get(&self, node: &Node, owner: Option<SocketAddr>, openness: Openness) -> Option<UpstreamConnection> {
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

    /// Keeps a connection after a complete answer.
    pub fn put(&self, node: &Node, connection: UpstreamConnection, owner: Option<SocketAddr>) {
        if self.idle_limit.get().is_zero() {
            return;
        }
        self.with_pool(node, |pool| {
            // The oldest is dropped: its client may have gone, while this one was just here.
            if pool.idle.len() == IDLE_MAX {
                pool.idle.remove(0);
            }
            pool.idle.push(Idle { connection, since: self.swept.get(), owner });
        });
    }

    /// Opens a connection, whose file permit is `file`.
    ///
    /// # Errors
    /// The system's error, which is counted, as an error of the node unless it [is ours](is_ours).
    pub async fn connect(&self, node: &Node, file: FilePermit) -> io::Result<UpstreamConnection> {
        let stream = TcpStream::connect(node.spec.address).await.inspect_err(|error| {
            if is_ours(error) {
                self.metrics.files.connect.note(error);
            } else {
                self.count_connect_error(node);
            }
        })?;
        stream.set_nodelay(true)?;
        SockRef::from(&stream).set_tcp_keepalive(&KEEP_ALIVE)?;
        Ok(UpstreamConnection { stream, _file: file })
    }

    /// Closes every idle connection, to make room.
    pub fn close_unused(&self) {
        self.nodes.borrow_mut().values_mut().for_each(|pool| pool.idle.clear());
    }

    /// Counts a failed or timed-out connect.
    pub fn count_connect_error(&self, node: &Node) {
        self.with_pool(node, |pool| pool.metrics.connect_errors.inc());
    }

    /// Closes connections that were idle for too long, or lead to a node that has left the fleet. Such a node's pool is
    /// dropped only after its last request: if it were created anew for that one, its metrics would remain forever.
    pub fn sweep(&self, now: Instant, in_fleet: impl Fn(u64) -> bool) {
        self.swept.set(now);
        let idle_limit = self.idle_limit.get();
        let mut nodes = self.nodes.borrow_mut();
        nodes.retain(|&endpoint_id, pool| {
            let in_fleet = in_fleet(endpoint_id);
            // The oldest are at the front: connections are taken and returned at the back.
            let has_expired = |idle: &Idle| !in_fleet || now.duration_since(idle.since) > idle_limit;
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
            metrics: self.metrics.node(node.spec.role(), node.id()),
        });
        f(pool)
    }
}

/// Whether an idle connection is open and silent. Readable data is an end of stream or an unsolicited answer. Costs no
/// system call while nothing happened: tokio knows from its last poll that the socket was empty.
fn is_quiet(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    let mut buffer = ReadBuf::new(&mut byte);
    let poll = Pin::new(stream).poll_read(&mut Context::from_waker(Waker::noop()), &mut buffer);
    matches!(poll, Poll::Pending)
}

/// The same by a system call.
fn is_quiet_now(stream: &TcpStream) -> bool {
    let peeked = socket2::SockRef::from(stream).peek(&mut [MaybeUninit::uninit()]);
    peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::{FileBudget, Plan};
    use crate::fleet::{NodeId, NodeSpec, Role};

    const KEPT: Duration = Duration::from_secs(4);

    /// A node that accepts, pools, and what a connection to it needs.
    struct PoolRig {
        _listener: tokio::net::TcpListener,
        node: Node,
        files: FileBudget,
        pools: Pools,
        began: Instant,
    }

    impl PoolRig {
        async fn new(idle_limit: Duration) -> Self {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let id = NodeId::try_from("a").unwrap();
            let spec = NodeSpec::new(Role::Web, id, listener.local_addr().unwrap());
            let metrics = Arc::new(Metrics::new().unwrap());
            let files = FileBudget::new(&Plan::new(4096, 1, 1), None, &metrics);
            let node = Node::new(spec, Arc::default(), 1);
            let (pools, began) = (Pools::new(metrics, idle_limit), Instant::now());
            pools.sweep(began, |_| true);
            PoolRig { _listener: listener, node, files, pools, began }
        }

        /// Connects, and keeps the connection.
        async fn keep(&self) {
            let file = self.files.origin_nodes.try_take(1).unwrap();
            let connection = self.pools.connect(&self.node, file).await.unwrap();
            self.pools.put(&self.node, connection, None);
        }

        /// Whether one is kept so long after the beginning.
        fn is_kept(&self, after: Duration) -> bool {
            self.pools.sweep(self.began + after, |_| true);
            let kept = self.pools.get(&self.node, None, Openness::Asked);
            kept.map(|kept| self.pools.put(&self.node, kept, None)).is_some()
        }

        /// The same without taking it, which would make it young.
        fn is_swept(&self, after: Duration) -> bool {
            self.pools.sweep(self.began + after, |_| true);
            self.pools.nodes.borrow()[&self.node.endpoint_id].idle.is_empty()
        }
    }

    #[tokio::test]
    async fn an_idle_connection_is_kept_up_to_the_limit_of_now() {
        let rig = PoolRig::new(KEPT).await;
        rig.keep().await;
        assert!(!rig.is_swept(KEPT) && rig.is_swept(KEPT + Duration::from_millis(1)));
        rig.pools.set_idle_limit(10 * KEPT);
        rig.keep().await;
        assert!(!rig.is_swept(10 * KEPT));
        // It is used, and so young again.
        assert!(rig.is_kept(10 * KEPT) && !rig.is_swept(20 * KEPT));
        rig.pools.set_idle_limit(KEPT);
        assert!(rig.is_swept(20 * KEPT));
    }

    #[tokio::test]
    async fn with_a_limit_of_zero_none_is_kept() {
        let rig = PoolRig::new(Duration::ZERO).await;
        rig.keep().await;
        assert!(!rig.is_kept(Duration::ZERO));
    }
}
