//! Who is to blame for a purge that fails. The nodes are scripted: fakes whose behaviour is the test's. They obey the test
//! request unless a test says otherwise.

use super::*;
use crate::journal::{Named, NamedStore, Shared as _};
use crate::purge::{Forward, PROBE_PATH, Pattern};

/// The behaviour of a node for one request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Does {
    Answer(u16),
    /// Answers and closes the connection.
    AnswerAndClose(u16),
    /// Confirms that everything was dropped.
    FlushedAll,
    Close,
    Reset,
    /// Does not answer.
    Hang,
}

type Behaviour = Arc<dyn Fn(&str) -> Does + Send + Sync>;

/// A node that behaves as this function says for the head of each request.
async fn scripted(behaviour: impl Fn(&str) -> Does + Send + Sync + 'static) -> (SocketAddr, Told) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (told, behaviour): (Told, Behaviour) = (Told::default(), Arc::new(behaviour));
    let of_listener = Arc::clone(&told);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, Arc::clone(&of_listener), Arc::clone(&behaviour)));
        }
    });
    (address, told)
}

async fn serve(mut stream: tokio::net::TcpStream, told: Told, behaviour: Behaviour) {
    let mut input = Vec::new();
    while stream.read_buf(&mut input).await.is_ok_and(|read| read > 0) {
        while let Some(end) = input.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            let head = String::from_utf8(input.drain(..end + 4).collect()).unwrap();
            let does = behaviour(&head);
            told.lock().push((Instant::now(), head));
            let answer = match does {
                Does::Answer(status) => format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n"),
                Does::AnswerAndClose(status) => {
                    format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
                }
                Does::FlushedAll => "HTTP/1.1 200 X\r\nX-Clearcoat-Flushed: all\r\nContent-Length: 0\r\n\r\n".into(),
                Does::Close => return,
                Does::Reset => {
                    _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                    return;
                }
                Does::Hang => return std::future::pending().await,
            };
            _ = stream.write_all(answer.as_bytes()).await;
            if matches!(does, Does::AnswerAndClose(_)) {
                return;
            }
        }
    }
}

/// Obeys probes, and behaves as `odd` says for other requests.
fn obeys(odd: impl Fn(&str) -> Does + Send + Sync + 'static) -> impl Fn(&str) -> Does + Send + Sync + 'static {
    move |head| if head.contains(PROBE_PATH) { Does::AnswerAndClose(400) } else { odd(head) }
}

fn handed_on(target: &str) -> Purge {
    let headers = vec![("host".to_owned(), "shop.test".to_owned())];
    let forward = Forward { method: "PURGE".into(), target: target.into(), headers };
    Purge { targets: vec![Target::Forward(forward)], soft: false }
}

async fn rig(behaviour: impl Fn(&str) -> Does + Send + Sync + 'static) -> Rig {
    let guard = Arc::new(Guard::new(long_ago()));
    let journal = Arc::new(Memory::new(Limits::default(), noted_by(&guard)));
    Rig::to(scripted(behaviour).await, CALM, journal, guard, None).await
}

impl Rig {
    /// Accepts a purge as the purge listener does.
    async fn accept(&self, purge: Purge) -> (Position, Expected<'_>) {
        let refusable = Refusable::of(&purge);
        let mut expected = self.deliveries.expect();
        let position = self.deliveries.context.journal.append(purge).await.unwrap();
        if let Some(refusable) = refusable {
            expected.record_accepted(position, refusable, [192, 0, 2, 7].into());
        }
        (position, expected)
    }

    /// Waits for an error of the delivery with this text.
    async fn until_it_says(&self, text: &str) {
        let said = async {
            while self.deliveries.fault(self.node.id()).is_none_or(|fault| !fault.text.contains(text)) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let waited = tokio::time::timeout(PATIENCE, said).await;
        assert!(waited.is_ok(), "{:?}", self.deliveries.fault(self.node.id()));
    }
}

#[tokio::test]
async fn a_request_a_node_cannot_take_is_passed_over_and_the_rest_is_done() {
    let odd = [Does::Answer(501), Does::Answer(405), Does::AnswerAndClose(400), Does::Close, Does::Reset, Does::Hang];
    for odd in odd {
        let rig = rig(obeys(move |head| if head.contains("/poison") { odd } else { Does::Answer(200) })).await;
        for number in 0..5 {
            rig.accept(handed_on(&format!("/good/{number}-"))).await;
        }
        let (position, expected) = rig.accept(handed_on("/poison")).await;
        rig.append("tag").await;
        let (last, _) = rig.accept(handed_on("/last")).await;
        let outcome = expected.acknowledge(position, PATIENCE, false).await;
        assert_eq!(outcome.refused.len(), 1, "{outcome:?}");
        rig.until_at(last).await;
        for told in ["/good/0-", "/good/4-", ",)tag(", "/last"] {
            assert!(!rig.told(told).is_empty(), "{told}");
        }
        let varnish = rig.deliveries.context.metrics.node(Role::Varnish, rig.node.id());
        assert_eq!(varnish.varnish.as_ref().unwrap().passed_over.get(), 1);
        // Later purges do not wait for it again.
        let poisoned = rig.told("/poison").len();
        rig.purge("after").await;
        assert_eq!(rig.told("/poison").len(), poisoned);
    }
}

#[tokio::test]
async fn a_refusal_counts_only_from_a_node_that_obeys() {
    let is_broken = Arc::new(AtomicBool::new(true));
    let broken = Arc::clone(&is_broken);
    // A VCL with a wrong ACL was deployed: everything is refused.
    let rig = rig(move |head| match (broken.load(Ordering::SeqCst), head.contains(PROBE_PATH)) {
        (true, _) => Does::Answer(405),
        (false, true) => Does::AnswerAndClose(400),
        (false, false) => Does::Answer(200),
    })
    .await;
    let (position, _) = rig.accept(handed_on("/page")).await;
    rig.until_it_says("acl purge").await;
    assert_eq!(rig.node.live.cursor(), 0);
    is_broken.store(false, Ordering::SeqCst);
    rig.deliveries.health_changed(rig.node.id());
    rig.until_at(position).await;
    assert!(rig.told("/page").len() >= 2);
}

#[tokio::test]
async fn what_was_answered_before_a_failure_is_not_sent_again() {
    let rig = rig(obeys(|head| if head.contains("/poison") { Does::Reset } else { Does::Answer(200) })).await;
    // No page is in flight, so none of these is repeated.
    rig.ran(&[400, 200]);
    for number in 0..10 {
        rig.accept(handed_on(&format!("/a{number}-"))).await;
    }
    let (last, _) = rig.accept(handed_on("/poison")).await;
    rig.until_at(last).await;
    let sent: usize = (0..10).map(|number| rig.told(&format!("/a{number}-")).len()).sum();
    // Once more because the node failed at first, and once more because the first may have been lost with the reset.
    assert!(sent <= 30, "{sent}");
}

#[tokio::test]
async fn a_node_that_closes_after_each_answer_gets_on() {
    let rig = rig(|_| Does::AnswerAndClose(200)).await;
    let mut last = 0;
    for number in 0..100 {
        last = rig.accept(handed_on(&format!("/p/{number}-"))).await.0;
    }
    rig.until_at(last).await;
    assert_eq!(rig.deliveries.fault(rig.node.id()), None);
}

#[tokio::test]
async fn a_ban_that_does_not_compile_at_a_node_becomes_one_of_everything() {
    for status in [400, 503] {
        let rig = rig(obeys(move |head| if head.contains("odd") { Does::Answer(status) } else { Does::Answer(200) }));
        let rig = rig.await;
        let purge = Purge { targets: vec![Target::Pattern(Pattern::new("odd.*").unwrap())], soft: false };
        let (position, _) = rig.accept(purge).await;
        rig.until_at(position).await;
        assert!(!rig.told("X-Clearcoat-Flush: all").is_empty());
    }
}

#[tokio::test]
async fn a_node_that_takes_no_ban_of_its_form_stays_out() {
    let rig =
        rig(obeys(|head| if head.contains("Tags-Pattern") { Does::Answer(400) } else { Does::Answer(200) })).await;
    rig.append("tag").await;
    rig.until_it_says("X-Magento-Tags-Pattern").await;
    assert_eq!(rig.node.live.cursor(), 0);
}

#[tokio::test]
async fn a_pool_that_a_vcl_does_not_know_is_no_purge_of_tags() {
    let rig = rig(obeys(|head| if head.contains("X-Pool") { Does::Answer(400) } else { Does::Answer(200) })).await;
    let purge = Purge { targets: vec![Target::Pool(Pattern::new("shop").unwrap())], soft: false };
    let (position, expected) = rig.accept(purge).await;
    let outcome = expected.acknowledge(position, PATIENCE, false).await;
    assert_eq!((outcome.applied.len(), outcome.refused.len()), (1, 1));
    assert!(rig.told("Flush").is_empty());
}

#[tokio::test]
async fn a_refusal_is_told_however_many_batches_follow_it_before_its_answer() {
    let rig = rig(obeys(|head| if head.contains("/poison") { Does::Answer(405) } else { Does::Answer(200) })).await;
    rig.ran(&[400, 200]);
    let (position, expected) = rig.accept(handed_on("/poison")).await;
    for number in 0..300 {
        rig.purge(&format!("tag_{number}_end")).await;
    }
    let outcome = expected.acknowledge(position, PATIENCE, false).await;
    assert_eq!((outcome.applied.len(), outcome.refused.len()), (1, 1), "{outcome:?}");
}

#[tokio::test]
async fn what_no_node_took_in_time_is_promised_to_nobody_and_keeps_none_out() {
    let rig = rig(obeys(|head| if head.contains("/page") { Does::Hang } else { Does::Answer(200) })).await;
    let (position, expected) = rig.accept(handed_on("/page")).await;
    let outcome = expected.acknowledge(position, Duration::from_millis(200), false).await;
    assert_eq!((outcome.fenced.len(), outcome.refused.len(), outcome.is_untaken), (1, 0, true), "{outcome:?}");
    assert!(rig.deliveries.context.journal.is_refused(position));
    rig.until_at(position).await;
    assert!(rig.told("Flush").is_empty());
}

#[tokio::test]
async fn a_purge_that_was_answered_is_not_passed_over_but_flushed() {
    for flushed in [Does::Answer(200), Does::FlushedAll] {
        let rig = rig(obeys(move |head| match head {
            head if head.contains("/page") => Does::Hang,
            head if head.contains("Flush: all") => flushed,
            _ => Does::Answer(200),
        }));
        let rig = rig.await;
        let (position, expected) = rig.accept(handed_on("/page")).await;
        let outcome = expected.acknowledge(position, Duration::from_millis(200), true).await;
        assert_eq!((outcome.fenced.len(), outcome.refused.len()), (1, 0), "{outcome:?}");
        if flushed == Does::FlushedAll {
            rig.until_at(position).await;
            assert!(!rig.told("Flush: all").is_empty());
        } else {
            rig.until_it_says("it does not take a purge that was answered").await;
            assert!(rig.node.live.cursor() < position);
        }
    }
}

/// A node that refuses the page, and confirms a flush in this way.
fn refuses_a_page(flushed: Does) -> impl Fn(&str) -> Does + Send + Sync + 'static {
    obeys(move |head| match head {
        head if head.contains("/page") => Does::Answer(405),
        head if head.contains("Flush: all") => flushed,
        _ => Does::Answer(200),
    })
}

#[tokio::test]
async fn a_purge_of_before_the_start_counts_as_done_unless_it_is_marked() {
    for is_marked in [false, true] {
        let guard = Arc::new(Guard::new(long_ago()));
        let journal: Arc<dyn Journal> = Arc::new(Memory::new(Limits::default(), noted_by(&guard)));
        let id = NodeId::try_from("varnish-1").unwrap();
        journal.save_cursors(vec![(id, Cursor::at(0))]).await.unwrap();
        let position = journal.append(handed_on("/page")).await.unwrap();
        if is_marked {
            journal.refuse(vec![position]).await.unwrap();
        }
        let told = scripted(refuses_a_page(Does::Answer(200))).await;
        let rig = Rig::to(told, CALM, journal, guard, None).await;
        if is_marked {
            rig.until_at(position).await;
            assert!(rig.told("Flush: all").is_empty());
        } else {
            rig.until_it_says("it does not take a purge that was answered").await;
            assert_eq!(rig.node.live.cursor(), 0);
        }
    }
}

/// Deliveries of a replica that received a purge from another one, and whose node passed it over.
async fn passed_over(flushed: Does) -> (Rig, Position) {
    let guard = Arc::new(Guard::new(long_ago()));
    let memory = Memory::new(Limits::default(), noted_by(&guard));
    let journal = Arc::new(Named::new(NamedStore::Memory(Box::new(memory))));
    let shared: Arc<dyn Journal> = Arc::clone(&journal) as Arc<dyn Journal>;
    let rig = Rig::to(scripted(refuses_a_page(flushed)).await, CALM, shared, guard, None).await;
    rig.ran(&[400, 200]);
    let told = crate::journal::PurgeMessage { id: "a".to_owned(), revision: None, at_ms: 0, purge: handed_on("/page") };
    let position = journal.admit(vec![told]).await.unwrap();
    rig.until_at(position).await;
    assert!(rig.told("Flush: all").is_empty());
    (rig, position)
}

#[tokio::test]
async fn a_node_that_passed_over_what_was_answered_as_done_elsewhere_is_flushed() {
    let (rig, position) = passed_over(Does::FlushedAll).await;
    // It may still owe a flush for what it passed over, and a later process would not know.
    assert_eq!(rig.deliveries.cursors()[0].1.position, position - 1);
    rig.deliveries.record_done(position);
    assert_eq!(rig.node.live.cursor(), position - 1);
    rig.until_at(position).await;
    assert!(!rig.told("Flush: all").is_empty());
    assert_eq!(rig.deliveries.cursors()[0].1.position, position);
}

#[tokio::test]
async fn a_node_that_is_kept_out_for_a_purge_comes_back_when_that_was_refused() {
    let (rig, position) = passed_over(Does::Answer(200)).await;
    rig.deliveries.expire_open(position);
    rig.until_it_says("it does not take a purge that was answered").await;
    assert_eq!(rig.node.live.cursor(), position - 1);
    rig.deliveries.record_refused(vec![position]);
    rig.until_at(position).await;
    let journal = &rig.deliveries.context.journal;
    while !journal.is_refused(position) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_confirmation_says_what_a_node_has_refused() {
    let (rig, position) = passed_over(Does::Answer(200)).await;
    let refusals = rig.deliveries.confirm(position);
    assert_eq!(refusals, [(rig.node.id().clone(), Arc::from("it answered 405"))]);
    rig.deliveries.record_refused(vec![position]);
    assert_eq!(rig.deliveries.cursors()[0].1.position, position);
}

#[tokio::test]
async fn a_400_is_marked_in_the_journal_before_it_is_told() {
    let rig = rig(refuses_a_page(Does::Answer(200))).await;
    let (position, expected) = rig.accept(handed_on("/page")).await;
    let outcome = expected.acknowledge(position, PATIENCE, false).await;
    assert_eq!((outcome.refused.len(), rig.deliveries.context.journal.is_refused(position)), (1, true));
    let (position, expected) = rig.accept(handed_on("/other")).await;
    let outcome = expected.acknowledge(position, PATIENCE, false).await;
    assert_eq!((outcome.refused.len(), rig.deliveries.context.journal.is_refused(position)), (0, false));
}

/// A journal that has dropped all but its last entry, and a node that had none of it.
async fn gap(lost: Purge, behaviour: impl Fn(&str) -> Does + Send + Sync + 'static) -> (Rig, Position) {
    let guard = Arc::new(Guard::new(long_ago()));
    let limits = Limits { max_entries: 1, ..Limits::default() };
    let journal: Arc<dyn Journal> = Arc::new(Memory::new(limits, noted_by(&guard)));
    let told = scripted(behaviour).await;
    let rig = Rig::to(told, CALM, Arc::clone(&journal), Arc::clone(&guard), None).await;
    rig.deliveries.stop(rig.node.id());
    rig.node.live.set_cursor(0);
    let id = rig.node.id().clone();
    journal.save_cursors(vec![(id, Cursor::at(0))]).await.unwrap();
    rig.accept(lost).await;
    let last = rig.append("last").await;
    rig.deliveries.start(&rig.node, &VarnishSettings::default());
    (rig, last)
}

#[tokio::test]
async fn a_flush_makes_a_node_current_that_missed_tags() {
    let tags = Purge { targets: vec![Target::Tags(["lost"].into_iter().collect())], soft: false };
    let (rig, last) = gap(tags, obeys(|_| Does::Answer(200))).await;
    rig.until_at(last).await;
    assert!(!rig.told("Flush").is_empty());
}

#[tokio::test]
async fn a_flush_covers_missed_urls_only_if_the_vcl_says_what_it_dropped() {
    let (rig, _) = gap(handed_on("/lost"), obeys(|_| Does::Answer(200))).await;
    rig.until_it_says("pages without tags").await;
    assert_eq!(rig.node.live.cursor(), 0);

    let says_so = |head: &str| if head.contains("Flush: all") { Does::FlushedAll } else { Does::Answer(200) };
    let (rig, last) = gap(handed_on("/lost"), obeys(says_so)).await;
    rig.until_at(last).await;
}

#[tokio::test]
async fn urls_still_held_are_replayed_behind_a_flush_however_many() {
    let guard = Arc::new(Guard::new(long_ago()));
    let journal: Arc<dyn Journal> = Arc::new(Memory::new(Limits::default(), noted_by(&guard)));
    let id = NodeId::try_from("varnish-1").unwrap();
    journal.save_cursors(vec![(id, Cursor::at(0))]).await.unwrap();
    for number in 0..2_500 {
        journal.append(handed_on(&format!("/p/{number}-"))).await.unwrap();
    }
    for number in 0..200 {
        let pattern = Pattern::new(&format!("a{number}.*")).unwrap();
        journal.append(Purge { targets: vec![Target::Pattern(pattern)], soft: false }).await.unwrap();
    }
    let told = scripted(obeys(|_| Does::Answer(200))).await;
    let rig = Rig::to(told, CALM, journal, guard, None).await;
    rig.purge("last").await;
    let bans = rig.told("Tags-Pattern").len();
    assert!(bans <= 8, "{bans} bans");
    for number in [0, 999, 1_000, 2_499] {
        assert!(!rig.told(&format!("/p/{number}-")).is_empty(), "{number}");
    }
}
