//! What a start knows of the purges before it, for seals.

use std::sync::Arc;

use super::super::{change, opening};
use super::*;
use crate::journal::Entry;
use crate::seal::{Judgement, Name, PurgedNames, StaleBecause, write_seal};

/// Judges a page with this tag, sealed by an earlier look at the journal.
fn judge(now: &PurgedNames, sealed_by: &PurgedNames, position: Position, tag: &str) -> Judgement {
    let mut text = Vec::new();
    write_seal(
        &mut text,
        std::iter::once(sealed_by.lineage().stamp(position)),
        1,
        &mut vec![Name::of_tag(tag.as_bytes())],
    );
    now.judge(&now.read(&text).unwrap(), b"/", now.head())
}

fn names_of(journal: &Disk) -> Arc<PurgedNames> {
    Arc::clone(journal.purged().expect("answers can be sealed"))
}

/// Closes a journal and opens it again.
fn reopened(journal: Disk, directory: &TempDir, settings: Settings) -> (Disk, Arc<PurgedNames>) {
    drop(journal);
    let journal = open_by(directory.path(), settings).unwrap();
    let names = names_of(&journal);
    (journal, names)
}

#[tokio::test]
async fn names_outlive_their_purges_and_the_process() {
    let directory = tempdir().unwrap();
    let few = || Settings { limits: Limits { max_entries: 1, ..Limits::default() }, ..settings() };
    let journal = open_by(directory.path(), few()).unwrap();
    let first = names_of(&journal);
    for tag in ["a", "b", "c"] {
        journal.append(purge(tag)).await.unwrap();
    }
    assert_eq!(judge(&first, &first, 0, "a"), Judgement::Stale(StaleBecause::Purged(1)));
    let (_journal, now) = reopened(journal, &directory, few());
    assert_eq!(now.head(), 3);
    for (tag, position, verdict) in [
        ("a", 0, Judgement::Stale(StaleBecause::Purged(1))),
        ("a", 1, Judgement::Fresh),
        ("c", 2, Judgement::Stale(StaleBecause::Purged(3))),
        ("d", 0, Judgement::Fresh),
        // The run before ended at 3.
        ("d", 4, Judgement::Stale(StaleBecause::Foreign)),
    ] {
        assert_eq!(judge(&now, &first, position, tag), verdict, "{tag} at {position}");
    }
}

#[tokio::test]
async fn beyond_what_is_kept_of_names_the_floor_rises() {
    const KEPT: usize = 1_000;
    let directory = tempdir().unwrap();
    let few = || Settings { limits: Limits { max_names: KEPT, ..Limits::default() }, ..settings() };
    let journal = open_by(directory.path(), few()).unwrap();
    let first = names_of(&journal);
    for number in 0..3 * KEPT {
        journal.append(purge(&format!("t{number}"))).await.unwrap();
    }
    let (_journal, now) = reopened(journal, &directory, few());
    let head = now.head();
    assert_eq!(judge(&now, &first, 1, "another"), Judgement::Stale(StaleBecause::Forgotten));
    // Half of them at least are known one by one.
    let known = head - KEPT as Position / 2;
    assert_eq!(judge(&now, &first, known, "another"), Judgement::Fresh);
    let last = format!("t{}", 3 * KEPT - 1);
    assert_eq!(judge(&now, &first, known, &last), Judgement::Stale(StaleBecause::Purged(head)));
}

#[tokio::test]
async fn what_a_version_without_names_has_appended_is_not_known() {
    let directory = tempdir().unwrap();
    let journal = open(directory.path());
    let first = names_of(&journal);
    journal.append(purge("a")).await.unwrap();
    drop(journal);
    // As one that notes no names leaves it.
    let database = redb::Database::open(directory.path().join(opening::JOURNAL)).unwrap();
    let transaction = database.begin_write().unwrap();
    let record = serde_json::to_vec(&Entry { position: 2, at_ms: 1, purge: purge("b"), origin: None }).unwrap();
    transaction.open_table(change::ENTRIES).unwrap().insert(2, record.as_slice()).unwrap();
    transaction.open_table(change::HEAD).unwrap().insert((), 2).unwrap();
    transaction.commit().unwrap();
    drop(database);
    let forever = Settings { limits: Limits { retention: Duration::MAX, ..Limits::default() }, ..settings() };
    let journal = open_by(directory.path(), forever).unwrap();
    let now = names_of(&journal);
    assert_eq!(judge(&now, &first, 1, "b"), Judgement::Stale(StaleBecause::Forgotten));
}

#[tokio::test]
async fn tags_of_blocks_and_caches_that_began_sealed_are_remembered() {
    let directory = tempdir().unwrap();
    let sealed = |is_sealed| Cursor { is_sealed, relies_on_seals: true, ..Cursor::at(0) };
    let journal = open(directory.path());
    journal.note_unsealable(vec![Name::of_tag(b"block")]).await.unwrap();
    journal.save_cursors(vec![(node("v1"), sealed(true)), (node("v2"), sealed(false))]).await.unwrap();
    let (journal, now) = reopened(journal, &directory, settings());
    assert!(now.unsealable().has_any(&[Name::of_tag(b"block")]) && !now.unsealable().has_any(&[Name::of_tag(b"a")]));
    assert_eq!(journal.cursors(), [(node("v1"), sealed(true)), (node("v2"), sealed(false))].into());
    // What comes into a cache without seals has none. That it holds what only seals kept from readers stays true.
    let (journal, _) = reopened(journal, &directory, Settings { seals: false, ..settings() });
    let unsealed = [(node("v1"), sealed(false)), (node("v2"), sealed(false))].into();
    assert_eq!(journal.cursors(), unsealed);
    let (journal, _) = reopened(journal, &directory, settings());
    assert_eq!(journal.cursors(), unsealed);
    journal.save_cursors(vec![(node("v1"), Cursor::at(0))]).await.unwrap();
    let (journal, _) = reopened(journal, &directory, settings());
    assert_eq!(journal.cursors(), [(node("v1"), Cursor::at(0)), (node("v2"), sealed(false))].into());
}

#[tokio::test]
async fn a_cache_that_a_version_without_seals_has_filled_is_not_sealed() {
    let directory = tempdir().unwrap();
    let journal = open(directory.path());
    journal.save_cursors(vec![(node("v1"), Cursor { is_sealed: true, ..Cursor::at(0) })]).await.unwrap();
    drop(journal);
    // As one that does not seal saves a cursor.
    let database = redb::Database::open(directory.path().join(opening::JOURNAL)).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction.open_table(change::CURSORS).unwrap().insert("v1", (0, crate::clock::now_ms() + 1)).unwrap();
    transaction.commit().unwrap();
    drop(database);
    assert!(!open(directory.path()).cursors()[&node("v1")].is_sealed);
}
