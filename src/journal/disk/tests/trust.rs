//! Which journals are trusted, and what happens to the others.

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::journal::CursorState;

const JOURNAL: &str = "journal.redb";

/// Damages the bytes of a file.
type Damaging = fn(&mut Vec<u8>);
type Fault = fn(&TempDir);

/// A journal of two purges that was closed properly, and a node that has both.
async fn used() -> TempDir {
    let directory = tempdir().unwrap();
    let journal = open(directory.path());
    journal.append(purge("find_me")).await.unwrap();
    journal.append(purge("b")).await.unwrap();
    journal.save_cursors(vec![(node("v1"), Cursor::at(2))]).await.unwrap();
    directory
}

fn file(directory: &TempDir) -> PathBuf {
    directory.path().join(JOURNAL)
}

/// The names of the files that were moved aside.
fn aside(directory: &TempDir) -> Vec<String> {
    let names = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("journal.redb.")).collect()
}

/// No node has a known cursor, however the process ends from here on.
async fn trusts_nobody(directory: &TempDir, reason: &str) {
    let mut heads = Vec::new();
    let journal = open(directory.path());
    assert_eq!(journal.anew().map(Anew::reason), Some(reason));
    heads.push(journal.head());
    drop(journal);
    for _ in 0..2 {
        let journal = open(directory.path());
        assert_eq!(journal.anew(), None, "said once");
        assert_eq!(journal.remembered(&node("v1"), None), CursorState::Unknown);
        assert!(journal.has_history(), "a node that nobody knows would be trusted");
        assert_eq!(journal.since(0), Missed::Truncated);
        heads.push(journal.head());
    }
    assert!(heads[0] > 0 && heads.windows(2).all(|two| two[0] == two[1]), "{heads:?}");
    let journal = open(directory.path());
    assert_eq!(journal.append(purge("c")).await.unwrap(), heads[0] + 1);
    assert_eq!(entries(&journal, heads[0]).len(), 1);
}

#[tokio::test]
async fn a_journal_that_is_whole_is_believed() {
    let directory = used().await;
    let journal = open(directory.path());
    assert_eq!((journal.anew(), journal.head()), (None, 2));
    assert_eq!(journal.remembered(&node("v1"), None), CursorState::At(2));
}

#[tokio::test]
async fn whatever_is_damaged_is_put_aside_and_nobody_is_trusted() {
    let faults: [(&str, Damaging); 8] = [
        ("another kind of file", |bytes| *bytes = b"not a database\n".repeat(10_000)),
        ("a byte", |bytes| *bytes = b"x".to_vec()),
        ("an entry", |bytes| {
            let places: Vec<usize> = (0..bytes.len() - 7).filter(|at| &bytes[*at..at + 7] == b"find_me").collect();
            places.iter().for_each(|at| bytes[*at] = b'X');
        }),
        ("every page", |bytes| bytes[4096..].iter_mut().step_by(64).for_each(|byte| *byte ^= 0xff)),
        ("the header", |bytes| bytes[..512].fill(0)),
        ("the end is cut off", |bytes| bytes.truncate(bytes.len() - 4096)),
        ("half is cut off", |bytes| bytes.truncate(bytes.len() / 2)),
        ("within the header", |bytes| bytes.truncate(200)),
    ];
    for (what, fault) in faults {
        let directory = used().await;
        let mut bytes = fs::read(file(&directory)).unwrap();
        fault(&mut bytes);
        fs::write(file(&directory), &bytes).unwrap();
        eprintln!("{what}");
        trusts_nobody(&directory, "damaged").await;
        let aside = aside(&directory);
        assert!(aside.len() == 1 && aside[0].starts_with("journal.redb.damaged-"), "{what}: {aside:?}");
        assert_eq!(fs::read(directory.path().join(&aside[0])).unwrap(), bytes, "{what}: it is left as it was");
    }
}

#[tokio::test]
async fn a_disk_that_lies_stops_the_start_and_a_file_that_is_cut_does_not() {
    let refusing = || Settings { damaged: Damaged::Refuse, ..settings() };
    let directory = used().await;
    let mut bytes = fs::read(file(&directory)).unwrap();
    bytes[4096..].iter_mut().step_by(64).for_each(|byte| *byte ^= 0xff);
    fs::write(file(&directory), &bytes).unwrap();
    for _ in 0..2 {
        let error = told(&open_by(directory.path(), refusing()).err().unwrap());
        for part in
            ["journal.redb is not a journal, or it is damaged", "move it away", "journal.damaged", "DB corrupted"]
        {
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(fs::read(file(&directory)).unwrap(), bytes, "it is left as it was");
    }
    // The remedy in the text.
    fs::rename(file(&directory), directory.path().join("away")).unwrap();
    trusts_nobody(&directory, "lost").await;

    let closed = used().await;
    let killed = used().await;
    let journal = open(killed.path());
    for page in 0..500 {
        journal.append(purge(&format!("cat_p_{page}"))).await.unwrap();
    }
    // The file after a kill.
    for whole in [fs::read(file(&closed)).unwrap(), fs::read(file(&killed)).unwrap()] {
        for length in [1, 31, 100, 319, 4096, 5000, whole.len() / 2, whole.len() - 4096, whole.len() - 1] {
            let directory = used().await;
            fs::write(file(&directory), &whole[..length]).unwrap();
            let journal = open_by(directory.path(), refusing()).unwrap_or_else(|error| panic!("{length}: {error}"));
            let reason = journal.anew().map(Anew::reason);
            // The bytes that were cut off may have been unused; then the other name is noticed.
            assert!(matches!(reason, Some("damaged" | "replaced")), "cut to {length}: {reason:?}");
        }
    }
}

/// Whichever byte is wrong, the journal is either intact or not trusted.
#[tokio::test]
async fn no_flipped_byte_is_believed() {
    let seed = fastrand::u64(..);
    eprintln!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let directory = used().await;
    let whole = fs::read(file(&directory)).unwrap();
    let marker = fs::read(directory.path().join("identity.json")).unwrap();
    for _ in 0..150 {
        let mut bytes = whole.clone();
        // Most of the file is unused.
        let within = if random.bool() { 4096 * 8 } else { bytes.len() };
        for _ in 0..random.usize(1..20) {
            bytes[random.usize(..within)] ^= random.u8(1..);
        }
        let directory = tempdir().unwrap();
        fs::write(file(&directory), bytes).unwrap();
        fs::write(directory.path().join("identity.json"), &marker).unwrap();
        let journal = open(directory.path());
        if journal.anew().is_none() {
            let purges: Vec<_> = entries(&journal, 0).iter().map(|entry| entry.purge.clone()).collect();
            assert_eq!(purges, [purge("find_me"), purge("b")]);
            // The cursor is from a commit without an fsync, and the commit before it has none.
            assert!(matches!(journal.remembered(&node("v1"), None), CursorState::At(2) | CursorState::Unknown));
        }
    }
}

#[tokio::test]
async fn a_journal_that_is_gone_or_empty_is_noticed_by_what_is_left() {
    let faults: [(&str, Fault); 5] = [
        ("removed", |directory| fs::remove_file(file(directory)).unwrap()),
        ("cut to nothing", |directory| fs::write(file(directory), "").unwrap()),
        ("moved aside by hand", |directory| {
            fs::rename(file(directory), directory.path().join("journal.redb.away")).unwrap();
            fs::remove_file(directory.path().join("identity.json")).unwrap();
        }),
        ("only the fleet is left", |directory| {
            fs::remove_file(file(directory)).unwrap();
            fs::rename(directory.path().join("identity.json"), directory.path().join("fleet.json")).unwrap();
        }),
        ("a marker that nobody can read is left", |directory| {
            fs::remove_file(file(directory)).unwrap();
            fs::write(directory.path().join("identity.json"), "{").unwrap();
        }),
    ];
    for (what, fault) in faults {
        let directory = used().await;
        fault(&directory);
        eprintln!("{what}");
        trusts_nobody(&directory, "lost").await;
    }
}

#[tokio::test]
async fn another_journal_in_its_place_is_noticed() {
    let (ours, other) = (used().await, used().await);
    fs::copy(file(&other), file(&ours)).unwrap();
    trusts_nobody(&ours, "replaced").await;
    let aside = aside(&ours);
    assert!(aside.len() == 1 && aside[0].starts_with("journal.redb.replaced-"), "{aside:?}");
}

#[tokio::test]
async fn an_older_copy_is_noticed_and_no_position_is_given_twice() {
    let directory = used().await;
    let copy = fs::read(file(&directory)).unwrap();
    let journal = open(directory.path());
    for tag in ["c", "d", "e"] {
        journal.append(purge(tag)).await.unwrap();
    }
    drop(journal);
    fs::write(file(&directory), copy).unwrap();
    let journal = open(directory.path());
    assert!(matches!(journal.anew(), Some(Anew::Replaced(reason)) if reason.contains("ends at 2, and had come to 5")));
    assert_eq!(journal.head(), 6);
    drop(journal);
    fs::remove_file(file(&directory)).unwrap();
    assert_eq!(open(directory.path()).head(), 7);
}

#[tokio::test]
async fn a_journal_without_its_marker_is_believed_only_if_it_is_older() {
    let directory = used().await;
    fs::remove_file(directory.path().join("identity.json")).unwrap();
    trusts_nobody(&directory, "replaced").await;

    let directory = used().await;
    fs::remove_file(directory.path().join("identity.json")).unwrap();
    edit(&directory, |transaction| {
        transaction.delete_table(change::FORMATS).unwrap();
        transaction.delete_table(change::IDENTITY).unwrap();
    });
    let journal = open(directory.path());
    assert_eq!((journal.anew(), journal.remembered(&node("v1"), None)), (None, CursorState::At(2)));
    drop(journal);
    // From here on the directory has both.
    fs::remove_file(directory.path().join("identity.json")).unwrap();
    trusts_nobody(&directory, "replaced").await;
}

#[tokio::test]
async fn the_first_start_is_trusted_only_where_somebody_says_so() {
    let first = |first_start| Settings { first_start, ..settings() };
    for first_start in [FirstStart::Flush, FirstStart::Trust] {
        let directory = tempdir().unwrap();
        // A new ext4 volume has this.
        fs::create_dir(directory.path().join("lost+found")).unwrap();
        let journal = open_by(directory.path(), first(first_start)).unwrap();
        let is_flush = first_start == FirstStart::Flush;
        assert_eq!(journal.anew(), is_flush.then_some(&Anew::FirstStart));
        assert_eq!(journal.has_history(), is_flush);
        drop(journal);
        // The next start is not a first one.
        let journal = open_by(directory.path(), first(FirstStart::Flush)).unwrap();
        assert_eq!((journal.anew(), journal.has_history()), (None, is_flush));
    }
}

#[tokio::test]
async fn a_file_of_a_newer_format_is_left_alone() {
    let directory = used().await;
    edit(&directory, |transaction| _ = transaction.open_table(change::FORMATS).unwrap().insert((), 3).unwrap());
    let text = told(&open_error(directory.path()));
    for part in ["journal.redb", "written by a newer clearcoat", "format 3", "reads up to 2"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(aside(&directory).is_empty());

    let directory = used().await;
    fs::write(directory.path().join("identity.json"), r#"{"format":7,"whatever":[]}"#).unwrap();
    let text = told(&open_error(directory.path()));
    assert!(text.contains("identity.json") && text.contains("format 7"), "{text}");
}

#[tokio::test]
async fn fields_that_a_later_version_adds_are_passed_over() {
    let directory = used().await;
    put(&directory, 2, r#"{"at":9,"by":"10.0.0.5","purge":{"targets":["everything"],"reason":"cron"}}"#);
    let journal = open(directory.path());
    assert_eq!(journal.anew(), None);
    let held = entries(&journal, 1);
    assert_eq!((held[0].at_ms, &held[0].purge), (9, &Purge::everything()));
}

#[tokio::test]
async fn a_purge_that_this_version_does_not_know_is_one_of_everything() {
    for record in [
        r#"{"at":2000000000000,"purge":{"targets":["new"]}}"#,
        r#"{"at":2000000000000,"purge":{"targets":[{"tags":"a","new":{"x":[1]}}]}}"#,
        r#"{"at":2000000000000,"purges":[]}"#,
        r#"{"at":2000000000000,"purge":{"#,
        "\u{0}\u{1}",
    ] {
        let directory = used().await;
        put(&directory, 2, record);
        let journal = open(directory.path());
        assert_eq!(journal.anew(), None, "{record}");
        assert_eq!(entries(&journal, 0)[0].purge, purge("find_me"));
        assert_eq!(entries(&journal, 1)[0].purge, Purge::everything(), "{record}");
    }
}

#[tokio::test]
async fn a_hole_between_positions_and_a_cursor_of_no_node_are_damage() {
    let faults: [fn(&redb::WriteTransaction); 2] = [
        |transaction| {
            let mut table = transaction.open_table(change::ENTRIES).unwrap();
            table.insert(4, br#"{"at":1,"purge":{"targets":["everything"]}}"#.as_slice()).unwrap();
        },
        |transaction| {
            _ = transaction.open_table(change::CURSORS).unwrap().insert("no node\n", (1, u64::MAX)).unwrap();
        },
    ];
    for fault in faults {
        let directory = used().await;
        edit(&directory, fault);
        trusts_nobody(&directory, "damaged").await;
    }
}

#[tokio::test]
async fn a_journal_removed_while_in_use_refuses_and_begins_a_new_file() {
    let faults: [(&str, Fault); 2] = [
        ("the file", |directory| fs::remove_file(file(directory)).unwrap()),
        ("the directory", |directory| fs::remove_dir_all(directory.path()).unwrap()),
    ];
    for (what, fault) in faults {
        let directory = used().await;
        let journal = open(directory.path());
        fault(&directory);
        let error = told(&journal.append(purge("refused")).await.unwrap_err());
        assert!(error.contains("journal.redb") && error.contains("removed or replaced"), "{what}: {error}");
        assert_eq!(journal.append(purge("c")).await.unwrap(), 3, "{what}");
        assert_eq!(entries(&journal, 0).len(), 3, "{what}: what is in memory is as good as ever");
        journal.save_cursors(vec![(node("v1"), Cursor::at(1))]).await.unwrap();
        drop(journal);
        // The file has only the later entries.
        let journal = open(directory.path());
        assert_eq!((journal.anew(), journal.head(), journal.since(1)), (None, 3, Missed::Truncated), "{what}");
        assert_eq!(entries(&journal, 2).len(), 1, "{what}");
    }
}

#[tokio::test]
async fn what_a_removed_file_had_of_urls_is_in_doubt_in_the_new_one() {
    let directory = tempdir().unwrap();
    let journal = open(directory.path());
    journal.append(url("/a")).await.unwrap();
    journal.append(url("/b")).await.unwrap();
    // The purge is no longer held.
    journal.refuse(vec![2]).await.unwrap();
    fs::remove_file(file(&directory)).unwrap();
    journal.append(purge("refused")).await.unwrap_err();
    journal.append(purge("c")).await.unwrap();
    drop(journal);
    let journal = open(directory.path());
    assert_eq!((journal.since(1), journal.uncovered()), (Missed::Truncated, 2));
}

#[tokio::test]
async fn a_file_from_before_refusals_were_marked_is_read() {
    let directory = used().await;
    edit(&directory, |transaction| {
        transaction.delete_table(change::REFUSED).unwrap();
        transaction.delete_table(change::UNCOVERED).unwrap();
    });
    let journal = open(directory.path());
    assert_eq!((journal.anew(), journal.head(), journal.is_refused(1), journal.uncovered()), (None, 2, false, 0));
    journal.refuse(vec![1]).await.unwrap();
    drop(journal);
    assert!(open(directory.path()).is_refused(1));
}

#[tokio::test]
async fn another_journal_that_is_moved_over_it_while_it_is_in_use_takes_nothing() {
    let (ours, other) = (used().await, used().await);
    let journal = open(ours.path());
    fs::rename(file(&other), file(&ours)).unwrap();
    for _ in 0..2 {
        journal.append(purge("refused")).await.unwrap_err();
    }
    let error = told(&journal.append(purge("refused")).await.unwrap_err());
    assert!(error.contains("replaced by another journal"), "{error}");
    assert!(journal.trouble().unwrap().reason.contains("replaced by another journal"));
    drop(journal);
    trusts_nobody(&ours, "replaced").await;
}

/// Changes the file of a closed journal.
fn edit(directory: &TempDir, change: impl FnOnce(&redb::WriteTransaction)) {
    let database = Database::create(file(directory)).unwrap();
    let transaction = database.begin_write().unwrap();
    change(&transaction);
    transaction.commit().unwrap();
}

/// Replaces the record of an entry.
fn put(directory: &TempDir, position: Position, record: &str) {
    edit(directory, |transaction| {
        let mut table = transaction.open_table(change::ENTRIES).unwrap();
        table.insert(position, record.as_bytes()).unwrap();
    });
}
