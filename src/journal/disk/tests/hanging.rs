//! A disk that does not answer: no caller waits for it, nothing accumulates, and it continues where it was.

use super::*;
use crate::journal::Entry;

/// Longer than anything else takes, and short enough to wait for.
const PATIENCE: Duration = Duration::from_millis(300);

fn impatient() -> Settings {
    Settings { patience: PATIENCE, ..settings() }
}

fn tags(journal: &Disk) -> Vec<Purge> {
    entries(journal, 0).iter().map(|entry: &Arc<Entry>| entry.purge.clone()).collect()
}

/// A purge of this or another replica, which may be in etcd.
fn named(id: &str, revision: Option<u64>) -> NamedPurge {
    let origin = EntryOrigin { id: id.into(), revision, ours: true };
    NamedPurge { origin, at_ms: 2_000_000_000_000, purge: purge(id), in_order: false }
}

#[tokio::test]
async fn who_waits_for_a_hung_disk_is_told_and_who_comes_later_at_once() {
    let (directory, fault) = (tempdir().unwrap(), Arc::new(Fault::default()));
    let journal = fault.open_with(&directory, impatient());
    journal.append(purge("a")).await.unwrap();
    assert_eq!(journal.trouble(), None);
    fault.hold_next_sync();
    let error = journal.append(purge("b")).await.unwrap_err();
    assert!(matches!(&error, WriteError::Hung { path, .. } if path.ends_with("journal.redb")), "{error}");
    let trouble = journal.trouble().unwrap();
    assert!(trouble.refuses && trouble.reason.starts_with("no answer from /"), "{trouble:?}");
    // Thousands of purges, and none is kept.
    let began = std::time::Instant::now();
    for _ in 0..5 * QUEUE {
        journal.append(purge("c")).await.unwrap_err();
    }
    journal.save_cursors(vec![(node("v1"), Cursor::at(1))]).await.unwrap_err();
    assert!(began.elapsed() < PATIENCE * (QUEUE as u32), "each of them waited");
    assert_eq!(journal.head(), 1);
    fault.release();
    // The pending write takes effect.
    journal.watch().wait_for(|head| *head == 2).await.unwrap();
    assert_eq!(journal.append(purge("d")).await.unwrap(), 3);
    assert_eq!(tags(&journal), ["a", "b", "d"].map(purge));
    assert_eq!(journal.trouble(), None);
    let before = entries(&journal, 0);
    drop(journal);
    assert_eq!(entries(&fault.open(&directory), 0), before);
}

#[tokio::test]
async fn a_write_that_always_takes_too_long_takes_effect_and_others_follow() {
    let (directory, fault) = (tempdir().unwrap(), Arc::new(Fault::default()));
    let journal = fault.open_with(&directory, impatient());
    journal.append(purge("a")).await.unwrap();
    fault.hold_next_sync();
    journal.append(purge("b")).await.unwrap_err();
    for sync in 0.. {
        assert!(sync < 9, "it is written over and over");
        // The one that is held ends, and the next one is.
        fault.hold_next_sync();
        while journal.head() == 1 && !fault.is_holding() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if journal.head() == 2 {
            break;
        }
        // Answered when this one has taken too long as well.
        journal.append(purge("c")).await.unwrap_err();
    }
    fault.release();
    assert_eq!(journal.append(purge("d")).await.unwrap(), 3);
    assert_eq!(tags(&journal), ["a", "b", "d"].map(purge));
    let before = entries(&journal, 0);
    drop(journal);
    assert_eq!(entries(&fault.open(&directory), 0), before);
}

#[tokio::test]
async fn what_hung_and_then_failed_is_not_carried_out() {
    let (directory, fault) = (tempdir().unwrap(), Arc::new(Fault::default()));
    let journal = fault.open_with(&directory, impatient());
    fault.hold_next_sync();
    journal.append(purge("a")).await.unwrap_err();
    fault.full.store(true, Ordering::SeqCst);
    fault.release();
    let error = loop {
        match journal.append(purge("b")).await.unwrap_err() {
            WriteError::Hung { .. } => tokio::task::yield_now().await,
            error => break error,
        }
    };
    assert!(told(&error).contains("journal.redb"), "{}", told(&error));
    fault.full.store(false, Ordering::SeqCst);
    assert_eq!(journal.append(purge("c")).await.unwrap(), 1);
    assert_eq!(tags(&journal), [purge("c")]);
}

#[tokio::test]
async fn a_disk_that_takes_again_is_noticed_though_nobody_purges() {
    let (directory, fault) = (tempdir().unwrap(), Arc::new(Fault::default()));
    let journal = fault.open(&directory);
    fault.full.store(true, Ordering::SeqCst);
    journal.append(purge("a")).await.unwrap_err();
    let trouble = journal.trouble().unwrap();
    assert!(trouble.refuses && trouble.reason.contains("journal.redb"), "{trouble:?}");
    fault.full.store(false, Ordering::SeqCst);
    while journal.trouble().is_some() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(journal.append(purge("b")).await.unwrap(), 1);
}

#[tokio::test]
async fn what_is_safe_in_etcd_is_carried_out_while_the_disk_hangs() {
    let (directory, fault) = (tempdir().unwrap(), Arc::new(Fault::default()));
    let journal = fault.open_with(&directory, impatient());
    fault.hold_next_sync();
    // In this order: the one that is not safe has to be in the group that hangs.
    let (spooled, safe) =
        tokio::join!(journal.append_named(named("spooled", None)), journal.append_named(named("safe", Some(7))));
    assert_eq!(safe.unwrap(), 7);
    spooled.unwrap_err();
    assert_eq!(journal.append_named(named("later", Some(9))).await.unwrap(), 9);
    journal.append_named(named("refused", None)).await.unwrap_err();
    assert_eq!(tags(&journal), ["safe", "later"].map(purge));
    fault.release();
    // The pending write is written after what took effect meanwhile.
    journal.watch().wait_for(|head| *head == 10).await.unwrap();
    assert_eq!(journal.append_named(named("new", Some(12))).await.unwrap(), 12);
    assert_eq!(tags(&journal), ["safe", "later", "spooled", "new"].map(purge));
    let before = tags(&journal);
    drop(journal);
    let journal = fault.open(&directory);
    assert_eq!((journal.head(), tags(&journal)), (12, before));
    assert_eq!(journal.readable().position_map.lock().missing().len(), 1);
}

#[tokio::test]
async fn what_is_safe_in_etcd_is_on_the_disk_once_it_has_room_again() {
    let (directory, fault) = (tempdir().unwrap(), Arc::new(Fault::default()));
    let journal = fault.open(&directory);
    fault.full.store(true, Ordering::SeqCst);
    for (id, revision) in [("a", 3), ("b", 5)] {
        assert_eq!(journal.append_named(named(id, Some(revision))).await.unwrap(), revision);
    }
    fault.full.store(false, Ordering::SeqCst);
    journal.append_named(named("c", Some(8))).await.unwrap();
    drop(journal);
    let journal = fault.open(&directory);
    assert_eq!((journal.head(), tags(&journal)), (8, vec![purge("a"), purge("b"), purge("c")]));
}

#[tokio::test]
async fn a_gap_and_what_is_known_of_etcd_hold_whatever_the_disk_says() {
    let (directory, fault) = (tempdir().unwrap(), Arc::new(Fault::default()));
    let journal = fault.open_with(&directory, impatient());
    journal.append_named(named("a", Some(3))).await.unwrap();
    fault.full.store(true, Ordering::SeqCst);
    journal.break_off(7).await.unwrap();
    assert_eq!((journal.head(), journal.since(3)), (7, Missed::Truncated));
    journal.append_named(named("b", Some(9))).await.unwrap();
    journal.found(vec![(9, None)]).await.unwrap();
    assert_eq!(journal.readable().position_map.lock().missing().len(), 1);
    journal.save_cursors(vec![(node("v1"), Cursor::at(9))]).await.unwrap_err();
    fault.full.store(false, Ordering::SeqCst);
    journal.append_named(named("c", Some(12))).await.unwrap();
    drop(journal);
    let journal = fault.open(&directory);
    assert_eq!((journal.head(), journal.since(3)), (12, Missed::Truncated));
    assert_eq!(entries(&journal, 7).len(), 2);
}

#[tokio::test]
async fn the_end_does_not_wait_for_a_disk_that_hangs() {
    let (directory, fault) = (tempdir().unwrap(), Arc::new(Fault::default()));
    let journal = fault.open_with(&directory, impatient());
    fault.hold_next_sync();
    journal.append(purge("a")).await.unwrap_err();
    // Dropping would wait for ever.
    drop(journal);
    fault.release();
}
