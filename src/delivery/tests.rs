//! Deliveries to scripted nodes: fakes that accept every purge, and record it with its time.

mod blame;
mod gaps;
mod lazy;
mod reliance;

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::keep_up::ARRIVAL_GRAINS;
use super::*;
use crate::config::HealthChecks;
use crate::fleet::{FILL_LATENCY, FaultKind, Live, Member, NodeFault, NodeSpec, Pool, Role, VarnishSettings};
use crate::journal::{Limits, Memory};
use crate::purge::{Forward, Page, Passage, Purge, SocketPair, Target};

/// The timeout of waits that must succeed.
const PATIENCE: Duration = Duration::from_secs(20);

/// A start of the process that leaves room for a past.
fn long_ago() -> Instant {
    Instant::now() - Duration::from_secs(60)
}

/// The requests to a scripted node, in order.
type Told = Arc<Mutex<Vec<(Instant, String)>>>;

/// A node that answers 200 to every request, after the pause with the request's number, or at once if there is none.
async fn obedient(pauses: &'static [u64]) -> (SocketAddr, Told) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let told = Told::default();
    let of_listener = Arc::clone(&told);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let told = Arc::clone(&of_listener);
            tokio::spawn(async move {
                let mut input = Vec::new();
                while stream.read_buf(&mut input).await.is_ok_and(|read| read > 0) {
                    while let Some(end) = input.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                        let head = String::from_utf8(input.drain(..end + 4).collect()).unwrap();
                        let number = {
                            let mut told = told.lock();
                            told.push((Instant::now(), head));
                            told.len() - 1
                        };
                        tokio::time::sleep(Duration::from_millis(pauses.get(number).copied().unwrap_or(0))).await;
                        stream.write_all(b"HTTP/1.1 200 Purged\r\nContent-Length: 0\r\n\r\n").await.unwrap();
                    }
                }
            });
        }
    });
    (address, told)
}

/// Deliveries to one node, `varnish-1`.
struct Rig {
    deliveries: Arc<Deliveries>,
    guard: Arc<Guard>,
    node: Arc<Node>,
    told: Told,
}

const CALM: Pace = Pace { max_bans_per_second: None, longest_wait: Duration::from_millis(250), redelivery_delay: None };

impl Rig {
    async fn new(pace: Pace) -> Self {
        let guard = Arc::new(Guard::new(long_ago()));
        let journal = Arc::new(Memory::new(Limits::default(), noted_by(&guard)));
        Rig::with(pace, journal, guard, None).await
    }

    async fn with(pace: Pace, journal: Arc<dyn Journal>, guard: Arc<Guard>, epoch: Option<&str>) -> Self {
        Rig::to(obedient(&[]).await, pace, journal, guard, epoch).await
    }

    async fn to(
        node: (SocketAddr, Told),
        pace: Pace,
        journal: Arc<dyn Journal>,
        guard: Arc<Guard>,
        epoch: Option<&str>,
    ) -> Self {
        Rig::of(node, pace, journal, (guard, None), epoch)
    }

    fn of(
        (address, told): (SocketAddr, Told),
        pace: Pace,
        journal: Arc<dyn Journal>,
        (guard, sealed): (Arc<Guard>, Option<Arc<SealedPurges>>),
        epoch: Option<&str>,
    ) -> Self {
        let id = NodeId::try_from("varnish-1").unwrap();
        let settings = VarnishSettings { epoch: epoch.map(Arc::from), ..VarnishSettings::default() };
        let spec = NodeSpec { varnish: Some(settings.clone()), ..NodeSpec::new(Role::Varnish, id, address) };
        let node = Arc::new(Node::new(spec, Arc::new(Live::default()), 1));
        let member = Member {
            node: Arc::clone(&node),
            health: Health::Up,
            fault: None,
            ejection: None,
            retained: false,
            usable: true,
        };
        let fleet = Snapshot { version: 1, varnish: Pool::new(vec![member], 0.0, None), web: Pool::default() };
        let context = DeliveryContext {
            fence: Arc::new(Fence::at(journal.head())),
            journal,
            fleet: Arc::new(ArcSwap::from_pointee(fleet)),
            guard: Arc::clone(&guard),
            metrics: Arc::new(Metrics::new().unwrap()),
            tracer: None,
            slow_start: Arc::new(SlowStart::new(&HealthChecks::default())),
            pace,
            sealed,
            has_trials: true,
            started: long_ago(),
        };
        let deliveries = Arc::new(Deliveries::new(context));
        deliveries.start(&node, &settings);
        Rig { deliveries, guard, node, told }
    }

    /// Appends a purge, and waits until the node has it.
    async fn purge(&self, tag: &str) -> Position {
        let position = self.append(tag).await;
        self.until_at(position).await;
        position
    }

    async fn until_at(&self, position: Position) {
        let there = self.deliveries.progress.until(|| self.node.live.cursor() >= position);
        tokio::time::timeout(PATIENCE, there).await.unwrap();
    }

    async fn append(&self, tag: &str) -> Position {
        let purge = Purge { targets: vec![Target::Tags([tag].into_iter().collect())], soft: false };
        self.deliveries.context.journal.append(purge).await.unwrap()
    }

    /// Records that a page with this tag passed the origin this long ago.
    fn passed(&self, tag: &str, ago_ms: u64) {
        let fields = [(&b"X-Magento-Tags"[..], tag.as_bytes())];
        let page = Page { status: 200, target: b"/", fields: fields.into_iter() };
        let at = Instant::now() - Duration::from_millis(ago_ms);
        assert!(self.guard.may_be_stored(self.guard.now(), &page, at));
    }

    /// A page with this tag begins to pass to the node.
    fn begin_page(&self, tag: &str) -> Passage {
        let theirs = SocketAddr::new(self.node.spec.address.ip(), 1000);
        let passage = self.guard.connected(SocketPair { ours: "127.0.0.1:80".parse().unwrap(), theirs });
        let fields = [(&b"X-Magento-Tags"[..], tag.as_bytes())];
        let page = Page { status: 200, target: b"/", fields: fields.into_iter() };
        assert!(passage.may_be_stored(self.guard.now(), &page, Instant::now()));
        passage
    }

    /// Records that the node answered requests at these times without delay.
    fn ran(&self, ago_ms: &[u64]) {
        for ago in ago_ms {
            let asked = Instant::now() - Duration::from_millis(*ago);
            self.deliveries.record_health_check(&self.node, asked, Duration::from_millis(1));
        }
    }

    /// The times at which the node received this.
    fn told(&self, what: &str) -> Vec<Instant> {
        self.told.lock().iter().filter(|(_, head)| head.contains(what)).map(|(at, _)| *at).collect()
    }

    /// Waits until the node has received this so many times.
    async fn until_told(&self, what: &str, times: usize) -> Vec<Instant> {
        let told = async {
            while self.told(what).len() < times {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(PATIENCE, told).await.unwrap();
        self.told(what)
    }
}

#[tokio::test]
async fn a_node_that_runs_is_told_once() {
    let rig = Rig::new(CALM).await;
    rig.ran(&[400, 200]);
    rig.purge("a").await;
    rig.purge("b").await;
    assert_eq!((rig.told(",)a(").len(), rig.told(",)b(").len()), (1, 1));
}

#[tokio::test]
async fn a_purge_of_a_page_that_has_just_passed_is_told_again_before_it_counts() {
    let rig = Rig::new(CALM).await;
    rig.ran(&[400, 200]);
    rig.passed("a", 0);
    rig.purge("a").await;
    let told = rig.told(",)a(");
    assert_eq!(told.len(), 2);
    assert!(told[1] - told[0] >= Duration::from_millis(90), "{:?}", told[1] - told[0]);
    rig.purge("b").await;
    assert_eq!(rig.told(",)b(").len(), 1);
}

#[tokio::test]
async fn a_page_that_passed_well_before_the_node_was_seen_to_run_has_landed() {
    let rig = Rig::new(CALM).await;
    rig.ran(&[400, 200]);
    rig.passed("landed", 500);
    rig.purge("landed").await;
    assert_eq!(rig.told("landed").len(), 1);
}

#[tokio::test]
async fn a_page_that_passed_while_the_node_may_have_stood_still_has_not() {
    let rig = Rig::new(CALM).await;
    // It was stopped after the second answer, and has just resumed.
    rig.ran(&[5000, 4800, 1]);
    rig.passed("waiting", 3000);
    rig.purge("waiting").await;
    assert_eq!(rig.told("waiting").len(), 2);
}

#[tokio::test]
async fn a_node_that_stood_still_is_told_until_it_runs() {
    let guard = Arc::new(Guard::new(long_ago()));
    let journal = Arc::new(Memory::new(Limits::default(), noted_by(&guard)));
    let slow_twice = obedient(&[150, 150]).await;
    let rig = Rig::to(slow_twice, CALM, journal, guard, None).await;
    rig.ran(&[400, 200]);
    rig.purge("a").await;
    assert_eq!(rig.told(",)a(").len(), 3);
}

#[tokio::test]
async fn a_node_far_away_is_current_after_its_round_trips() {
    const FAR: [u64; 64] = [110; 64];
    let guard = Arc::new(Guard::new(long_ago()));
    let journal = Arc::new(Memory::new(Limits::default(), noted_by(&guard)));
    let rig = Rig::to(obedient(&FAR).await, CALM, journal, guard, None).await;
    for number in 0..3 {
        rig.purge(&format!("tag_{number}_end")).await;
    }
    // Its cursor is unknown at the first purge, and pages before it may be in flight.
    let told = rig.told.lock().len();
    assert!(told <= 8, "{told} times");
}

#[tokio::test]
async fn what_passed_before_the_process_began_may_be_on_its_way_too() {
    let rig = Rig::new(CALM).await;
    rig.purge("a").await;
    assert_eq!(rig.told(",)a(").len(), 2);
}

#[tokio::test]
async fn purges_above_the_budget_gather_and_none_is_lost() {
    let rig = Rig::new(Pace { max_bans_per_second: NonZeroU32::new(10), ..CALM }).await;
    rig.ran(&[400, 200]);
    let began = Instant::now();
    for number in 0..400 {
        rig.append(&format!("tag_{number}_end")).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    rig.purge("last").await;
    let seconds = began.elapsed().as_secs_f64();
    let bans = rig.told.lock().len();
    assert!(bans as f64 <= 10.0 + 10.0 * seconds + 2.0, "{bans} bans in {seconds} s");
    assert!(bans >= 5, "only {bans} bans");
    let heads: String = rig.told.lock().iter().map(|(_, head)| head.as_str()).collect();
    let everything = pcre2::bytes::Regex::new("X-Magento-Tags-Pattern: (.*)\r\n").unwrap();
    let bans: Vec<_> = everything
        .captures_iter(heads.as_bytes())
        .map(|ban| String::from_utf8(ban.unwrap()[1].to_vec()).unwrap())
        .map(|ban| pcre2::bytes::Regex::new(&ban).unwrap())
        .collect();
    for number in 0..400 {
        let page = format!("tag_{number}_end,x");
        assert!(bans.iter().any(|ban| ban.is_match(page.as_bytes()).unwrap()), "{page}");
    }
}

#[tokio::test]
async fn another_ration_holds_for_the_next_purge() {
    let longest_wait = Duration::from_secs(600);
    let rig = Rig::new(Pace { max_bans_per_second: NonZeroU32::new(1), longest_wait, ..CALM }).await;
    rig.ran(&[400, 200]);
    rig.purge("spends_the_bucket").await;
    let wanted = crate::config::PurgeListener { max_bans_per_second: 0, ..Default::default() };
    rig.deliveries.configure(&wanted);
    rig.purge("may_have_waited").await;
    let began = Instant::now();
    for number in 0..60 {
        rig.purge(&format!("tag_{number}_end")).await;
    }
    assert!(began.elapsed() < Duration::from_secs(30), "one a second would take a minute");
}

#[tokio::test]
async fn a_purge_that_is_waited_for_alone_does_not_wait_for_the_ration() {
    let longest_wait = Duration::from_secs(600);
    let rig = Rig::new(Pace { max_bans_per_second: NonZeroU32::new(1), longest_wait, ..CALM }).await;
    rig.ran(&[400, 200]);
    let one_after_the_other = async {
        for number in 0..60 {
            let _expected = rig.deliveries.expect();
            rig.purge(&format!("tag_{number}_end")).await;
        }
    };
    tokio::time::timeout(PATIENCE, one_after_the_other).await.expect("a purge a second would take a minute");
}

#[tokio::test]
async fn the_last_varnish_is_sought_among_those_known_and_held() {
    let guard = Arc::new(Guard::new(long_ago()));
    let limits = Limits { max_entries: 4, ..Limits::default() };
    let journal: Arc<dyn Journal> = Arc::new(Memory::new(limits, noted_by(&guard)));
    for _ in 0..10 {
        journal.append(Purge::everything()).await.unwrap();
    }
    let (floor, head) = (journal.floor(), journal.head());
    assert!(floor > 0);
    // It is flushed before it serves, so it needs no earlier purge.
    let unknown = Rig::to(obedient(&[3_600_000; 8]).await, CALM, Arc::clone(&journal), guard, None).await;
    assert_eq!(unknown.deliveries.least_cursor(), head);
    // A node that was away for longer than the journal holds.
    let away = (NodeId::try_from("away").unwrap(), Cursor::at(1));
    journal.save_cursors(vec![away]).await.unwrap();
    assert_eq!(unknown.deliveries.least_cursor(), floor);
}

#[tokio::test]
async fn a_page_that_arrives_between_two_looks_is_stored_when_purged_again() {
    let rig = Rig::new(CALM).await;
    rig.ran(&[400, 200]);
    let passage = rig.begin_page("a");
    rig.append("a").await;
    let first = rig.until_told(",)a(", 1).await[0];
    // Seen under way when the bans had been sent, and never again.
    tokio::time::sleep(Duration::from_millis(3)).await;
    passage.taken(Instant::now());
    let again = rig.until_told(",)a(", 2).await[1];
    assert!(again - first >= FILL_LATENCY, "{:?}", again - first);
}

#[tokio::test]
async fn a_node_gets_on_in_a_storm_though_a_page_is_always_on_its_way() {
    let rig = Rig::new(CALM).await;
    rig.ran(&[400, 200]);
    let mut under_way = VecDeque::new();
    let began = Instant::now();
    while rig.node.live.cursor() == 0 {
        assert!(began.elapsed() < Duration::from_secs(5), "no purge of the storm counts");
        let passage = rig.begin_page("a");
        under_way.push_back(passage);
        // Each takes the time of a few purges to arrive.
        if under_way.len() > 20 {
            let arrived: Passage = under_way.pop_front().unwrap();
            arrived.taken(Instant::now());
        }
        rig.append("a").await;
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}

#[tokio::test]
async fn a_page_for_anothers_address_may_be_ours_until_ours_is_known() {
    let rig = Rig::new(CALM).await;
    rig.ran(&[400, 200]);
    let ours = rig.node.spec.address.ip();
    let theirs = "127.0.0.2".parse().unwrap();
    let other = NodeSpec::new(Role::Varnish, NodeId::try_from("varnish-2").unwrap(), (theirs, 80).into());
    let other = Arc::new(Node::new(other, Arc::default(), 2));
    let member =
        |node| Member { node, health: Health::Down, fault: None, ejection: None, retained: false, usable: false };
    let varnish = Pool::new(vec![member(Arc::clone(&rig.node)), member(other)], 0.0, None);
    rig.deliveries.context.fleet.store(Arc::new(Snapshot { version: 2, varnish, web: Pool::default() }));
    let pass = |to: IpAddr| {
        let passage =
            rig.guard.connected(crate::purge::SocketPair { ours: (ours, 80).into(), theirs: (to, 1000).into() });
        let page = Page { status: 200, target: b"/", fields: [(&b"X-Magento-Tags"[..], &b"a"[..])].into_iter() };
        assert!(passage.may_be_stored(rig.guard.now(), &page, Instant::now()));
        passage
    };
    let _under_way = pass(theirs);
    let position = rig.append("a").await;
    rig.until_told(",)a(", 1).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(rig.node.live.cursor() < position);
    pass(ours).taken(Instant::now());
    rig.purge("b").await;
}

#[tokio::test]
async fn a_hold_outlives_a_new_registration_and_then_the_node_is_told_again() {
    let rig = Rig::new(CALM).await;
    rig.ran(&[400, 200]);
    let position = rig.purge("a").await;
    let hold = rig.deliveries.hold(position, rig.node.id(), "a page".into()).unwrap();
    assert!(rig.node.live.cursor() < position);
    let waits = NodeFault::new(FaultKind::PageUnderWay, "a page");
    assert_eq!(rig.deliveries.fault(rig.node.id()), Some(waits));
    // For example, its headers were changed.
    rig.deliveries.context.journal.save_cursors(vec![(rig.node.id().clone(), Cursor::at(position))]).await.unwrap();
    rig.deliveries.stop(rig.node.id());
    let node = Arc::new(Node::new(rig.node.spec.clone(), Arc::default(), 2));
    rig.deliveries.start(&node, &VarnishSettings::default());
    assert_eq!((node.live.acknowledged(), node.live.cursor()), (position, position - 1));
    let told = rig.told(",)a(").len();
    drop(hold);
    rig.until_told(",)a(", told + 1).await;
    let counts = async {
        while node.live.cursor() < position {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, counts).await.unwrap();
    rig.deliveries.stop(rig.node.id());
    assert!(rig.deliveries.left.is_empty());
}

#[tokio::test]
async fn no_purge_waits_for_a_node_that_is_held_back_before_it() {
    let rig = Rig::new(CALM).await;
    rig.ran(&[400, 200]);
    let held = rig.purge("a").await;
    let _hold = rig.deliveries.hold(held, rig.node.id(), "a page".into());
    let next = rig.append("b").await;
    let reached = tokio::time::timeout(PATIENCE / 4, rig.deliveries.reached(next, PATIENCE)).await.expect("at once");
    assert_eq!(reached, (vec![], vec![rig.node.id().clone()]));
    // Purges before it count.
    assert_eq!(rig.deliveries.reached(held - 1, PATIENCE).await.0, [rig.node.id().clone()]);
}

#[tokio::test]
async fn what_settles_is_told_once_more_after_its_answer() {
    let settle = Duration::from_millis(400);
    let rig = Rig::new(Pace { redelivery_delay: Some(settle), ..CALM }).await;
    rig.ran(&[400, 200]);
    rig.purge("first").await;
    rig.purge("second").await;
    assert_eq!((rig.told("first").len(), rig.told("second").len()), (1, 1));
    let first = rig.until_told("first", 2).await;
    assert!(first[1] - first[0] >= settle, "{:?}", first[1] - first[0]);
    rig.until_told("second", 2).await;
}

#[tokio::test]
async fn what_was_not_settled_when_the_process_ended_is_settled_by_the_next() {
    let rig = Rig::new(CALM).await;
    let position = rig.purge("a").await;
    let (journal, guard) = (Arc::clone(&rig.deliveries.context.journal), Arc::clone(&rig.guard));
    journal.save_cursors(rig.deliveries.cursors()).await.unwrap();
    let next =
        Rig::with(Pace { redelivery_delay: Some(Duration::from_millis(500)), ..CALM }, journal, guard, None).await;
    assert_eq!(next.node.live.cursor(), position);
    next.until_told(",)a(", 1).await;
}

#[tokio::test]
async fn a_cache_is_replayed_from_its_cursor_and_a_new_one_from_the_start() {
    let guard = Arc::new(Guard::new(long_ago()));
    let journal: Arc<dyn Journal> = Arc::new(Memory::new(Limits::default(), noted_by(&guard)));
    let rig = Rig::with(CALM, Arc::clone(&journal), Arc::clone(&guard), Some("1700000000")).await;
    rig.purge("before").await;
    journal.save_cursors(rig.deliveries.cursors()).await.unwrap();
    rig.deliveries.stop(rig.node.id());
    let missed = rig.append("missed").await;

    let back = Rig::with(CALM, Arc::clone(&journal), Arc::clone(&guard), Some("1700000000")).await;
    assert!(back.node.live.cursor() < missed);
    back.until_told("missed", 1).await;
    assert!(back.told("before").is_empty());
    back.deliveries.stop(back.node.id());

    // It is unknown since when it stores pages, and which purges the cache before it received since then.
    let reborn = Rig::with(CALM, Arc::clone(&journal), Arc::clone(&guard), Some("1700000999")).await;
    assert_eq!(reborn.node.live.cursor(), 0);
    reborn.purge("after").await;
    assert!(!reborn.told("before").is_empty() && !reborn.told("missed").is_empty());
    assert!(reborn.told("Flush").is_empty());
}

#[tokio::test]
async fn a_node_that_nobody_knows_drops_everything_first() {
    let guard = Arc::new(Guard::new(long_ago()));
    let journal: Arc<dyn Journal> = Arc::new(Memory::new(Limits::default(), noted_by(&guard)));
    journal.append(Purge::everything()).await.unwrap();
    let rig = Rig::with(CALM, journal, guard, Some("1700000000")).await;
    rig.until_told("X-Clearcoat-Flush: all", 1).await;
    rig.purge("a").await;
    assert_eq!(
        rig.deliveries.context.metrics.node(Role::Varnish, rig.node.id()).varnish.as_ref().unwrap().flushed.get(),
        1
    );
}

#[tokio::test]
async fn a_hundred_thousand_missed_purges_are_a_few_requests() {
    let guard = Arc::new(Guard::new(long_ago()));
    let journal: Arc<dyn Journal> = Arc::new(Memory::new(Limits::default(), noted_by(&guard)));
    let id = NodeId::try_from("varnish-1").unwrap();
    journal.save_cursors(vec![(id, Cursor::at(0))]).await.unwrap();
    for number in 0..100_000 {
        // The catalogue of a shop, several times over.
        let tag = format!("cat_p_{}", number % 20_000);
        let purge = Purge { targets: vec![Target::Tags([tag.as_str()].into_iter().collect())], soft: false };
        journal.append(purge).await.unwrap();
    }
    let rig = Rig::with(CALM, journal, guard, None).await;
    rig.purge("last").await;
    let requests = rig.told.lock().len();
    assert!(requests <= 64, "{requests} requests");
}

/// A rig whose only node is up and accepts nothing, with a journal that dates every purge an hour back.
async fn deaf() -> Rig {
    let now_ms = AtomicU64::new(1_900_000_000_000);
    let guard = Arc::new(Guard::new(long_ago()));
    // Each reading of the clock is an hour later.
    let clock = Arc::new(move || now_ms.fetch_add(3_600_000, Ordering::SeqCst));
    let limits = Limits { retention: Duration::MAX, ..Limits::default() };
    let journal = Arc::new(Memory::with_clock(limits, noted_by(&guard), clock));
    Rig::to(obedient(&[3_600_000; 8]).await, CALM, journal, guard, None).await
}

/// The time from `began` until the fence reached `position`.
async fn fenced_after(rig: &Rig, position: Position, began: Instant) -> Duration {
    while rig.deliveries.context.fence.position() < position {
        assert!(began.elapsed() < PATIENCE, "not fenced");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    began.elapsed()
}

#[tokio::test]
async fn what_others_accept_fences_by_its_time_here_whatever_its_date() {
    let rig = deaf().await;
    let timeout = Duration::from_millis(400);
    let (answered, receiver) = watch::channel(0);
    let deliveries = Arc::clone(&rig.deliveries);
    let keeping = tokio::spawn(async move { deliveries.keep_up(timeout, receiver).await });
    let began = Instant::now();
    let first = rig.append("a").await;
    tokio::time::sleep(timeout / 2).await;
    // While the first one is still awaited: it must not have to wait twice. (Once the node is late, no purge waits for it.)
    let (second_began, second) = (Instant::now(), rig.append("b").await);
    let after = fenced_after(&rig, first, began).await;
    assert!(after >= timeout - timeout / ARRIVAL_GRAINS, "fenced after {after:?}");
    let after = fenced_after(&rig, second, second_began).await;
    assert!(after < timeout * 3 / 2, "fenced after {after:?}");
    // A purge that was answered before it arrived does not wait at all.
    let (began, third) = (Instant::now(), rig.append("c").await);
    answered.send_replace(third);
    let after = fenced_after(&rig, third, began).await;
    assert!(after < timeout * 3 / 4, "fenced after {after:?}");
    keeping.abort();
}

#[tokio::test]
async fn what_is_recalled_while_something_else_is_held_is_told_again_as_well() {
    let rig = Rig::new(CALM).await;
    let first = rig.purge("a").await;
    let hold = rig.deliveries.hold(first, rig.node.id(), "a page".into()).unwrap();
    let second = rig.append("b").await;
    while rig.node.live.acknowledged() < second {
        tokio::task::yield_now().await;
    }
    // Another replica has not delivered the second one to the node, so here it counts as missed.
    rig.deliveries.recall(second, &[rig.node.id().clone()]);
    drop(hold);
    while rig.node.live.cursor() < second {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(rig.told(",)b(").len() >= 2 && rig.told(",)a(").len() >= 2);
}

#[tokio::test]
async fn a_purge_that_fences_with_another_ones_time_counts_as_answered() {
    use crate::journal::{Named, NamedStore, PurgeMessage, Shared};
    let guard = Arc::new(Guard::new(long_ago()));
    let memory = Memory::new(Limits::default(), noted_by(&guard));
    let journal = Arc::new(Named::new(NamedStore::Memory(Box::new(memory))));
    let shared = Arc::clone(&journal) as Arc<dyn Journal>;
    // It never answers.
    let rig = Rig::to(obedient(&[3_600_000; 8]).await, CALM, shared, guard, None).await;
    let (_sender, answered) = watch::channel(0);
    let (deliveries, timeout) = (Arc::clone(&rig.deliveries), Duration::from_millis(800));
    let keeping = tokio::spawn(async move { deliveries.keep_up(timeout, answered).await });
    let forward = Forward { method: "PURGE".into(), target: "/a".into(), headers: vec![] };
    let url = Purge { targets: vec![Target::Forward(forward)], soft: false };
    let tags = Purge { targets: vec![Target::Tags(["a"].into_iter().collect())], soft: false };
    // The second one comes during the wait for the first, and so soon that both raise the fence together.
    for (name, purge) in [("a", tags), ("b", url)] {
        tokio::time::sleep(timeout / 40).await;
        journal.admit(vec![PurgeMessage { id: name.to_owned(), revision: None, at_ms: 1, purge }]).await.unwrap();
    }
    let last = journal.head();
    while !rig.deliveries.is_done(last) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(rig.deliveries.context.fence.position() >= last);
    keeping.abort();
}
