//! A worker: the state of one thread of the data path.

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
use super::node_permit::WorkerQueue;
use super::notices::Notices;
use super::request::{Request, RequestId, RequestPool};
use super::request_queue::RequestQueue;
use super::retries::RetryBudgets;
use super::rules::{TrafficRules, WorkerRules};
use super::spin::Spin;
use super::splice::Pipes;
use super::status_set::StatusSet;
use crate::balance::LbContext;
use crate::config::Limits;
use crate::files::{FileBudget, Share};
use crate::fleet::{Node, Role, Snapshot, Suspicion};
use crate::shutdown::{Shutdown, Stage};
use crate::telemetry::access::AccessBuffer;
use crate::telemetry::traces::Tracer;
use crate::telemetry::{Metrics, RetryReason};
use crate::upstream::Pools;

/// The size of a worker's scratch buffer, in bytes. All its connections share it: a 1 MiB body costs half as much CPU
/// as with 16 KiB, and an idle connection pays nothing for it.
const SCRATCH: usize = 256 * 1024;

/// The longest part of a path in a log line, in bytes.
const LONGEST_PATH: usize = 256;

/// State that all workers share with the rest of the process.
#[derive(Clone, Debug)]
pub struct WorkerContext {
    /// The current fleet.
    pub fleet: Arc<ArcSwap<Snapshot>>,
    /// The process's metrics.
    pub metrics: Arc<Metrics>,
    /// Requests that a node failed, for an immediate health check or an ejection. If the queue is full, enough is known.
    pub suspects: mpsc::Sender<Suspicion>,
    /// What a reload of the configuration changes.
    pub rules: Arc<ArcSwap<TrafficRules>>,
    /// The connections of public listeners.
    pub admission: Arc<Admission>,
    /// The files of the traffic.
    pub files: Arc<FileBudget>,
    /// Requests that wait for a node with room.
    pub queue: Arc<RequestQueue>,
    /// How many requests may be retried.
    pub retries: Arc<RetryBudgets>,
    /// How long a worker polls before it sleeps.
    pub spin: Duration,
    /// When the process started.
    pub started: Instant,
    /// The shutdown state of the process.
    pub shutdown: Shutdown,
    /// Makes spans of requests, if there are traces.
    pub tracer: Option<Arc<Tracer>>,
}

/// The files of one listener.
pub(super) struct ListenerFiles<'s> {
    /// For client connections.
    pub(super) clients: &'s Arc<Share>,
    /// For connections to nodes on their behalf.
    pub(super) nodes: &'s Arc<Share>,
}

impl WorkerContext {
    /// The files of the listener that sends to nodes of this role.
    pub(super) fn files_of(&self, role: Role) -> ListenerFiles<'_> {
        let FileBudget { edge_clients, edge_nodes, origin_clients, origin_nodes } = &*self.files;
        match role {
            Role::Varnish => ListenerFiles { clients: edge_clients, nodes: edge_nodes },
            Role::Web => ListenerFiles { clients: origin_clients, nodes: origin_nodes },
        }
    }
}

/// The requests that a worker has taken in at a listener.
#[derive(Debug)]
struct Turns {
    /// Increases by one with each. It wraps.
    turn: Cell<u32>,
    /// Where it was when the retry budget was last told.
    told: Cell<u32>,
}

impl Turns {
    fn from(turn: u32) -> Self {
        Turns { turn: Cell::new(turn), told: Cell::new(turn) }
    }

    fn next(&self) -> u32 {
        self.turn.replace(self.turn.get().wrapping_add(1))
    }

    /// The requests since this was last called.
    fn take_new(&self) -> u32 {
        let turn = self.turn.get();
        turn.wrapping_sub(self.told.replace(turn))
    }
}

/// One thread of the data path.
pub struct Worker {
    pub(super) shared: WorkerContext,
    pub(super) pools: Pools,
    pub(super) requests: RequestPool,
    pub(super) scratch: RefCell<Box<[u8]>>,
    pub(super) deadlines: Rc<Deadlines>,
    pub(super) spin: Spin,
    pub(super) pipes: Pipes,
    pub(super) notices: Notices,
    pub(super) queue: Rc<WorkerQueue>,
    rules: RefCell<WorkerRules>,
    random: RefCell<fastrand::Rng>,
    turns: [Turns; 2],
    stage: Cell<Stage>,
}

impl Worker {
    pub(super) fn new(index: usize, shared: WorkerContext) -> Self {
        let rules = WorkerRules::copy(&shared.rules.load(), None);
        Worker {
            deadlines: Rc::new(Deadlines::new(rules.timeouts)),
            spin: Spin::new(shared.spin),
            pipes: Pipes::default(),
            notices: Notices::default(),
            pools: Pools::new(Arc::clone(&shared.metrics), rules.timeouts.node_keep_alive),
            rules: RefCell::new(rules),
            queue: Rc::new(WorkerQueue::new(Arc::clone(&shared.queue))),
            shared,
            requests: RequestPool::default(),
            scratch: RefCell::new(vec![0; SCRATCH].into_boxed_slice()),
            random: RefCell::default(),
            turns: [0, 1].map(|_| Turns::from(index as u32)),
            stage: Cell::new(Stage::Running),
        }
    }

    pub(super) fn request_id(&self) -> RequestId {
        let mut random = self.random.borrow_mut();
        RequestId::new(random.u64(..), random.u64(..))
    }

    /// The context of a request for nodes of this role that began then.
    pub(super) fn lb_context(&self, role: Role, request_hash: u64, began: Instant) -> LbContext {
        let turn = self.turns[role as usize].next();
        LbContext { request_hash, turn, now_ms: self.latency_time(began), random: self.random.borrow_mut().u64(..) }
    }

    /// A moment as latencies have it: all workers count from the same one.
    pub(super) fn latency_time(&self, moment: Instant) -> u32 {
        moment.saturating_duration_since(self.shared.started).as_millis() as u32
    }

    /// Whether the retry budget has something left for requests to nodes of this role.
    pub(super) fn may_retry(&self, role: Role) -> bool {
        self.shared.retries.has_left(role, self.second(), self.frontend(role).terms.retry_budget)
    }

    /// Takes a retry out of the budget, if there is one left.
    pub(super) fn spend_retry(&self, role: Role, reason: RetryReason) -> bool {
        self.shared.retries.spend((role, reason), self.second(), self.frontend(role).terms.retry_budget)
    }

    /// Counts a retry that the budget does not allow.
    pub(super) fn refuse_retry(&self, role: Role, reason: RetryReason) {
        self.shared.retries.refuse((role, reason), self.second());
    }

    /// Seconds since the start of the process.
    fn second(&self) -> u64 {
        self.shared.started.elapsed().as_secs()
    }

    /// The rules of the listener whose requests go to nodes of this role.
    pub(super) fn frontend(&self, role: Role) -> Rc<Frontend> {
        Rc::clone(self.rules.borrow().frontend(role))
    }

    /// Limits per client.
    pub(super) fn limits(&self) -> Rc<Limits> {
        Rc::clone(&self.rules.borrow().limits)
    }

    /// How long the system of a node that is down may be silent on a connection.
    pub(super) fn node_silence(&self) -> Duration {
        self.rules.borrow().timeouts.node_silence
    }

    /// Whether there is an access log.
    pub(super) fn has_access_log(&self) -> bool {
        self.rules.borrow().access.is_some()
    }

    /// This worker's part of the access log, if there is one.
    pub(super) fn access(&self) -> Option<Rc<AccessBuffer>> {
        self.rules.borrow().access.clone()
    }

    /// Takes new rules, if there are any.
    fn follow_rules(&self) {
        let now = self.shared.rules.load();
        if Arc::ptr_eq(&now, &self.rules.borrow().copied_from) {
            return;
        }
        let copy = WorkerRules::copy(&now, Some(&self.rules.borrow()));
        self.deadlines.set_timeouts(copy.timeouts);
        self.pools.set_idle_limit(copy.timeouts.node_keep_alive);
        *self.rules.borrow_mut() = copy;
    }

    /// A deadline for a connection of this listener, or for one HTTP/2 request.
    pub(super) fn deadline(&self, frontend: &Frontend) -> Deadline {
        self.deadlines.register(
            frontend.drains_at,
            self.limits().min_body_rate.filter(|_| frontend.is_public).map_or(0, NonZeroU64::get),
        )
    }

    /// Closes this worker's idle connections and spare pipes, to make room.
    pub(super) fn close_unused(&self) {
        self.pools.close_unused();
        self.pipes.close_unused();
    }

    /// The current stage of the shutdown.
    pub(super) fn stage(&self) -> Stage {
        self.stage.get()
    }

    /// Logs a failure that is the node's fault, whatever becomes of the request.
    pub(super) fn log_failure(&self, node: &Node, failure: &Failure, request: &Request) {
        if !failure.blames_node() {
            return;
        }
        let request = request.name();
        tracing::debug!(%request, role = %node.spec.role(), node = %node.id(), %failure, "node failed a request");
    }

    /// The statuses with which a node of this role fails a request.
    pub(super) fn failing(&self, role: Role) -> StatusSet {
        self.rules.borrow().failing.of(role)
    }

    /// Logs a failure that the client noticed and did not cause: its answer was refused, cut off or never came, or no node
    /// could take it. `node` is the last that was tried. The path is logged without its query, which may hold secrets.
    pub(super) fn report(&self, node: Option<&Node>, failure: &Failure, request: &Request) {
        let fault = failure.fault();
        if let (Some(node), Some(fault)) = (node, fault) {
            self.shared.metrics.upstream_failures.count(node.spec.role(), fault);
        }
        // Decided before anything is written: strangers can make malformed requests cheaply.
        let Some((status, _)) =
            failure.status().filter(|&(status, _)| fault.is_some() || status >= 500 && !failure.is_ordered())
        else {
            return;
        };
        if let Some(unsaid) = self.notices.pass() {
            let (role, node) = (node.map(|node| node.spec.role().as_str()), node.map(|node| node.id().as_str()));
            let path = request.head.path();
            let path = String::from_utf8_lossy(&path[..path.len().min(LONGEST_PATH)]);
            let what = match failure {
                _ if fault.is_some() => "a request got no good answer from its node",
                Failure::DeadlineExceeded => "a request was ended for its time",
                _ => "a request found no node",
            };
            tracing::info!(request = %request.name(), role, node, %path, status, reason = %failure, unsaid, "{what}");
        }
    }

    /// Checks all connections; `now` counts from the start of the worker. Returns the stage of the process.
    pub(super) fn sweep(&self, now: Duration) -> Stage {
        let stage = self.shared.shutdown.stage();
        self.stage.set(stage);
        self.notices.refill();
        self.follow_rules();
        if let Some(access) = self.access() {
            access.hand_over();
        }
        for role in [Role::Web, Role::Varnish] {
            let new = self.turns[role as usize].take_new();
            self.shared.retries.note_requests(role, self.second(), new.into());
        }
        self.queue.serve();
        let fleet = self.shared.fleet.load();
        let trouble = |node: &Node| {
            let pool = fleet.pool(node.spec.role());
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
        let in_fleet = |endpoint_id| fleet.varnish.has_endpoint(endpoint_id) || fleet.web.has_endpoint(endpoint_id);
        self.pools.sweep(Instant::now(), in_fleet);
        if let Some(gate) = &self.rules.borrow().frontend(Role::Varnish).gate {
            gate.tidy(self.shared.started.elapsed());
        }
        stage
    }
}
