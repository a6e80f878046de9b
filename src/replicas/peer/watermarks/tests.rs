//! Holds for replicas that report their fill watermarks, and for one that is gone.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::*;
use crate::config::{HealthChecks, JournalKind};
use crate::delivery::{self, Deliveries, Pace};
use crate::fleet::{Fence, Live, Node, NodeSpec, Role, VarnishSettings};
use crate::journal::{Journal, Limits, Memory, Named, NamedStore, Position, PurgeMessage, Shared};
use crate::purge::{Guard, Page, Passage, Purge, SocketPair, Target};
use crate::replicas::message::{Confirmation, Message, PeerPosition, RedeliveryRequest};
use crate::replicas::peer::Start;
use crate::replicas::{self, FoundBy, Received, Record, under_way};
use crate::slow_start::SlowStart;
use crate::telemetry::Metrics;

fn id(id: &str) -> NodeId {
    NodeId::try_from(id).unwrap()
}

/// A position in its journal, in the known process.
fn at(peer: &Peer, position: Position) -> PeerPosition {
    PeerPosition { replica: peer.id.clone(), boot: peer.record.boot.clone(), position }
}

fn purge() -> Purge {
    Purge { targets: vec![Target::Tags(["a"].into_iter().collect())], soft: false }
}

/// A replica with one node, which counts as having acknowledged everything but accepts nothing.
struct Rig {
    replicas: Arc<Replicas>,
    guard: Arc<Guard>,
    live: Arc<Live>,
    _tasks: JoinSet<()>,
}

impl Rig {
    fn new() -> Self {
        let guard = Arc::new(Guard::new(Instant::now()));
        let journal = Arc::new(Named::new(NamedStore::Memory(Box::new(Memory::new(
            Limits::default(),
            delivery::noted_by(&guard),
        )))));
        let metrics = Arc::new(Metrics::new().unwrap());
        let deliveries = Arc::new(Deliveries::new(delivery::DeliveryContext {
            journal: Arc::clone(&journal) as Arc<dyn Journal>,
            fence: Arc::new(Fence::at(0)),
            fleet: Arc::default(),
            guard: Arc::clone(&guard),
            metrics: Arc::clone(&metrics),
            tracer: None,
            slow_start: Arc::new(SlowStart::new(&HealthChecks::default())),
            pace: Pace { max_bans_per_second: None, longest_wait: Duration::ZERO, redelivery_delay: None },
            sealed: None,
            has_trials: true,
            started: Instant::now(),
        }));
        let live = Arc::<Live>::default();
        let spec = NodeSpec::new(Role::Varnish, id("v"), "127.0.0.1:1".parse().unwrap());
        deliveries.start(&Arc::new(Node::new(spec, Arc::clone(&live), 1)), &VarnishSettings::default());
        live.set_cursor(1_000_000);
        let context = replicas::ReplicaContext {
            found_by: FoundBy::Addresses(Vec::new()),
            journal: Some(journal as Arc<dyn Shared>),
            deliveries,
            overrides: None,
            ack_timeout: Duration::from_millis(200),
            max_request: 1 << 20,
            token: None.into(),
            tracer: None,
            metrics,
            memory: None,
        };
        let mut tasks = JoinSet::new();
        let record = Record::new("127.0.0.1:1".to_owned(), JournalKind::Memory);
        let replicas = Replicas::start(context, id("c"), record, &mut tasks);
        Rig { replicas, guard, live, _tasks: tasks }
    }

    /// Another replica, at this address.
    fn knows(&self, name: &str, address: &str) -> Arc<Peer> {
        let record = Record::new(address.to_owned(), JournalKind::Memory);
        let peer = Arc::new(Peer::new(id(name), record, Start::After(0), true));
        self.replicas.peers.lock().insert(id(name), Arc::clone(&peer));
        peer
    }

    async fn receives(&self, purges: &[&str], again: Vec<RedeliveryRequest>) -> Confirmation {
        let told = |id: &&str| PurgeMessage { id: (*id).to_owned(), revision: None, at_ms: 1, purge: purge() };
        let purges = purges.iter().map(told).collect();
        let hello = self.replicas.hello(Duration::ZERO);
        let asks_about = vec![id("v")];
        let message = Message { from: id("a"), record: None, purges, again, asks_about, ..hello };
        match self.replicas.receive(message).await {
            Received::Confirmed(confirmation) => *confirmation,
            _ => panic!("not confirmed"),
        }
    }

    /// A page begins to pass to the node.
    fn page_passes(&self) -> Passage {
        let ends = SocketPair { ours: "127.0.0.1:80".parse().unwrap(), theirs: "127.0.0.1:1000".parse().unwrap() };
        let passage = self.guard.connected(ends);
        let fields = [(&b"X-Magento-Tags"[..], &b"a"[..])].into_iter();
        let page = Page { status: 200, target: b"/", fields };
        assert!(passage.may_be_stored(self.guard.now(), &page, Instant::now()));
        passage
    }

    /// Returns when the node is no longer held back for this replica. Since it accepts nothing, a redelivery is still
    /// pending.
    async fn released(&self, there: &Peer) {
        while is_held(there) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(self.live.cursor(), 0);
    }
}

fn is_held(there: &Peer) -> bool {
    there.under_way.nodes() == [id("v")]
}

/// A replica that answers every question with the watermark in `landed`, unless it is for another process, and counts the
/// questions. Returns its address.
async fn other(landed: Arc<Mutex<Position>>, asked: Arc<AtomicUsize>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (landed, asked) = (Arc::clone(&landed), Arc::clone(&asked));
            tokio::spawn(async move {
                let mut input = Vec::new();
                while stream.read_buf(&mut input).await.is_ok_and(|read| read > 0) {
                    let text = String::from_utf8_lossy(&input).into_owned();
                    if !text.contains("\"asks_about\":[\"v\"]") || !text.ends_with('}') {
                        continue;
                    }
                    input.clear();
                    if text.contains("\"to\":\"before\"") {
                        let misdirected = b"HTTP/1.1 421 Misdirected Request\r\nContent-Length: 2\r\n\r\n{}";
                        stream.write_all(misdirected).await.unwrap();
                        continue;
                    }
                    asked.fetch_add(1, Ordering::SeqCst);
                    let body = format!("{{\"landed\":{{\"v\":{}}}}}", *landed.lock());
                    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
                    stream.write_all((head + &body).as_bytes()).await.unwrap();
                }
            });
        }
    });
    address
}

fn again(name: &str, peer: &Peer, position: Position) -> RedeliveryRequest {
    let place = PeerPosition { replica: peer.id.clone(), boot: peer.record.boot.clone(), position };
    RedeliveryRequest { id: name.to_owned(), nodes: vec![id("v")], under_way_at: Some(place) }
}

#[tokio::test]
async fn who_is_told_of_a_page_elsewhere_holds_its_node_and_asks_for_itself() {
    let rig = Rig::new();
    let (landed, asked) = (Arc::new(Mutex::new(6)), Arc::<AtomicUsize>::default());
    let there = rig.knows("b", &other(Arc::clone(&landed), Arc::clone(&asked)).await);
    let asking = tokio::spawn(ask(Arc::clone(&rig.replicas), Arc::clone(&there)));
    rig.receives(&["p"], vec![again("p", &there, 7)]).await;
    // The replica that requested the hold may be gone by now.
    while asked.load(Ordering::SeqCst) < 3 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(is_held(&there) && rig.live.cursor() == 0);
    *landed.lock() = 7;
    rig.released(&there).await;
    asking.abort();
}

#[tokio::test]
async fn a_storm_of_purges_is_one_question_at_a_time() {
    let rig = Rig::new();
    let (landed, asked) = (Arc::new(Mutex::new(0)), Arc::<AtomicUsize>::default());
    let there = rig.knows("b", &other(Arc::clone(&landed), Arc::clone(&asked)).await);
    let asking = tokio::spawn(ask(Arc::clone(&rig.replicas), Arc::clone(&there)));
    let began = Instant::now();
    for position in 1..20_000 {
        assert!(there.under_way.hold(&rig.replicas.context.deliveries, &id("v"), position, &at(&there, position)));
        if position % 100 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let most = began.elapsed().as_millis() / under_way::PAUSES.0.as_millis() + 1;
    let asked = asked.load(Ordering::SeqCst);
    assert!(asked as u128 <= most, "{asked} questions in {:?}", began.elapsed());
    assert_eq!(there.under_way.nodes().len(), 1);
    // The hold goes on until all have arrived.
    there.under_way.record_watermarks(&[(id("v"), 19_998)].into());
    assert!(is_held(&there) && rig.live.cursor() == 0);
    *landed.lock() = 19_999;
    rig.released(&there).await;
    asking.abort();
}

#[tokio::test]
async fn a_hold_ends_with_the_replica_that_it_is_for() {
    let rig = Rig::new();
    let (landed, asked) = (Arc::new(Mutex::new(0)), Arc::<AtomicUsize>::default());
    let listening = other(landed, asked).await;
    // The replica is gone, or is no longer sent purges.
    for address in ["127.0.0.1:1", &*listening] {
        let there = rig.knows("b", address);
        let asking = tokio::spawn(ask(Arc::clone(&rig.replicas), Arc::clone(&there)));
        assert!(there.under_way.hold(&rig.replicas.context.deliveries, &id("v"), 1, &at(&there, 1)));
        if address == listening {
            assert!(is_held(&there));
            tokio::task::yield_now().await;
            asking.abort();
        }
        rig.released(&there).await;
        asking.abort();
        assert!(asking.await.unwrap_err().is_cancelled());
        assert!(!there.under_way.hold(&rig.replicas.context.deliveries, &id("v"), 2, &at(&there, 2)));
    }
    // The answer of another process than the one addressed.
    let there = rig.knows("b", &listening);
    let asking = tokio::spawn(ask(Arc::clone(&rig.replicas), Arc::clone(&there)));
    let before = PeerPosition { replica: id("b"), boot: "before".to_owned(), position: 7 };
    let again = RedeliveryRequest { under_way_at: Some(before), ..again("p", &there, 7) };
    rig.receives(&["p"], vec![again]).await;
    rig.released(&there).await;
    asking.abort();
}

#[tokio::test]
async fn one_that_does_not_answer_is_waited_for_as_long_as_for_a_purge() {
    let rig = Rig::new();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let there = rig.knows("b", &silent.local_addr().unwrap().to_string());
    let asking = tokio::spawn(ask(Arc::clone(&rig.replicas), Arc::clone(&there)));
    let began = Instant::now();
    assert!(there.under_way.hold(&rig.replicas.context.deliveries, &id("v"), 1, &at(&there, 1)));
    rig.released(&there).await;
    assert!(began.elapsed() >= rig.replicas.context.ack_timeout);
    // That says nothing about how it confirms purges.
    assert!(!there.is_late());
    asking.abort();
}

#[tokio::test]
async fn a_confirmation_says_up_to_where_pages_have_landed() {
    let rig = Rig::new();
    rig.live.set_cursor(0);
    let said = rig.receives(&["p"], Vec::new()).await;
    assert_eq!((said.place, said.awaits_landing(&id("v"))), (Some(1), None));
    let page = rig.page_passes();
    let said = rig.receives(&["q"], Vec::new()).await;
    assert_eq!((said.place, said.awaits_landing(&id("v"))), (Some(2), Some(2)));
    drop(page);
    tokio::time::sleep(Duration::from_millis(20)).await;
    let said = rig.receives(&["q"], Vec::new()).await;
    assert_eq!(said.awaits_landing(&id("v")), None);
}

/// The redeliveries of the other replicas for `v`: for whose page each waits, if for any. `b` has not reached the node, and
/// its watermark is `landed`; `d` has reached it.
fn to_be_told(rig: &Rig, name: &str, missed: &[NodeId], landed: Position) -> [Vec<Option<NodeId>>; 2] {
    let (b, d) = (rig.knows("b", "127.0.0.1:1"), rig.knows("d", "127.0.0.1:1"));
    let v = [id("v")];
    let (fenced, landed) = (v.to_vec(), [(id("v"), landed)].into());
    let there = Confirmation { fenced, place: Some(7), landed, ..Confirmation::default() };
    let has_it = Confirmation { applied: v.to_vec(), place: Some(3), ..Confirmation::default() };
    let by_peer = [v.into(), BTreeSet::new()];
    let position = rig.replicas.context.journal.as_ref().unwrap().place_of(name).unwrap();
    let again = rig.replicas.redelivery_requests(name, position, missed, &[(b, there), (d, has_it)], &by_peer);
    let whose = |(_, again): &(Arc<Peer>, Vec<RedeliveryRequest>)| {
        again.iter().map(|again| again.under_way_at.as_ref().map(|at| at.replica.clone())).collect()
    };
    [whose(&again[0]), whose(&again[1])]
}

#[tokio::test]
async fn a_node_with_a_page_under_way_elsewhere_is_held_by_all_others() {
    let rig = Rig::new();
    rig.receives(&["p"], Vec::new()).await;
    assert_eq!(to_be_told(&rig, "p", &[], 6), [vec![], vec![Some(id("b"))]]);
    // After the arrival it is sent again at once, by those that have reached the node.
    assert_eq!(to_be_told(&rig, "p", &[], 7), [vec![], vec![None]]);
}

#[tokio::test]
async fn a_node_with_a_page_under_way_here_is_held_by_all_others() {
    let rig = Rig::new();
    rig.live.set_cursor(0);
    let page = rig.page_passes();
    rig.receives(&["p"], Vec::new()).await;
    // Also by one that has not reached it: it may reach it before the page arrives.
    let missed = [id("v")];
    assert_eq!(to_be_told(&rig, "p", &missed, 7), [vec![Some(id("c"))], vec![Some(id("c"))]]);
    assert_eq!(to_be_told(&rig, "p", &missed, 6)[1], [Some(id("c")), Some(id("b"))]);
    drop(page);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(to_be_told(&rig, "p", &missed, 7), [vec![], vec![None]]);
}

#[tokio::test]
async fn a_node_whose_answers_show_their_age_is_not_held_for_a_page_elsewhere() {
    let rig = Rig::new();
    rig.receives(&["p"], Vec::new()).await;
    let there = rig.knows("b", "127.0.0.1:1");
    let said = Confirmation { fenced: vec![id("v")], place: Some(7), ..Confirmation::default() };
    there.record_confirmation((0, 1), 1, said, false);
    for (missed, is_awaited) in [(Vec::new(), false), (vec![id("v")], true)] {
        let mut heard = rig.replicas.confirmed(1, Duration::ZERO).await;
        rig.replicas.agree(1, (&[], &missed), &mut heard, Duration::from_millis(200)).await;
        assert_eq!(is_held(&there), is_awaited);
    }
}
