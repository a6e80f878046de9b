//! Open files: the limit, its division, and the errors that are ours and not a node's.
//!
//! Every connection uses one file, a pipe two. A process that runs out of files fails at the next one that it opens,
//! which may well be a health check: then healthy nodes go down because there is too much traffic to check them. So
//! traffic has a budget below the limit, and the rest is for everything else: listeners, health checks, deliveries, the
//! journal, etcd, the purge and the admin listener. The soft limit, usually 1024, is raised to the hard one.
//!
//! The budget has a share for each hop of a page: clients of the edge, connections to nodes for them, Varnish at the
//! origin, connections to web nodes for it. With a single pool the first hop would take all files and wait for the
//! last. So each hop has files of its own, and half of all is common. Without a free file a client waits to be
//! accepted, and a request waits as long as it may take to connect, after which it is answered 503.
//!
//! [`is_ours`] distinguishes an error about *our* resources (files, ports, memory, permission) from one about a node.

use std::io;
use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use prometheus::IntGauge;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::sync::Notify;

use crate::telemetry::{FileShare, Metrics, Shortage, causes};

/// Connections per control-plane listener, if there are enough files.
const CONTROL_CONNECTIONS: u64 = 2048;

/// Connections per control-plane listener that are always reserved.
const LEAST_CONTROL_CONNECTIONS: u64 = 64;

/// With a smaller limit than this, the control plane gets only the reserved connections.
const FEW: u64 = 1024;

/// A reserve for uncounted files: name resolution, reloaded certificates, libraries.
const SPARE: u64 = 64;

/// Files for each node beside its traffic: a health check, a delivery, and one more of each that is just ending.
const PER_NODE: u64 = 4;

/// One part of eight is each share's own, the other half is common.
const SHARES: usize = FileShare::ALL.len();
const PARTS: u64 = 8;

/// Whether an error says that this process or machine lacks files or memory.
pub fn is_shortage(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM))
}

/// Whether the error of a connection says that this process or machine lacks a resource or a permission, and so nothing about
/// the other side. `EADDRNOTAVAIL` is what connect(2) returns if all local ports are in use.
pub fn is_ours(error: &io::Error) -> bool {
    let is_refused_here =
        matches!(Errno::from_io_error(error), Some(Errno::ADDRNOTAVAIL | Errno::ACCESS | Errno::PERM));
    is_refused_here || is_shortage(error)
}

/// Raises the limit of open files as far as permitted. Returns the old and the new limit.
pub fn raise_limit() -> (u64, u64) {
    let limit = getrlimit(Resource::Nofile);
    let before = limit.current.unwrap_or(u64::MAX);
    let raised = setrlimit(Resource::Nofile, rustix::process::Rlimit { current: limit.maximum, ..limit });
    match raised {
        Ok(()) => (before, limit.maximum.unwrap_or(u64::MAX)),
        Err(error) => {
            tracing::warn!(error = %causes(&error), limit = before, "the limit of open files cannot be raised");
            (before, before)
        }
    }
}

/// The number of files that this process has open. If the system does not say, the number at start on a usual machine.
fn open_now() -> u64 {
    std::fs::read_dir("/proc/self/fd").map_or(SPARE, |files| files.count() as u64)
}

/// The division of the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Connections of each listener of the control plane.
    pub control_connections: usize,
    /// For all traffic.
    traffic: u64,
}

impl Plan {
    /// A plan made after every listener was opened. `limit` is from [`raise_limit`]; `listeners` are those of the
    /// control plane, `nodes` those in the configuration.
    pub fn new(limit: u64, listeners: usize, nodes: usize) -> Self {
        Plan::with_open(limit, open_now(), listeners as u64, nodes as u64)
    }

    fn with_open(limit: u64, open: u64, listeners: u64, nodes: u64) -> Self {
        let each =
            (limit.saturating_sub(FEW) / (2 * listeners.max(1))).clamp(LEAST_CONTROL_CONNECTIONS, CONTROL_CONNECTIONS);
        // Including files for nodes that a registry will add.
        let others = open + listeners * each + PER_NODE * nodes + SPARE + limit / 32;
        let traffic = limit - others.min(limit / 8 * 5);
        Plan { control_connections: usize::try_from(each).unwrap_or(usize::MAX), traffic }
    }

    /// The files that each share owns.
    fn own(&self) -> i64 {
        i64::try_from((self.traffic / PARTS).max(2)).unwrap_or(i64::MAX)
    }

    /// The common files.
    fn common(&self) -> i64 {
        i64::try_from(self.traffic / PARTS * (PARTS - SHARES as u64)).unwrap_or(i64::MAX)
    }
}

/// The files for traffic.
#[derive(Debug)]
pub struct FileBudget {
    /// Clients of the edge.
    pub edge_clients: Arc<Share>,
    /// Connections to nodes for them, and pipes between the two.
    pub edge_nodes: Arc<Share>,
    /// Varnish at the origin.
    pub origin_clients: Arc<Share>,
    /// Connections to web nodes for it, and pipes between the two.
    pub origin_nodes: Arc<Share>,
}

impl FileBudget {
    /// A budget of which nothing is used. At most `max_edge_clients` of them are clients of the edge.
    pub fn new(plan: &Plan, max_edge_clients: Option<NonZeroUsize>, metrics: &Metrics) -> Self {
        let (own, most_common) = (plan.own(), plan.common());
        let most = own.saturating_add(most_common);
        let common = Arc::new(Common { most: most_common, used: AtomicI64::new(0), waiting: Default::default() });
        let [edge_clients, edge_nodes, origin_clients, origin_nodes] = std::array::from_fn(|index| {
            let (used, limit) = metrics.files.share(FileShare::ALL[index]);
            limit.set(most);
            let (own_used, shortage) = (AtomicI64::new(0), metrics.files.shortage(FileShare::ALL[index]));
            Arc::new(Share { index, limit, room: most, own, own_used, used, common: Arc::clone(&common), shortage })
        });
        let budget = FileBudget { edge_clients, edge_nodes, origin_clients, origin_nodes };
        budget.limit_edge_clients(max_edge_clients);
        budget
    }

    /// At most this many files are clients of the edge from now on. Nobody who has one loses it.
    pub fn limit_edge_clients(&self, most: Option<NonZeroUsize>) {
        let share = &self.edge_clients;
        let wanted = most.map_or(share.room, |clients| i64::try_from(clients.get()).unwrap_or(i64::MAX));
        if wanted > share.room {
            tracing::warn!(
                max_connections = wanted,
                room = share.room,
                "limits.max_connections is more than the limit of open files leaves room for: raise that (LimitNOFILE, ulimit -Hn)"
            );
        }
        share.limit.set(wanted.min(share.room));
        share.waiting().wake();
    }
}

/// The common files.
#[derive(Debug)]
struct Common {
    most: i64,
    used: AtomicI64,
    /// Of each share.
    waiting: [ShareWaiters; SHARES],
}

/// The tasks that wait for files of a share.
#[derive(Debug, Default)]
struct ShareWaiters {
    /// Tells everybody that there is room.
    room: Notify,
    /// Notifies one waiter that files were returned.
    turn: Notify,
}

impl ShareWaiters {
    fn wake(&self) {
        self.room.notify_waiters();
        self.turn.notify_one();
    }
}

/// The files of one kind of traffic. Several workers may see the same free file: the limit can be exceeded by a few
/// files.
#[derive(Debug)]
pub struct Share {
    index: usize,
    /// The most files that it may have: its gauge is the number that counts.
    limit: IntGauge,
    /// The most for which there is room.
    room: i64,
    own: i64,
    own_used: AtomicI64,
    /// Includes common files in use.
    used: IntGauge,
    common: Arc<Common>,
    shortage: Shortage,
}

impl Share {
    /// Whether all files are in use.
    pub fn is_full(&self) -> bool {
        !self.has(1)
    }

    fn has(&self, files: i64) -> bool {
        self.used.get() + files <= self.limit.get() && (self.has_own(files) || self.has_common(files))
    }

    fn has_own(&self, files: i64) -> bool {
        self.own_used.load(Ordering::Relaxed) + files <= self.own
    }

    fn has_common(&self, files: i64) -> bool {
        self.common.used.load(Ordering::Relaxed) + files <= self.common.most
    }

    fn waiting(&self) -> &ShareWaiters {
        &self.common.waiting[self.index]
    }

    /// Waits until there is room.
    pub async fn room(&self) {
        while self.is_full() {
            let mut freed = pin!(self.waiting().room.notified());
            freed.as_mut().enable();
            if self.is_full() {
                self.shortage.note(&"all files of this share are in use");
                freed.await;
            }
        }
    }

    /// Counts files that are already open.
    pub fn enter(self: &Arc<Self>, files: i64) -> FilePermit {
        let is_common = !self.has_own(files);
        self.used.add(files);
        let of = if is_common { &self.common.used } else { &self.own_used };
        of.fetch_add(files, Ordering::Relaxed);
        FilePermit { share: Arc::clone(self), files, is_common }
    }

    /// Takes this many files, if they are free.
    pub fn try_take(self: &Arc<Self>, files: i64) -> Option<FilePermit> {
        self.has(files).then(|| self.enter(files))
    }

    /// Takes one more file for a task that holds one and must not wait: if all did, each would wait for the others.
    pub fn take_another(self: &Arc<Self>) -> Option<FilePermit> {
        let another = self.try_take(1);
        if another.is_none() {
            self.shortage.note(&"all files of this share are in use");
        }
        another
    }

    /// Waits for a free file. Cancel-safe.
    pub async fn take(self: &Arc<Self>) -> FilePermit {
        loop {
            let mut freed = pin!(self.waiting().turn.notified());
            freed.as_mut().enable();
            if let Some(permit) = self.try_take(1) {
                // If several files were returned at once, only the first waiter may have been notified. A waiter
                // notified without need checks again.
                if !self.is_full() {
                    self.waiting().turn.notify_one();
                }
                return permit;
            }
            self.shortage.note(&"all files of this share are in use");
            freed.await;
        }
    }
}

/// Files of a share, in use until this is dropped.
#[derive(Debug)]
pub struct FilePermit {
    share: Arc<Share>,
    files: i64,
    is_common: bool,
}

impl Drop for FilePermit {
    fn drop(&mut self) {
        let Share { common, own_used, used, .. } = &*self.share;
        // Whether a waiter lacked one, possibly of two.
        let was_short = !self.share.has(2);
        used.sub(self.files);
        if self.is_common {
            let before = common.used.fetch_sub(self.files, Ordering::Relaxed);
            if before + 2 > common.most {
                common.waiting.iter().for_each(ShareWaiters::wake);
            }
        } else {
            own_used.fetch_sub(self.files, Ordering::Relaxed);
        }
        if was_short {
            self.share.waiting().wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use super::*;

    fn budget(traffic: u64, max_edge_clients: usize) -> FileBudget {
        FileBudget::new(
            &Plan { control_connections: 0, traffic },
            NonZeroUsize::new(max_edge_clients),
            &Metrics::new().unwrap(),
        )
    }

    /// A share of this many files, without any free common ones.
    fn share(own: u64) -> Arc<Share> {
        let FileBudget { edge_nodes, origin_nodes, .. } = budget(own * PARTS, 0);
        let rest = i64::try_from(own).unwrap() * 4;
        // For the rest of the test.
        std::mem::forget(origin_nodes.enter(rest + i64::try_from(own).unwrap()));
        edge_nodes
    }

    #[test]
    fn the_shares_and_everything_else_are_never_more_than_the_limit() {
        for limit in [16, 64, 256, 1024, 4096, 20_000, 1 << 20, u64::MAX] {
            for (listeners, nodes) in [(1, 0), (2, 3), (4, 200)] {
                let plan = Plan::with_open(limit, 40, listeners, nodes);
                assert!(plan.traffic <= limit && plan.traffic >= limit / 4, "{limit} {plan:?}");
                if limit >= 1024 {
                    let others = 40 + listeners * plan.control_connections as u64 + PER_NODE * nodes;
                    let fits = nodes < 100 || limit > 1024;
                    assert!(!fits || plan.traffic + others < limit, "{limit} {plan:?}: {others} others");
                }
                let parts = 4 * plan.own().min(i64::MAX / 8) + plan.common().min(i64::MAX / 2);
                assert!(plan.traffic < 2 * PARTS || parts as u64 <= plan.traffic, "{limit} {plan:?}");
            }
        }
    }

    #[test]
    fn who_finds_a_share_used_up_waits_its_turn_and_gets_what_is_given_back() {
        let share = share(2);
        let (first, second) = (share.try_take(1).unwrap(), share.try_take(1).unwrap());
        assert!(share.try_take(1).is_none() && share.is_full());
        let (mut third, mut fourth) = (Box::pin(share.take()), Box::pin(share.take()));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(third.as_mut().poll(&mut cx).is_pending() && fourth.as_mut().poll(&mut cx).is_pending());
        drop(first);
        assert!(fourth.as_mut().poll(&mut cx).is_pending(), "it is not its turn");
        // Giving up passes the turn on.
        drop(third);
        assert!(fourth.as_mut().poll(&mut cx).is_ready());
        drop(second);
        assert!(!share.is_full());
    }

    #[test]
    fn several_files_that_are_given_back_at_once_are_had_by_as_many_who_wait() {
        let share = share(5);
        let mut taken: Vec<FilePermit> = std::iter::from_fn(|| share.try_take(1)).collect();
        let mut waiting: Vec<_> = (0..4).map(|_| Box::pin(share.take())).collect();
        let mut cx = Context::from_waker(Waker::noop());
        assert!(waiting.iter_mut().all(|take| take.as_mut().poll(&mut cx).is_pending()));
        taken.truncate(1);
        let had: Vec<_> = waiting.iter_mut().map(|take| take.as_mut().poll(&mut cx)).collect();
        assert!(had.iter().all(std::task::Poll::is_ready));
    }

    #[test]
    fn who_finds_no_room_waits_until_somebody_leaves() {
        let share = share(2);
        let permit = share.enter(2);
        let mut listeners = [Box::pin(share.room()), Box::pin(share.room())];
        let mut cx = Context::from_waker(Waker::noop());
        assert!(listeners.iter_mut().all(|room| room.as_mut().poll(&mut cx).is_pending()));
        drop(permit);
        assert!(listeners.iter_mut().all(|room| room.as_mut().poll(&mut cx).is_ready()));
    }

    #[test]
    fn one_share_may_take_all_that_is_common_and_nothing_that_is_another_ones() {
        let FileBudget { edge_clients, edge_nodes, origin_nodes, .. } = budget(80, 0);
        let taken: Vec<FilePermit> = std::iter::from_fn(|| edge_clients.try_take(1)).collect();
        assert_eq!(taken.len(), 50);
        for share in [&edge_nodes, &origin_nodes] {
            let own: Vec<FilePermit> = std::iter::from_fn(|| share.try_take(1)).collect();
            assert_eq!(own.len(), 10);
        }
        let own: Vec<FilePermit> = std::iter::from_fn(|| edge_nodes.try_take(1)).collect();
        let mut waits = Box::pin(edge_nodes.take());
        let mut cx = Context::from_waker(Waker::noop());
        assert!(waits.as_mut().poll(&mut cx).is_pending());
        // A common file returned by another share goes to the waiter.
        drop(taken);
        assert!(waits.as_mut().poll(&mut cx).is_ready());
        drop(own);
    }

    #[test]
    fn the_edge_has_no_more_clients_than_it_is_told() {
        let FileBudget { edge_clients, origin_clients, .. } = budget(80, 4);
        let taken: Vec<FilePermit> = std::iter::from_fn(|| edge_clients.try_take(1)).collect();
        assert!(taken.len() == 4 && edge_clients.is_full() && !origin_clients.is_full());
        let mut room = Box::pin(edge_clients.room());
        let mut cx = Context::from_waker(Waker::noop());
        assert!(room.as_mut().poll(&mut cx).is_pending());
        drop(taken);
        assert!(room.as_mut().poll(&mut cx).is_ready());
    }

    #[test]
    fn a_pipe_takes_two_files_or_none() {
        let share = share(3);
        let pipe = share.try_take(2).unwrap();
        assert!(share.try_take(2).is_none());
        drop(pipe);
        assert_eq!(share.used.get(), 0);
        assert!(share.try_take(2).is_some());
    }

    #[test]
    fn who_has_a_file_gets_another_one_at_once_or_not_at_all() {
        let share = share(2);
        let _had = share.try_take(1).unwrap();
        let another = share.take_another();
        assert!(another.is_some() && share.take_another().is_none());
        drop(another);
        assert!(share.take_another().is_some());
    }

    #[test]
    fn errors_about_us_are_told_from_errors_about_a_node() {
        let is_ours = |errno: Errno| is_ours(&errno.into());
        for ours in [Errno::MFILE, Errno::NFILE, Errno::ADDRNOTAVAIL, Errno::NOBUFS, Errno::ACCESS] {
            assert!(is_ours(ours), "{ours:?}");
        }
        for theirs in [Errno::CONNREFUSED, Errno::TIMEDOUT, Errno::HOSTUNREACH, Errno::NETUNREACH, Errno::CONNRESET] {
            assert!(!is_ours(theirs), "{theirs:?}");
        }
    }
}
