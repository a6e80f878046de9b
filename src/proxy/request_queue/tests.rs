use std::num::NonZeroU32;
use std::sync::Barrier;
use std::sync::atomic::AtomicU32;
use std::task::{Wake, Waker};
use std::thread::Thread;

use super::super::frontend::{PastCaches, Trust};
use super::super::status_set::FailureStatuses;
use super::super::{ErrorPages, Frontend};
use super::*;
use crate::config::{HealthChecks, Limits, Origin, RequestTerms};
use crate::fleet::{Health, Live, Member, NodeId, NodeSpec, Pool};
use crate::http1::RequestHead;
use crate::shutdown::Stage;

/// Chooses the first web node that has room by this limit.
struct FirstWithRoom(Option<NonZeroU32>);

impl Select for FirstWithRoom {
    fn request_hash(&self, _: &RequestHead) -> u64 {
        0
    }

    fn pick(&self, fleet: &Snapshot, _: LbContext, tried: &[u64]) -> Result<NodeChoice, NoNode> {
        let mut members = fleet.web.members().iter().filter(|member| !tried.contains(&member.node.endpoint_id));
        let member = members.find(|member| member.node.live.has_room(self.0)).ok_or(NoNode::Busy)?;
        Ok(NodeChoice { node: Arc::clone(&member.node), limit: self.0, is_stale: false })
    }

    fn past_caches(&self, _: &Snapshot, _: LbContext, _: &[u64], _: &Node) -> PastCaches {
        PastCaches::Refuse
    }
}

fn frontend(role: Role, limit: u32, max_queue: usize) -> Frontend {
    Frontend {
        role,
        drains_at: Stage::Draining,
        is_public: false,
        trust: Trust::VarnishNodes,
        accepts_proxy_header: false,
        offload_header: None,
        purge_methods: Arc::default(),
        gate: None,
        error_pages: Arc::<ErrorPages>::default(),
        own_answer: Arc::new(|_| None),
        leave_notice: None,
        notes_latency: false,
        select: Arc::new(FirstWithRoom(NonZeroU32::new(limit))),
        terms: RequestTerms { max_queue, ..Origin::default().request_terms() },
        store: None,
        freshness: None,
    }
}

fn rules(limit: u32, max_queue: usize) -> TrafficRules {
    TrafficRules {
        edge: frontend(Role::Varnish, limit, max_queue),
        origin: frontend(Role::Web, limit, max_queue),
        limits: Limits::default(),
        failing: FailureStatuses::new(&HealthChecks::default()),
        timeouts: crate::config::Timeouts::default(),
        access: None,
    }
}

/// Web nodes of which each keeps what it has.
fn nodes(count: u64) -> Vec<Arc<Node>> {
    let node = |number: u64| {
        let id = NodeId::try_from(format!("n{number}")).unwrap();
        let spec = NodeSpec::new(Role::Web, id, ([127, 0, 0, 1], 80).into());
        Arc::new(Node::new(spec, Arc::new(Live::default()), number))
    };
    (0..count).map(node).collect()
}

fn fleet_of(nodes: &[Arc<Node>]) -> Snapshot {
    let member = |node: &Arc<Node>| Member {
        node: Arc::clone(node),
        health: Health::Up,
        fault: None,
        ejection: None,
        retained: false,
        usable: false,
    };
    Snapshot { web: Pool::new(nodes.iter().map(member).collect(), 0.0, None), ..Snapshot::default() }
}

fn queue(nodes: &[Arc<Node>], limit: u32, max_queue: usize) -> Arc<RequestQueue> {
    let (fleet, rules) = (ArcSwap::from_pointee(fleet_of(nodes)), ArcSwap::from_pointee(rules(limit, max_queue)));
    Arc::new(RequestQueue::new(Arc::new(fleet), Arc::new(rules), Arc::new(Metrics::new().unwrap())))
}

impl RequestQueue {
    /// A place that is free for a request of this listener that comes now.
    fn at_once(&self, role: Role) -> Option<Arc<Node>> {
        self.elsewhere_at_once(role, &[])
    }

    fn elsewhere_at_once(&self, role: Role, tried: &[u64]) -> Option<Arc<Node>> {
        let rules = self.rules.load();
        self.take(&*rules.frontend(role).select, &self.fleet.load(), LbContext::default(), tried).ok()
    }

    fn joined(self: &Arc<Self>, role: Role, tried: &[u64]) -> QueueTicket {
        self.join(role, tried, LbContext::default()).unwrap()
    }
}

impl QueueTicket {
    fn place(&mut self) -> Option<Arc<Node>> {
        match self.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(node) => Some(node),
            Poll::Pending => None,
        }
    }
}

#[test]
fn who_waits_is_served_in_order_over_both_listeners_and_before_who_comes() {
    let nodes = nodes(1);
    let queue = queue(&nodes, 1, 10);
    let first = queue.at_once(Role::Web).unwrap();
    assert!(queue.at_once(Role::Web).is_none());
    let mut waiting = [Role::Varnish, Role::Web, Role::Varnish].map(|role| queue.joined(role, &[]));
    let length = |role| queue.metrics.queue.length(role).get();
    assert_eq!((length(Role::Varnish), length(Role::Web)), (2, 1));
    queue.end_request(&first);
    for turn in 0..3 {
        let places = waiting.each_mut().map(|ticket| ticket.place().is_some());
        assert_eq!(places, std::array::from_fn(|number| number == turn), "turn {turn}");
        assert!(queue.at_once(Role::Web).is_none(), "nobody passes by who waits");
        assert_eq!(nodes[0].live.inflight(), 1);
        queue.end_request(&nodes[0]);
    }
    assert_eq!((length(Role::Varnish), length(Role::Web), queue.has_waiters()), (0, 0, false));
    assert!(queue.at_once(Role::Varnish).is_some());
}

#[test]
fn who_leaves_before_or_after_his_turn_leaves_the_place_to_the_next() {
    let nodes = nodes(1);
    let queue = queue(&nodes, 1, 10);
    _ = queue.at_once(Role::Web);
    let [a, b, c, d] = [(); 4].map(|()| queue.joined(Role::Web, &[]));
    drop(b);
    queue.end_request(&nodes[0]);
    // Its place was sent, and it has not looked.
    drop(a);
    drop(d);
    let mut c = c;
    assert!(c.place().is_some() && !queue.has_waiters());
    assert_eq!(nodes[0].live.inflight(), 1);
}

#[test]
fn each_listener_has_a_queue_of_its_own_length() {
    let nodes = nodes(1);
    let queue = queue(&nodes, 1, 2);
    _ = queue.at_once(Role::Web);
    let of_origin = [(); 2].map(|()| queue.joined(Role::Web, &[]));
    assert_eq!(queue.join(Role::Web, &[], LbContext::default()).err(), Some(QueueFull));
    let of_edge = queue.joined(Role::Varnish, &[]);
    drop(of_origin);
    let again = queue.joined(Role::Web, &[]);
    let length = |role| queue.metrics.queue.length(role).get();
    assert_eq!((length(Role::Varnish), length(Role::Web)), (1, 1));
    drop((of_edge, again));
    assert!(!queue.has_waiters());
}

#[test]
fn the_first_who_waits_is_said_and_the_first_who_is_refused_at_once() {
    let mut report = QueueReport::default();
    let counts = |report: Option<QueueReport>| report.map(|report| (report.waited, report.refused));
    assert_eq!(counts(report.note(false)), Some((1, 0)));
    assert_eq!(counts(report.note(false)), None);
    assert_eq!(counts(report.note(true)), Some((1, 1)));
    assert_eq!((counts(report.note(true)), counts(report.note(false))), (None, None));
}

#[test]
fn a_full_queue_refuses_nobody_for_whom_there_is_room() {
    let nodes = nodes(2);
    let queue = queue(&nodes, 1, 1);
    let _both = [queue.at_once(Role::Web).unwrap(), queue.at_once(Role::Web).unwrap()];
    let mut not_the_first = queue.joined(Role::Web, &[0]);
    assert_eq!(queue.join(Role::Web, &[], LbContext::default()).err(), Some(QueueFull));
    queue.end_request(&nodes[0]);
    assert_eq!(queue.joined(Role::Web, &[]).place().map(|node| node.endpoint_id), Some(0));
    assert!(not_the_first.place().is_none() && queue.has_waiters());
    queue.end_request(&nodes[1]);
    assert!(not_the_first.place().is_some() && !queue.has_waiters());
}

#[test]
fn who_must_go_elsewhere_waits_for_no_place_that_is_not_for_him() {
    let nodes = nodes(2);
    let queue = queue(&nodes, 1, 10);
    let _both = [queue.at_once(Role::Web).unwrap(), queue.at_once(Role::Web).unwrap()];
    let (mut not_the_first, mut any) = (queue.joined(Role::Web, &[0]), queue.joined(Role::Web, &[]));
    queue.end_request(&nodes[0]);
    assert_eq!((not_the_first.place().is_some(), any.place().map(|node| node.endpoint_id)), (false, Some(0)));
    let mut behind = queue.joined(Role::Web, &[]);
    queue.end_request(&nodes[1]);
    assert_eq!((not_the_first.place().map(|node| node.endpoint_id), behind.place().is_some()), (Some(1), false));
}

#[test]
fn a_raised_limit_none_and_a_node_that_joins_serve_who_waits() {
    let nodes = nodes(2);
    let queue = queue(&nodes[..1], 1, 10);
    _ = queue.at_once(Role::Web);
    let mut waiting = [(); 4].map(|()| queue.joined(Role::Web, &[]));
    let mut served = || waiting.iter_mut().filter_map(QueueTicket::place).count();
    queue.rules.store(Arc::new(rules(2, 10)));
    queue.serve();
    assert_eq!(served(), 1);
    queue.fleet.store(Arc::new(fleet_of(&nodes)));
    queue.serve();
    assert_eq!(served(), 2);
    queue.rules.store(Arc::new(rules(0, 10)));
    queue.serve();
    assert_eq!((served(), queue.has_waiters()), (1, false));
}

/// Wakes a thread.
struct Unparks(Thread);

impl Wake for Unparks {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for the place.
fn wait_for(mut ticket: QueueTicket, began: Instant) -> Arc<Node> {
    let waker = Waker::from(Arc::new(Unparks(std::thread::current())));
    loop {
        if let Poll::Ready(node) = ticket.poll(&mut Context::from_waker(&waker)) {
            return node;
        }
        assert!(began.elapsed() < Duration::from_secs(120), "nobody ever served this one");
        std::thread::park_timeout(Duration::from_secs(1));
    }
}

const THREADS: usize = 8;
const REQUESTS: usize = 4_000;
const CHANGES: usize = 100;
const MOST: u32 = 3;

/// What one thread does: requests that are served at once, wait, or leave while they wait.
fn worker(queue: &Arc<RequestQueue>, held: &[AtomicU32], number: usize, began: Instant) -> (usize, usize) {
    let (mut waited, mut left) = (0, 0);
    let mut random = fastrand::Rng::with_seed(number as u64);
    for _ in 0..REQUESTS {
        let role = if random.bool() { Role::Web } else { Role::Varnish };
        let tried: &[u64] = if random.u8(..) < 60 { &[1] } else { &[] };
        let node = match queue.elsewhere_at_once(role, tried) {
            Some(node) => node,
            None => {
                let mut ticket = queue.joined(role, tried);
                if random.u8(..) < 60 {
                    // It leaves, perhaps just as its place comes.
                    (0..random.u8(..3)).for_each(|_| std::thread::yield_now());
                    if let Some(node) = ticket.place() {
                        queue.end_request(&node);
                    }
                    left += 1;
                    continue;
                }
                waited += 1;
                wait_for(ticket, began)
            }
        };
        let at = node.endpoint_id as usize;
        let here = held[at].fetch_add(1, Ordering::SeqCst) + 1;
        assert!(here <= MOST, "{here} requests at a node");
        (0..random.u8(..4)).for_each(|_| std::thread::yield_now());
        held[at].fetch_sub(1, Ordering::SeqCst);
        queue.end_request(&node);
    }
    (waited, left)
}

#[test]
fn threads_that_take_wait_and_leave_exceed_no_limit_and_lose_no_wake_up() {
    let nodes = nodes(3);
    let queue = queue(&nodes, 1, THREADS);
    let held: Vec<AtomicU32> = nodes.iter().map(|_| AtomicU32::new(0)).collect();
    let (began, start) = (Instant::now(), Barrier::new(THREADS));
    let counts: Vec<(usize, usize)> = std::thread::scope(|scope| {
        let start = &start;
        let (queue, held) = (&queue, &held);
        let workers: Vec<_> = (0..THREADS)
            .map(|number| {
                scope.spawn(move || {
                    start.wait();
                    worker(queue, held, number, began)
                })
            })
            .collect();
        // At first limits and nodes change. Later nobody serves who does not end a request, so nothing makes up for a lost wake-up.
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..CHANGES {
            queue.rules.store(Arc::new(rules(random.u32(1..=MOST), THREADS)));
            let without = random.usize(0..3);
            let some: Vec<_> =
                nodes.iter().enumerate().filter(|(at, _)| *at != without).map(|(_, node)| node.clone()).collect();
            queue.fleet.store(Arc::new(fleet_of(&some)));
            queue.serve();
            std::thread::sleep(Duration::from_micros(200));
        }
        queue.rules.store(Arc::new(rules(1, THREADS)));
        queue.fleet.store(Arc::new(fleet_of(&nodes)));
        queue.serve();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let (waited, left) = counts.iter().fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1));
    println!("{waited} waited and {left} left in {:?}", began.elapsed());
    assert!(waited > 100 && left > 100, "it shows little: {waited} waited, {left} left");
    assert!(nodes.iter().all(|node| node.live.inflight() == 0) && !queue.has_waiters());
    assert_eq!([Role::Web, Role::Varnish].map(|role| queue.metrics.queue.length(role).get()), [0, 0]);
}

/// Finds no room, and then lets a request end elsewhere before whoever asked is told.
struct EndsMeanwhile {
    first: FirstWithRoom,
    ends: Mutex<Option<std::sync::mpsc::Sender<()>>>,
}

impl Select for EndsMeanwhile {
    fn request_hash(&self, _: &RequestHead) -> u64 {
        0
    }

    fn pick(&self, fleet: &Snapshot, lb: LbContext, tried: &[u64]) -> Result<NodeChoice, NoNode> {
        let found = self.first.pick(fleet, lb, tried);
        if let Some(ends) = self.ends.lock().take() {
            assert!(found.is_err());
            ends.send(()).unwrap();
            let live = &fleet.web.members()[0].node.live;
            while live.inflight() > 0 {
                std::thread::yield_now();
            }
        }
        found
    }

    fn past_caches(&self, _: &Snapshot, _: LbContext, _: &[u64], _: &Node) -> PastCaches {
        PastCaches::Refuse
    }
}

#[test]
fn an_end_after_the_last_look_of_one_that_joins_is_not_missed() {
    let nodes = nodes(1);
    let queue = queue(&nodes, 1, 2);
    let held = queue.at_once(Role::Web).unwrap();
    let (ends, ended) = std::sync::mpsc::channel();
    let select = EndsMeanwhile { first: FirstWithRoom(NonZeroU32::new(1)), ends: Mutex::new(Some(ends)) };
    let origin = Frontend { select: Arc::new(select), ..frontend(Role::Web, 1, 2) };
    queue.rules.store(Arc::new(TrafficRules { origin, ..rules(1, 2) }));
    let mut ticket = std::thread::scope(|scope| {
        let (queue, held) = (&queue, &held);
        scope.spawn(move || {
            ended.recv().unwrap();
            queue.end_request(held);
        });
        queue.joined(Role::Web, &[])
    });
    assert!(ticket.place().is_some(), "it waits, and the node is free");
}
