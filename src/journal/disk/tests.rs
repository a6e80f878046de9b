mod hanging;
mod sealed;
mod trust;

use std::error::Error as _;
use std::fs;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use redb::{BackendError, Database, StorageBackend};
use tempfile::{TempDir, tempdir};

use super::file::JournalFile;
use super::*;
use crate::journal::contract::{self, append_and_go_away, clock, entries, nobody, node, purge, url};
use crate::journal::{Anew, Missed};
use crate::telemetry::causes;

contract::suite!({
    let directory = tempdir().unwrap();
    move |limits, observer, clock| {
        let settings = Settings { limits, observer, ..settings() };
        Arc::new(Disk::open_with(directory.path(), settings, clock, Box::new(LocalFiles)).unwrap()) as Arc<dyn Journal>
    }
});

/// A simulated disk: it can be full, it can hold an fsync, and it counts them.
#[derive(Debug, Default)]
struct Fault {
    full: AtomicBool,
    syncs: AtomicUsize,
    held: Mutex<Hold>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Hold {
    #[default]
    Off,
    /// The next fsync waits.
    Next,
    /// One is waiting.
    Waiting,
}

impl Fault {
    fn open(self: &Arc<Self>, directory: &TempDir) -> Disk {
        self.open_with(directory, settings())
    }

    fn open_with(self: &Arc<Self>, directory: &TempDir, settings: Settings) -> Disk {
        let files = FaultyFiles(Arc::clone(self));
        Disk::open_with(directory.path(), settings, wall_clock(), Box::new(files)).unwrap()
    }

    fn check(&self) -> Result<(), std::io::Error> {
        if self.full.load(Ordering::SeqCst) { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    /// Releases an fsync that is held.
    fn hold_next_sync(&self) {
        *self.held.lock() = Hold::Next;
        self.changed.notify_all();
    }

    fn wait_until_held(&self) {
        self.changed.wait_while(&mut self.held.lock(), |held| *held != Hold::Waiting);
    }

    fn is_holding(&self) -> bool {
        *self.held.lock() == Hold::Waiting
    }

    fn release(&self) {
        *self.held.lock() = Hold::Off;
        self.changed.notify_all();
    }

    fn sync(&self) {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        let mut held = self.held.lock();
        if *held == Hold::Next {
            *held = Hold::Waiting;
            self.changed.notify_all();
            self.changed.wait_while(&mut held, |held| *held == Hold::Waiting);
        }
    }
}

struct FaultyFiles(Arc<Fault>);

impl Files for FaultyFiles {
    fn open(&self, path: &Path) -> Result<Database, redb::DatabaseError> {
        let disk = FaultyDisk { file: JournalFile::open(path)?, fault: Arc::clone(&self.0) };
        file::builder().create_with_backend(disk)
    }

    fn replace(&self, path: &Path, content: &[u8]) -> std::io::Result<()> {
        self.0.check()?;
        LocalFiles.replace(path, content)
    }
}

#[derive(Debug)]
struct FaultyDisk {
    file: JournalFile,
    fault: Arc<Fault>,
}

impl StorageBackend for FaultyDisk {
    fn len(&self) -> Result<u64, std::io::Error> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), std::io::Error> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> Result<(), std::io::Error> {
        self.fault.check()?;
        self.file.set_len(len)
    }

    fn sync_data(&self) -> Result<(), std::io::Error> {
        self.fault.sync();
        self.fault.check()?;
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), std::io::Error> {
        self.fault.check()?;
        self.file.write(offset, data)
    }

    fn close(&self) -> Result<(), std::io::Error> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }
}

/// Trusts a first start, and waits long for the disk.
fn settings() -> Settings {
    Settings {
        limits: Limits::default(),
        observer: nobody(),
        first_start: FirstStart::Trust,
        damaged: Damaged::Anew,
        seals: true,
        own_process: false,
        patience: Duration::from_secs(3600),
    }
}

fn told(error: &(dyn std::error::Error + 'static)) -> String {
    causes(error).to_string()
}

fn open_by(directory: &Path, settings: Settings) -> Result<Disk, OpenError> {
    Disk::open_with(directory, settings, wall_clock(), Box::new(LocalFiles))
}

fn open(directory: &Path) -> Disk {
    open_by(directory, settings()).unwrap()
}

fn open_error(directory: &Path) -> OpenError {
    open_by(directory, settings()).err().expect("the journal was opened")
}

fn open_at(directory: &TempDir, retention: Duration, clock: &Clock) -> Disk {
    let limits = Limits { retention, ..Limits::default() };
    Disk::open_with(directory.path(), Settings { limits, ..settings() }, Arc::clone(clock), Box::new(LocalFiles))
        .unwrap()
}

#[tokio::test]
async fn a_journal_that_is_opened_again_has_its_entries_head_and_cursors() {
    let directory = tempdir().unwrap();
    let journal = open(&directory.path().join("new/one"));
    journal.append(purge("a")).await.unwrap();
    journal.append(purge("b")).await.unwrap();
    let of_an_epoch = Cursor { epoch: Some("1700000000".into()), ..Cursor::at(1) };
    journal.save_cursors(vec![(node("v1"), of_an_epoch.clone()), (node("v2"), Cursor::at(1))]).await.unwrap();
    let before = entries(&journal, 0);
    drop(journal);
    let journal = open(&directory.path().join("new/one"));
    assert_eq!(entries(&journal, 0), before);
    assert_eq!((journal.head(), *journal.watch().borrow()), (2, 2));
    assert_eq!(journal.cursors(), [(node("v1"), of_an_epoch), (node("v2"), Cursor::at(1))].into());
    assert_eq!(journal.append(purge("c")).await.unwrap(), 3);
}

#[tokio::test]
async fn the_head_survives_when_every_entry_is_too_old() {
    const RETENTION: Duration = Duration::from_secs(60);
    let (directory, (now_ms, clock)) = (tempdir().unwrap(), clock());
    let journal = open_at(&directory, RETENTION, &clock);
    journal.append(purge("a")).await.unwrap();
    journal.append(purge("b")).await.unwrap();
    journal.save_cursors(vec![(node("v1"), Cursor::at(2))]).await.unwrap();
    drop(journal);
    now_ms.fetch_add(60_001, Ordering::SeqCst);
    for head in [2, 3] {
        let journal = open_at(&directory, RETENTION, &clock);
        assert_eq!(journal.head(), head);
        assert_eq!(journal.since(1), Missed::Truncated);
        assert!(journal.cursors().is_empty());
        journal.append(purge("c")).await.unwrap();
    }
}

#[tokio::test]
async fn what_retires_before_it_got_to_etcd_is_known_also_after_restarts() {
    let (directory, (now_ms, clock)) = (tempdir().unwrap(), clock());
    let spooled = |id: &str| NamedPurge {
        origin: EntryOrigin { id: id.into(), revision: None, ours: true },
        at_ms: now_ms.load(Ordering::SeqCst),
        purge: purge("a"),
        in_order: false,
    };
    let journal = open_at(&directory, Duration::from_secs(60), &clock);
    journal.append_named(spooled("a")).await.unwrap();
    drop(journal);
    now_ms.fetch_add(60_001, Ordering::SeqCst);
    for name in ["b", "c"] {
        let journal = open_at(&directory, Duration::from_secs(60), &clock);
        assert_eq!(journal.readable().position_map.lock().overflow(), 1, "before {name}");
        // Its commit deletes the row with the mark.
        journal.append_named(spooled(name)).await.unwrap();
    }
    let journal = open_at(&directory, Duration::from_secs(60), &clock);
    journal.readable().position_map.lock().clear_overflow(1, 9);
    journal.append_named(spooled("d")).await.unwrap();
    drop(journal);
    assert_eq!(open_at(&directory, Duration::from_secs(60), &clock).readable().position_map.lock().overflow(), 0);
}

#[tokio::test]
async fn what_was_refused_and_what_a_flush_may_leave_outlive_a_crash() {
    let (directory, crashed) = (tempdir().unwrap(), tempdir().unwrap());
    let few = || Settings { limits: Limits { max_entries: 3, ..Limits::default() }, ..settings() };
    let journal = open_by(directory.path(), few()).unwrap();
    for path in ["/a", "/b", "/c", "/d"] {
        journal.append(url(path)).await.unwrap();
    }
    journal.refuse(vec![2, 4]).await.unwrap();
    let copied = |count: usize| {
        // The file after a crash, with everything that was answered.
        let copy = crashed.path().join(count.to_string());
        fs::create_dir(&copy).unwrap();
        for file in ["journal.redb", "identity.json"] {
            fs::copy(directory.path().join(file), copy.join(file)).unwrap();
        }
        open_by(&copy, few()).unwrap()
    };
    let refused = |journal: &Disk| -> Vec<Position> { (0..9).filter(|it| journal.is_refused(*it)).collect() };
    let again = copied(0);
    assert_eq!((refused(&again), again.uncovered()), (vec![2, 4], 1));
    for tag in ["e", "f", "g"] {
        journal.append(purge(tag)).await.unwrap();
    }
    let again = copied(1);
    assert_eq!((refused(&again), again.uncovered()), (vec![], 3));
}

#[tokio::test]
async fn a_url_that_retires_while_nobody_runs_stays_known() {
    const RETENTION: Duration = Duration::from_secs(60);
    let (directory, (now_ms, clock)) = (tempdir().unwrap(), clock());
    let journal = open_at(&directory, RETENTION, &clock);
    for path in ["/a", "/b"] {
        journal.append(url(path)).await.unwrap();
    }
    journal.refuse(vec![2]).await.unwrap();
    drop(journal);
    now_ms.fetch_add(60_001, Ordering::SeqCst);
    for tag in ["c", "d"] {
        let journal = open_at(&directory, RETENTION, &clock);
        assert_eq!(journal.uncovered(), 1, "before {tag}");
        journal.append(purge(tag)).await.unwrap();
    }
}

#[tokio::test]
async fn a_refusal_that_the_disk_does_not_take_holds_in_this_process() {
    let (directory, fault) = (tempdir().unwrap(), Arc::new(Fault::default()));
    let journal = fault.open(&directory);
    journal.append(url("/a")).await.unwrap();
    fault.full.store(true, Ordering::SeqCst);
    journal.refuse(vec![1]).await.unwrap_err();
    assert!(journal.is_refused(1));
    fault.full.store(false, Ordering::SeqCst);
    drop(journal);
    assert!(!fault.open(&directory).is_refused(1));
}

#[tokio::test]
async fn entries_that_are_no_longer_held_are_deleted_from_the_file() {
    let directory = tempdir().unwrap();
    let few = Limits { max_entries: 2, ..Limits::default() };
    let journal = open_by(directory.path(), Settings { limits: few, ..settings() }).unwrap();
    for tag in ["a", "b", "c", "d"] {
        journal.append(purge(tag)).await.unwrap();
    }
    drop(journal);
    // The commit of an entry deletes what was dropped before.
    let journal = open(directory.path());
    assert_eq!(journal.since(0), Missed::Truncated);
    assert_eq!(entries(&journal, 1).len(), 3);
}

#[tokio::test]
async fn what_a_crash_leaves_behind_holds_every_answered_purge() {
    let (directory, crashed) = (tempdir().unwrap(), tempdir().unwrap());
    let journal = open(directory.path());
    for head in 1..=20 {
        journal.save_cursors(vec![(node("v1"), Cursor::at(head - 1))]).await.unwrap();
        journal.append(purge("a")).await.unwrap();
        for file in ["identity.json", "journal.redb"] {
            fs::copy(directory.path().join(file), crashed.path().join(file)).unwrap();
        }
        let left = open(crashed.path());
        assert_eq!(entries(&left, 0), entries(&journal, 0));
        assert_eq!(left.cursors(), [(node("v1"), Cursor::at(head - 1))].into());
    }
}

#[tokio::test]
async fn nothing_is_seen_of_a_purge_before_it_is_durable() {
    let (directory, fault) = (tempdir().unwrap(), Arc::new(Fault::default()));
    let journal = fault.open(&directory);
    fault.hold_next_sync();
    append_and_go_away(&journal, purge("a"));
    fault.wait_until_held();
    assert_eq!(journal.head(), 0);
    assert_eq!(journal.since(0), Missed::Entries(vec![]));
    fault.release();
    journal.watch().wait_for(|head| *head == 1).await.unwrap();
}

#[tokio::test]
async fn purges_that_gather_during_a_commit_share_the_next_one() {
    const GATHERED: usize = 64;
    let (directory, fault) = (tempdir().unwrap(), Arc::new(Fault::default()));
    let journal = fault.open(&directory);
    journal.append(purge("a")).await.unwrap();
    let before = fault.syncs.load(Ordering::SeqCst);
    journal.append(purge("a")).await.unwrap();
    let one_commit = fault.syncs.load(Ordering::SeqCst) - before;
    fault.hold_next_sync();
    append_and_go_away(&journal, purge("b"));
    fault.wait_until_held();
    let before = fault.syncs.load(Ordering::SeqCst);
    (0..GATHERED).for_each(|_| append_and_go_away(&journal, purge("c")));
    fault.release();
    journal.watch().wait_for(|head| *head == 3 + GATHERED as Position).await.unwrap();
    let syncs = fault.syncs.load(Ordering::SeqCst) - before;
    assert!(syncs <= 2 * one_commit, "{syncs} fsyncs for {GATHERED} purges, {one_commit} a commit");
}

#[tokio::test]
async fn cursors_alone_cost_no_fsync() {
    let (directory, fault) = (tempdir().unwrap(), Arc::new(Fault::default()));
    let journal = fault.open(&directory);
    journal.append(purge("a")).await.unwrap();
    let before = fault.syncs.load(Ordering::SeqCst);
    for _ in 0..100 {
        journal.save_cursors(vec![(node("v1"), Cursor::at(1))]).await.unwrap();
    }
    // Growing a file needs an fsync.
    let syncs = fault.syncs.load(Ordering::SeqCst) - before;
    assert!(syncs <= 1, "{syncs}");
}

#[tokio::test]
async fn a_full_disk_refuses_purges_and_a_freed_one_takes_them_again() {
    let (directory, fault) = (tempdir().unwrap(), Arc::new(Fault::default()));
    let journal = fault.open(&directory);
    journal.append(purge("a")).await.unwrap();
    fault.full.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        let error = journal.append(purge("refused")).await.unwrap_err();
        assert!(error.source().is_some());
        let told = told(&error);
        assert!(told.contains("journal.redb"), "{told}");
        assert_eq!((journal.head(), entries(&journal, 0).len()), (1, 1));
    }
    fault.full.store(false, Ordering::SeqCst);
    assert_eq!(journal.append(purge("b")).await.unwrap(), 2);
    let before = entries(&journal, 0);
    drop(journal);
    assert_eq!(entries(&fault.open(&directory), 0), before);
}

#[tokio::test]
async fn a_refused_group_that_reached_the_disk_is_not_there_after_the_next_one() {
    let (directory, fault) = (tempdir().unwrap(), Arc::new(Fault::default()));
    let journal = fault.open(&directory);
    journal.save_cursors(vec![(node("v1"), Cursor::at(0))]).await.unwrap();
    journal.append(purge("a")).await.unwrap();
    fault.hold_next_sync();
    append_and_go_away(&journal, purge("b"));
    fault.wait_until_held();
    (0..3).for_each(|_| append_and_go_away(&journal, purge("refused")));
    fault.hold_next_sync();
    fault.wait_until_held();
    // All three are written by now, and their fsync fails.
    assert_eq!(journal.head(), 2);
    fault.full.store(true, Ordering::SeqCst);
    fault.release();
    journal.append(purge("refused")).await.unwrap_err();
    fault.full.store(false, Ordering::SeqCst);
    assert_eq!(journal.append(purge("c")).await.unwrap(), 3);
    let before = entries(&journal, 0);
    drop(journal);
    let journal = fault.open(&directory);
    assert_eq!((journal.head(), entries(&journal, 0)), (3, before));
}

#[tokio::test]
async fn closing_finishes_what_was_queued() {
    let (directory, fault) = (tempdir().unwrap(), Arc::new(Fault::default()));
    let journal = fault.open(&directory);
    fault.hold_next_sync();
    append_and_go_away(&journal, purge("a"));
    fault.wait_until_held();
    append_and_go_away(&journal, purge("b"));
    let closing = std::thread::spawn(move || drop(journal));
    fault.release();
    closing.join().unwrap();
    assert_eq!(fault.open(&directory).head(), 2);
}

#[tokio::test]
async fn a_second_opener_is_told_who_has_the_journal() {
    let directory = tempdir().unwrap();
    let _journal = open(directory.path());
    let told = told(&open_error(directory.path()));
    let file = directory.path().join("journal.redb").display().to_string();
    assert!(told.starts_with("another clearcoat uses") && told.contains(&file), "{told}");
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let directory = tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let told = told(&open_error(&file.join("below")));
    assert!(told.contains(&file.join("below").display().to_string()) && told.contains("cannot be used"), "{told}");
}

#[test]
fn a_file_that_cannot_be_opened_is_named() {
    let directory = tempdir().unwrap();
    let file = directory.path().join("journal.redb");
    fs::create_dir(&file).unwrap();
    let told = told(&open_error(directory.path()));
    assert!(told.contains(&file.display().to_string()) && told.contains("cannot be opened"), "{told}");
}
