//! The contract of every journal. [`suite!`] runs all of it with one way to open a journal.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;

use super::{Clock, Cursor, Entry, Journal, Lag, Limits, Missed, Position, PurgeObserver};
use crate::fleet::NodeId;
use crate::purge::{Forward, Purge, Target};

/// Opens an empty journal.
pub(super) type Open<'a> = &'a dyn Fn(Limits, PurgeObserver, Clock) -> Arc<dyn Journal>;

/// In 2033, with room for earlier times.
const NOW_MS: u64 = 2_000_000_000_000;

macro_rules! suite {
    ($open:expr) => {
        $crate::journal::contract::suite!($open;
            an_empty_journal_has_no_history,
            positions_grow_whoever_appends,
            everything_after_a_cursor_is_read_back_in_order,
            whoever_sees_the_head_move_can_read_up_to_it,
            the_observer_is_told_of_a_purge_before_the_head_moves,
            a_cursor_beyond_the_head_is_a_gap,
            a_cursor_before_the_newest_entries_is_a_gap,
            entries_that_take_too_much_memory_go,
            entries_older_than_the_retention_go_with_the_next_one,
            a_clock_that_is_set_back_loses_nothing,
            the_last_saved_cursor_of_each_node_is_read_back,
            a_cursor_that_is_no_longer_saved_is_forgotten,
            what_is_younger_than_an_age_follows_the_last_that_is_older,
            what_was_dropped_is_as_young_as_the_last_of_it,
            a_purge_whose_sender_went_away_is_accepted,
            what_was_refused_to_its_sender_is_known_as_long_as_it_is_held,
            of_what_retires_the_newest_url_that_was_not_refused_stays_known,
        );
    };
    ($open:expr; $($test:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                let open = $open;
                $crate::journal::contract::$test(&open).await;
            }
        )*
    };
}
pub(super) use suite;

/// A clock that a test sets.
pub(super) fn clock() -> (Arc<AtomicU64>, Clock) {
    let now_ms = Arc::new(AtomicU64::new(NOW_MS));
    let read = Arc::clone(&now_ms);
    (now_ms, Arc::new(move || read.load(Ordering::SeqCst)))
}

/// An observer that ignores its calls.
pub(super) fn nobody() -> PurgeObserver {
    Arc::new(|_| {})
}

/// A purge of one tag.
pub(super) fn purge(tag: &str) -> Purge {
    Purge { targets: vec![Target::Tags([tag].into_iter().collect())], soft: false }
}

/// A purge by URL.
pub(super) fn url(path: &str) -> Purge {
    let headers = vec![("host".to_owned(), "shop.test".to_owned())];
    let forward = Forward { method: "PURGE".into(), target: path.into(), headers };
    Purge { targets: vec![Target::Forward(forward)], soft: false }
}

pub(super) fn node(id: &str) -> NodeId {
    NodeId::try_from(id).unwrap()
}

/// The entries after a cursor, which must all be held.
pub(super) fn entries(journal: &dyn Journal, cursor: Position) -> Vec<Arc<Entry>> {
    match journal.since(cursor) {
        Missed::Entries(entries) => entries,
        Missed::Truncated => panic!("a gap after {cursor}"),
    }
}

/// Polls an append once, then drops it, like a sender that hangs up.
pub(super) fn append_and_go_away(journal: &dyn Journal, purge: Purge) {
    let mut append = journal.append(purge);
    let _ = append.as_mut().poll(&mut Context::from_waker(Waker::noop()));
}

/// Returns the positions.
async fn append_all(journal: &dyn Journal, tags: impl IntoIterator<Item = &str>) -> Vec<Position> {
    let mut positions = Vec::new();
    for tag in tags {
        positions.push(journal.append(purge(tag)).await.unwrap());
    }
    positions
}

pub(super) async fn an_empty_journal_has_no_history(open: Open<'_>) {
    let journal = open(Limits::default(), nobody(), clock().1);
    assert_eq!(journal.head(), 0);
    assert!(!journal.has_history());
    assert_eq!(journal.since(0), Missed::Entries(vec![]));
    assert!(journal.cursors().is_empty());
    journal.append(purge("a")).await.unwrap();
    assert!(journal.has_history());
}

pub(super) async fn positions_grow_whoever_appends(open: Open<'_>) {
    const SENDERS: usize = 8;
    const EACH: usize = 25;
    let journal = open(Limits::default(), nobody(), clock().1);
    let senders = (0..SENDERS).map(|sender| {
        let journal = Arc::clone(&journal);
        tokio::spawn(async move {
            let mut answers = Vec::new();
            for turn in 0..EACH {
                let purge = purge(&format!("{sender}_{turn}"));
                answers.push((journal.append(purge.clone()).await.unwrap(), purge));
            }
            answers
        })
    });
    let mut answers = Vec::new();
    for sender in senders.collect::<Vec<_>>() {
        let answered = sender.await.unwrap();
        assert!(answered.is_sorted_by_key(|(position, _)| *position), "a sender's own purges keep their order");
        answers.extend(answered);
    }
    answers.sort_by_key(|(position, _)| *position);
    let held = entries(&*journal, 0).iter().map(|entry| (entry.position, entry.purge.clone())).collect::<Vec<_>>();
    assert_eq!(held, answers);
    assert_eq!(held.len(), SENDERS * EACH);
    assert!(held.windows(2).all(|two| two[0].0 < two[1].0), "a position was given twice");
    assert_eq!(journal.head(), held.last().unwrap().0);
}

pub(super) async fn everything_after_a_cursor_is_read_back_in_order(open: Open<'_>) {
    let journal = open(Limits::default(), nobody(), clock().1);
    let at = append_all(&*journal, ["a", "b", "c"]).await;
    for (cursor, expected) in [(0, &["a", "b", "c"][..]), (at[0], &["b", "c"]), (at[1], &["c"]), (at[2], &[])] {
        let purges: Vec<Purge> = entries(&*journal, cursor).iter().map(|entry| entry.purge.clone()).collect();
        assert_eq!(purges, expected.iter().map(|tag| purge(tag)).collect::<Vec<_>>(), "after {cursor}");
    }
    assert_eq!(entries(&*journal, 0)[0].at_ms, NOW_MS);
}

pub(super) async fn whoever_sees_the_head_move_can_read_up_to_it(open: Open<'_>) {
    const COUNT: u64 = 200;
    let journal = open(Limits::default(), nobody(), clock().1);
    let mut head = journal.watch();
    let appending = Arc::clone(&journal);
    let sender = tokio::spawn(async move {
        for _ in 0..COUNT {
            let position = appending.append(purge("a")).await.unwrap();
            assert!(appending.head() >= position, "an answered purge is below the head");
        }
    });
    let (mut cursor, mut count) = (0, 0);
    while count < COUNT {
        head.changed().await.unwrap();
        let seen = *head.borrow_and_update();
        let read = entries(&*journal, cursor);
        count += read.iter().filter(|entry| entry.position <= seen).count() as u64;
        assert!(read.last().unwrap().position >= seen);
        assert!(journal.head() >= read.last().unwrap().position);
        cursor = seen;
    }
    sender.await.unwrap();
}

pub(super) async fn the_observer_is_told_of_a_purge_before_the_head_moves(open: Open<'_>) {
    let told = Arc::new(AtomicU64::new(0));
    let telling = Arc::clone(&told);
    // Far longer than waking up takes.
    let observer: PurgeObserver = Arc::new(move |entry| {
        std::thread::sleep(Duration::from_millis(50));
        telling.store(entry.position, Ordering::SeqCst);
    });
    let journal = open(Limits::default(), observer, clock().1);
    let mut head = journal.watch();
    let appending = Arc::clone(&journal);
    let sender = tokio::spawn(async move { appending.append(purge("cat_p_1")).await.unwrap() });
    let moved = *head.wait_for(|&head| head > 0).await.unwrap();
    assert_eq!(told.load(Ordering::SeqCst), moved);
    sender.await.unwrap();
}

pub(super) async fn a_cursor_beyond_the_head_is_a_gap(open: Open<'_>) {
    let journal = open(Limits::default(), nobody(), clock().1);
    assert_eq!(journal.since(1), Missed::Truncated);
    let at = append_all(&*journal, ["a"]).await;
    assert_eq!(journal.since(at[0] + 1), Missed::Truncated);
    assert_eq!(journal.since(Position::MAX), Missed::Truncated);
}

pub(super) async fn a_cursor_before_the_newest_entries_is_a_gap(open: Open<'_>) {
    let journal = open(Limits { max_entries: 2, ..Limits::default() }, nobody(), clock().1);
    let at = append_all(&*journal, ["a", "b", "c"]).await;
    assert_eq!(journal.since(0), Missed::Truncated);
    assert_eq!(journal.lag(0), Lag { entries: 2, oldest_ms: None });
    assert_eq!(entries(&*journal, at[0]).len(), 2);
    assert_eq!(journal.lag(at[0]), Lag { entries: 2, oldest_ms: Some(NOW_MS) });
    assert_eq!(journal.lag(at[2]), Lag { entries: 0, oldest_ms: None });
}

pub(super) async fn entries_that_take_too_much_memory_go(open: Open<'_>) {
    const TAG_BYTES: usize = 4_000;
    let journal = open(Limits { max_bytes: 3 * TAG_BYTES, ..Limits::default() }, nobody(), clock().1);
    let long = "x".repeat(TAG_BYTES);
    let mut at = append_all(&*journal, ["a", &long, &long]).await;
    assert_eq!(entries(&*journal, 0).len(), 3);
    at.extend(append_all(&*journal, [long.as_str()]).await);
    assert_eq!(journal.since(at[0]), Missed::Truncated);
    assert_eq!(entries(&*journal, at[1]).len(), 2);
    let too_long = "x".repeat(4 * TAG_BYTES);
    at.extend(append_all(&*journal, [too_long.as_str()]).await);
    assert_eq!(journal.since(at[3]), Missed::Truncated);
    assert_eq!(journal.since(at[4]), Missed::Entries(vec![]));
}

pub(super) async fn entries_older_than_the_retention_go_with_the_next_one(open: Open<'_>) {
    let (now_ms, clock) = clock();
    let journal = open(Limits { retention: Duration::from_secs(60), ..Limits::default() }, nobody(), clock);
    let at = append_all(&*journal, ["a"]).await;
    now_ms.fetch_add(60_000, Ordering::SeqCst);
    append_all(&*journal, ["b"]).await;
    assert_eq!(entries(&*journal, 0).len(), 2);
    now_ms.fetch_add(1, Ordering::SeqCst);
    append_all(&*journal, ["c"]).await;
    assert_eq!(journal.since(0), Missed::Truncated);
    assert_eq!(entries(&*journal, at[0]).len(), 2);
}

pub(super) async fn a_clock_that_is_set_back_loses_nothing(open: Open<'_>) {
    let (now_ms, clock) = clock();
    let journal = open(Limits { retention: Duration::from_secs(60), ..Limits::default() }, nobody(), clock);
    append_all(&*journal, ["a"]).await;
    for earlier in [NOW_MS - 3_600_000, 0] {
        now_ms.store(earlier, Ordering::SeqCst);
        append_all(&*journal, ["b"]).await;
    }
    assert_eq!(entries(&*journal, 0).len(), 3);
}

pub(super) async fn the_last_saved_cursor_of_each_node_is_read_back(open: Open<'_>) {
    let journal = open(Limits::default(), nobody(), clock().1);
    append_all(&*journal, ["a", "b"]).await;
    journal.save_cursors(vec![(node("v1"), Cursor::at(1)), (node("v2"), Cursor::at(1))]).await.unwrap();
    let of_an_epoch = Cursor { epoch: Some("1700000000".into()), ..Cursor::at(2) };
    journal.save_cursors(vec![(node("v1"), of_an_epoch.clone())]).await.unwrap();
    assert_eq!(journal.cursors(), [(node("v1"), of_an_epoch), (node("v2"), Cursor::at(1))].into());
    journal.save_cursors(vec![(node("v1"), Cursor::at(2))]).await.unwrap();
    assert_eq!(journal.cursors(), [(node("v1"), Cursor::at(2)), (node("v2"), Cursor::at(1))].into());
}

pub(super) async fn a_cursor_that_is_no_longer_saved_is_forgotten(open: Open<'_>) {
    let (now_ms, clock) = clock();
    let journal = open(Limits { retention: Duration::from_secs(60), ..Limits::default() }, nobody(), clock);
    append_all(&*journal, ["a"]).await;
    journal.save_cursors(vec![(node("left"), Cursor::at(1)), (node("stays"), Cursor::at(1))]).await.unwrap();
    now_ms.fetch_add(60_001, Ordering::SeqCst);
    journal.save_cursors(vec![(node("stays"), Cursor::at(1))]).await.unwrap();
    assert_eq!(journal.cursors(), [(node("stays"), Cursor::at(1))].into());
}

pub(super) async fn what_is_younger_than_an_age_follows_the_last_that_is_older(open: Open<'_>) {
    let (now_ms, clock) = clock();
    let journal = open(Limits::default(), nobody(), clock);
    assert_eq!(journal.older_than(Duration::ZERO), 0);
    let mut at = append_all(&*journal, ["a", "b"]).await;
    now_ms.fetch_add(1000, Ordering::SeqCst);
    at.extend(append_all(&*journal, ["c"]).await);
    let floor = at[0] - 1;
    for (age_ms, positions) in [(1001, 0..=floor), (1000, 0..=floor), (999, at[1]..=at[1]), (0, at[1]..=at[1])] {
        let position = journal.older_than(Duration::from_millis(age_ms));
        assert!(positions.contains(&position), "older than {age_ms} ms: {position} of {at:?}");
    }
}

pub(super) async fn what_was_dropped_is_as_young_as_the_last_of_it(open: Open<'_>) {
    let (now_ms, clock) = clock();
    let limits = Limits { retention: Duration::from_secs(60), max_entries: 2, ..Limits::default() };
    let journal = open(limits, nobody(), clock);
    let is_cut_off = |seconds: u64| journal.may_have_dropped(Duration::from_secs(seconds));
    append_all(&*journal, ["a"]).await;
    assert!(!is_cut_off(3600), "nothing was dropped");
    // A quiet shop: the only purge that is held is young, and those before it are long gone.
    now_ms.fetch_add(61_000, Ordering::SeqCst);
    append_all(&*journal, ["b"]).await;
    assert_eq!([1, 60, 61].map(is_cut_off), [false, false, true]);
    // More than there is room for.
    now_ms.fetch_add(5_000, Ordering::SeqCst);
    append_all(&*journal, ["c", "d"]).await;
    assert_eq!([4, 5].map(is_cut_off), [false, true]);
}

pub(super) async fn a_purge_whose_sender_went_away_is_accepted(open: Open<'_>) {
    let journal = open(Limits::default(), nobody(), clock().1);
    append_and_go_away(&*journal, purge("a"));
    journal.append(purge("b")).await.unwrap();
    // In a journal with many writers the append without a receiver may come later.
    let mut head = journal.watch();
    while entries(&*journal, 0).len() < 2 {
        head.changed().await.unwrap();
    }
    let purges: Vec<Purge> = entries(&*journal, 0).iter().map(|entry| entry.purge.clone()).collect();
    assert!(purges.contains(&purge("a")) && purges.contains(&purge("b")), "{purges:?}");
}

pub(super) async fn what_was_refused_to_its_sender_is_known_as_long_as_it_is_held(open: Open<'_>) {
    let journal = open(Limits { max_entries: 2, ..Limits::default() }, nobody(), clock().1);
    let mut at = append_all(&*journal, ["a", "b"]).await;
    journal.refuse(vec![at[0], at[1]]).await.unwrap();
    assert_eq!([at[0], at[1], at[1] + 1].map(|position| journal.is_refused(position)), [true, true, false]);
    at.extend(append_all(&*journal, ["c"]).await);
    assert_eq!([at[0], at[1], at[2]].map(|position| journal.is_refused(position)), [false, true, false]);
    // No mark is kept for a purge that is not held.
    journal.refuse(vec![at[0]]).await.unwrap();
    assert!(!journal.is_refused(at[0]));
}

pub(super) async fn of_what_retires_the_newest_url_that_was_not_refused_stays_known(open: Open<'_>) {
    let journal = open(Limits { max_entries: 1, ..Limits::default() }, nobody(), clock().1);
    assert_eq!(journal.uncovered(), 0);
    let mut at = Vec::new();
    for (purge, is_refused) in [(url("/a"), false), (url("/b"), false), (url("/c"), true), (purge("d"), false)] {
        let position = journal.append(purge).await.unwrap();
        if is_refused {
            journal.refuse(vec![position]).await.unwrap();
        }
        at.push((position, journal.uncovered()));
    }
    append_all(&*journal, ["e"]).await;
    let uncovered: Vec<Position> = at.iter().map(|(_, uncovered)| *uncovered).collect();
    assert_eq!(uncovered, [0, at[0].0, at[1].0, at[1].0]);
    assert_eq!(journal.uncovered(), at[1].0);
}
