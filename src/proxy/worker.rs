//! A worker: what one thread of the data path has for itself.

use std::cell::{Cell, RefCell};
use std::num::NonZeroU64;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::mpsc;

use super::Frontend;
use super::admission::Admission;
use super::deadline::{Deadline, Deadlines, Interrupt};
use super::failure::Failure;
use super::notices::Notices;
use super::request::RequestPool;
use super::spin::Spin;
use super::splice::Pipes;
use crate::balance::LbContext;
use crate::config::Limits;
use crate::files::{FileBudget, Share};
use crate::fleet::{Node, NodeId, Role, Snapshot};
use crate::shutdown::{Shutdown, Stage};
use crate::telemetry::Metrics;
use crate::upstream::Pools;

/// The scratch buffer of a worker, in bytes. One for all its connections: a 1 MiB body costs half as much CPU with
/// this as with 16 KiB, and a connection at rest pays nothing for it.
const SCRATCH: usize = 256 * 1024;

/// How much of a path is told, in bytes.
const LONGEST_PATH: usize = 256;

/// What all workers share with the rest of the process.
#[derive(Clone, Debug)]
pub struct Shared {
    /// The fleet as it is now.
    pub fleet: Arc<ArcSwap<Snapshot>>,
    /// Where everything is counted.
    pub metrics: Arc<Metrics>,
    /// Nodes that failed a request, for an immediate health check. Full means that one is under way.
    pub suspects: mpsc::Sender<(Role, NodeId)>,
    /// What one client may take.
    pub limits: Arc<Limits>,
    /// The connections of public listeners.
    pub admission: Arc<Admission>,
    /// The files of the traffic.
    pub files: Arc<FileBudget>,
    /// How long a worker polls before it sleeps.
    pub spin: Duration,
    /// When the process started.
    pub started: Instant,
    /// The end of the process.
    pub shutdown: Shutdown,
}

/// The files of one listener.
pub(super) struct ListenerFiles<'s> {
    /// Of its clients.
    pub(super) clients: &'s Arc<Share>,
    /// Of the connections to nodes for them.
    pub(super) nodes: &'s Arc<Share>,
}

impl Shared {
    /// The files of the listener that sends to nodes of this role.
    pub(super) fn files_of(&self, role: Role) -> ListenerFiles<'_> {
        let FileBudget { edge_clients, edge_nodes, origin_clients, origin_nodes } = &*self.files;
        match role {
            Role::Varnish => ListenerFiles { clients: edge_clients, nodes: edge_nodes },
            Role::Web => ListenerFiles { clients: origin_clients, nodes: origin_nodes },
        }
    }
}

/// One thread of the data path.
pub struct Worker {
    pub(super) shared: Shared,
    pub(super) pools: Pools,
    pub(super) requests: RequestPool,
    pub(super) scratch: RefCell<Box<[u8]>>,
    pub(super) deadlines: Rc<Deadlines>,
    pub(super) spin: Spin,
    pub(super) pipes: Pipes,
    pub(super) notices: Notices,
    random: RefCell<fastrand::Rng>,
    turn: Cell<u64>,
    stage: Cell<Stage>,
}

impl Worker {
    pub(super) fn new(index: usize, shared: Shared) -> Self {
        Worker {
            deadlines: Rc::new(Deadlines::new(shared.limits.header_timeout)),
            spin: Spin::new(shared.spin),
            pipes: Pipes::default(),
            notices: Notices::default(),
            pools: Pools::new(Arc::clone(&shared.metrics)),
            shared,
            requests: RequestPool::default(),
            scratch: RefCell::new(vec![0; SCRATCH].into_boxed_slice()),
            random: RefCell::default(),
            turn: Cell::new(index as u64),
            stage: Cell::new(Stage::Running),
        }
    }

    pub(super) fn lb_context(&self, request_hash: u64) -> LbContext {
        let turn = self.turn.get();
        self.turn.set(turn.wrapping_add(1));
        LbContext { request_hash, turn, random: self.random.borrow_mut().u64(..) }
    }

    /// A deadline for a connection of this listener, or for one request among others of a connection.
    pub(super) fn deadline(&self, frontend: &Frontend) -> Deadline {
        self.deadlines.register(
            frontend.drains_at,
            self.shared.limits.min_body_rate.filter(|_| frontend.is_public).map_or(0, NonZeroU64::get),
        )
    }

    /// Closes what this worker keeps for later: somebody needs the room now.
    pub(super) fn close_unused(&self) {
        self.pools.close_unused();
        self.pipes.close_unused();
    }

    /// How far the end of the process has come.
    pub(super) fn stage(&self) -> Stage {
        self.stage.get()
    }

    /// Tells the log and the health checks what a node did, if it is to blame.
    pub(super) fn suspect(&self, node: &Node, failure: &Failure) {
        if !failure.blames_node() {
            return;
        }
        tracing::debug!(role = %node.spec.role, node = %node.id(), %failure, "node failed a request");
        if matches!(failure, Failure::Connect(_) | Failure::NoAnswer(_)) {
            // A full queue means that checks are under way anyway.
            _ = self.shared.suspects.try_send((node.spec.role, node.id().clone()));
        }
    }

    /// Says what a node did, where its client has to bear it: an answer that was refused, cut off or never came. The path
    /// is told without its query, which may hold secrets.
    pub(super) fn report(&self, node: &Node, failure: &Failure, path: &[u8]) {
        let Some(fault) = failure.fault() else { return };
        self.shared.metrics.upstream_failures.count(node.spec.role, fault);
        if let Some(unsaid) = self.notices.pass() {
            let (role, node) = (node.spec.role, node.id());
            let path = String::from_utf8_lossy(&path[..path.len().min(LONGEST_PATH)]);
            tracing::info!(%role, %node, %path, reason = %failure, unsaid, "a request got no good answer from its node");
        }
    }

    /// Looks after all connections; `now` counts from the start of the worker. Returns the stage of the process.
    pub(super) fn sweep(&self, now: Duration) -> Stage {
        let stage = self.shared.shutdown.stage();
        self.stage.set(stage);
        self.notices.refill();
        let fleet = self.shared.fleet.load();
        let trouble = |node: &Node| {
            let pool = fleet.pool(node.spec.role);
            match pool.get(node.id()) {
                _ if node.live.is_down() && !pool.panics() => Some(Interrupt::NodeDown),
                Some(member) if member.node.endpoint_id == node.endpoint_id => None,
                _ => Some(Interrupt::NodeGone),
            }
        };
        let FileBudget { edge_clients, edge_nodes, origin_clients, origin_nodes } = &*self.shared.files;
        let crowded = edge_clients.is_full() || origin_clients.is_full();
        self.deadlines.sweep(now, stage, crowded, trouble);
        if edge_nodes.is_full() || origin_nodes.is_full() {
            self.close_unused();
        }
        let in_fleet = |endpoint_id| {
            let has = |role| fleet.pool(role).members().iter().any(|member| member.node.endpoint_id == endpoint_id);
            has(Role::Varnish) || has(Role::Web)
        };
        self.pools.sweep(Instant::now(), in_fleet);
        stage
    }
}
