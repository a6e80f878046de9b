//! The journal in etcd with real members, one for each test.

use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicU16;

use super::*;
use crate::config;
use crate::etcd::{EtcdCluster as Cluster, Session};
use crate::journal::contract::{self, entries, nobody, node, purge};
use crate::journal::{Missed, PurgeObserver};

/// A running etcd while this value lives. It has its own address, so that no two tests meet.
struct Member {
    child: Child,
    url: String,
    folder: tempfile::TempDir,
}

impl Member {
    fn start() -> Self {
        static COUNT: AtomicU16 = AtomicU16::new(1);
        let [high, low] = COUNT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        // Below 127.128, which the integration tests use.
        let [a, b] = (std::process::id() as u16).to_be_bytes();
        let address = Ipv4Addr::new(127, 64 | (a & 63), b, low.wrapping_add(high));
        let folder = tempfile::tempdir().unwrap();
        let url = format!("http://{address}:2379");
        Member { child: spawn(folder.path(), &url), url, folder }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        self.child = spawn(self.folder.path(), &self.url);
    }

    fn cluster(&self) -> SharedEtcd {
        Arc::new(Cluster::new(&config::Etcd { endpoints: vec![self.url.clone()], ..config::Etcd::default() }))
    }

    async fn session(&self) -> Session {
        let cluster = self.cluster();
        loop {
            match cluster.connect().await {
                Ok(session) => return session,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // It may have been killed already.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

fn spawn(folder: &Path, url: &str) -> Child {
    let peer = url.replace(":2379", ":2380");
    let mut command = Command::new("etcd");
    command.args(["--listen-client-urls", url, "--advertise-client-urls", url]);
    command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
    // A single member has no others to wait for.
    command.args(["--heartbeat-interval", "10", "--election-timeout", "100"]);
    command.args(["--initial-cluster", &format!("default={peer}"), "--data-dir"]).arg(folder.join("etcd"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("etcd is installed (make test installs it)")
}

fn settings(limits: Limits, observer: PurgeObserver) -> Settings {
    Settings {
        limits,
        observer,
        first_start: config::FirstStart::Trust,
        seals: false,
        damaged: config::Damaged::Refuse,
        own_process: false,
        patience: Duration::from_secs(10),
    }
}

/// A journal with its dependencies.
struct Rig {
    journal: Option<Etcd>,
    folder: tempfile::TempDir,
}

impl Rig {
    async fn new(member: &Member, limits: Limits) -> Self {
        _ = member.session().await;
        let mut rig = Rig { journal: None, folder: tempfile::tempdir().unwrap() };
        rig.open(member.cluster(), limits).await;
        rig
    }

    async fn open(&mut self, cluster: SharedEtcd, limits: Limits) {
        self.open_at(cluster, limits, wall_clock()).await;
    }

    async fn open_at(&mut self, cluster: SharedEtcd, limits: Limits, clock: Clock) {
        self.close().await;
        let journal = Etcd::open_with(self.folder.path(), settings(limits, nobody()), cluster, clock).await;
        self.journal = Some(journal.unwrap());
    }

    /// Returns when its file can be opened again.
    async fn close(&mut self) {
        if let Some(mut journal) = self.journal.take() {
            journal._tasks.shutdown().await;
        }
    }

    fn journal(&self) -> &Etcd {
        self.journal.as_ref().unwrap()
    }

    /// The tags of all held purges in order.
    fn tags(&self) -> Vec<String> {
        let tag = |entry: &Arc<crate::journal::Entry>| match &entry.purge.targets[0] {
            crate::purge::Target::Tags(tags) => tags.iter().collect::<Vec<_>>().join(","),
            other => format!("{other:?}"),
        };
        let held = self.journal().inner.local.lag(0).entries;
        match self.journal().since(0) {
            Missed::Entries(entries) => entries.iter().map(tag).collect(),
            Missed::Truncated => vec![format!("a gap, and {held} more")],
        }
    }

    async fn has(&self, tags: &[&str]) {
        let mut head = self.journal().watch();
        let arrived = async {
            loop {
                let mut held = self.tags();
                held.sort();
                if held == tags {
                    return;
                }
                head.changed().await.unwrap();
            }
        };
        let arrived = tokio::time::timeout(PATIENCE, arrived).await;
        assert!(arrived.is_ok(), "{:?} and not {tags:?}", self.tags());
    }

    async fn uploaded(&self) {
        eventually("everything is in etcd", || (self.journal().spooled() == Some(0)).then_some(())).await;
    }
}

const PATIENCE: Duration = Duration::from_secs(30);

async fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let began = std::time::Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(began.elapsed() < PATIENCE, "gave up waiting until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// An etcd journal for the suite, which opens journals synchronously.
struct Suite {
    journal: Etcd,
    _member: Member,
    _folder: tempfile::TempDir,
}

impl Journal for Suite {
    fn readable(&self) -> &Readable {
        self.journal.readable()
    }

    fn append(&self, purge: Purge) -> BoxFuture<'_, Result<Position, WriteError>> {
        self.journal.append(purge)
    }

    fn save_cursors(&self, cursors: Vec<(NodeId, Cursor)>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.journal.save_cursors(cursors)
    }

    fn refuse(&self, positions: Vec<Position>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.journal.refuse(positions)
    }

    fn note_unsealable(&self, names: Vec<Name>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.journal.note_unsealable(names)
    }
}

fn suite(limits: Limits, observer: PurgeObserver, clock: Clock) -> Arc<dyn Journal> {
    tokio::task::block_in_place(|| {
        tokio::runtime::Handle::current().block_on(async {
            let member = Member::start();
            _ = member.session().await;
            let folder = tempfile::tempdir().unwrap();
            let journal =
                Etcd::open_with(folder.path(), settings(limits, observer), member.cluster(), clock).await.unwrap();
            eventually("purges can be written", || journal.inner.uplink.session()).await;
            Arc::new(Suite { journal, _member: member, _folder: folder }) as Arc<dyn Journal>
        })
    })
}

contract::suite!(suite);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_position_is_the_revision_of_its_entry_and_the_same_in_every_replica() {
    let member = Member::start();
    let (a, b) = (Rig::new(&member, Limits::default()).await, Rig::new(&member, Limits::default()).await);
    let session = member.session().await;
    for rig in [&a, &b] {
        eventually("purges can be written", || rig.journal().inner.uplink.session()).await;
    }
    let mut positions = Vec::new();
    for (rig, tag) in [(&a, "a"), (&b, "b"), (&a, "c")] {
        // Others write to etcd, too.
        session.request(async |mut client| client.put("/other", tag, None).await).await.unwrap();
        positions.push(rig.journal().append(purge(tag)).await.unwrap());
    }
    for rig in [&a, &b] {
        rig.has(&["a", "b", "c"]).await;
        let held: Vec<Position> = entries(rig.journal(), 0).iter().map(|entry| entry.position).collect();
        assert_eq!(held, positions);
    }
    let options = etcd_client::GetOptions::new().with_prefix();
    let listed = session.request(async |mut client| client.get("/clearcoat/v1/purges/", Some(options)).await).await;
    let mut revisions: Vec<u64> = listed.unwrap().kvs().iter().map(|kv| kv.mod_revision() as u64).collect();
    revisions.sort_unstable();
    assert_eq!(revisions, positions);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn purges_go_on_without_etcd_and_are_in_every_journal_afterwards() {
    let mut member = Member::start();
    let (a, b) = (Rig::new(&member, Limits::default()).await, Rig::new(&member, Limits::default()).await);
    for (rig, tag) in [(&a, "a"), (&b, "b")] {
        rig.journal().append(purge(tag)).await.unwrap();
    }
    for rig in [&a, &b] {
        rig.has(&["a", "b"]).await;
    }
    member.kill();
    let before = a.journal().head();
    for (rig, tag) in [(&a, "c"), (&b, "d"), (&a, "e")] {
        let position = rig.journal().append(purge(tag)).await.unwrap();
        assert!(position > before);
    }
    a.has(&["a", "b", "c", "e"]).await;
    b.has(&["a", "b", "d"]).await;
    member.restart();
    for rig in [&a, &b] {
        rig.has(&["a", "b", "c", "d", "e"]).await;
        rig.uploaded().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_spooled_survives_a_restart_without_etcd() {
    let mut member = Member::start();
    let mut rig = Rig::new(&member, Limits::default()).await;
    rig.journal().append(purge("a")).await.unwrap();
    member.kill();
    let position = rig.journal().append(purge("b")).await.unwrap();
    rig.journal().save_cursors(vec![(node("v"), Cursor::at(position))]).await.unwrap();
    rig.open(member.cluster(), Limits::default()).await;
    assert_eq!(rig.tags(), ["a", "b"]);
    assert_eq!(rig.journal().head(), position);
    assert_eq!(rig.journal().remembered(&node("v"), None), CursorState::At(position));
    assert_eq!(rig.journal().spooled(), Some(1));
    member.restart();
    rig.uploaded().await;
    assert_eq!(rig.tags(), ["a", "b"], "a purge was taken in twice");
    let other = Rig::new(&member, Limits::default()).await;
    other.has(&["a", "b"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_replica_starts_from_the_cursors_of_the_others() {
    let member = Member::start();
    let rig = Rig::new(&member, Limits::default()).await;
    let first = rig.journal().append(purge("a")).await.unwrap();
    let second = rig.journal().append(purge("b")).await.unwrap();
    let of_an_epoch = Cursor { epoch: Some("1".into()), relies_on_seals: true, ..Cursor::at(second) };
    rig.journal()
        .save_cursors(vec![(node("behind"), Cursor::at(first)), (node("current"), of_an_epoch)])
        .await
        .unwrap();
    let session = member.session().await;
    let began = std::time::Instant::now();
    while session
        .request(async |mut client| {
            let options = etcd_client::GetOptions::new().with_prefix().with_count_only();
            client.get("/clearcoat/v1/cursors/", Some(options)).await
        })
        .await
        .unwrap()
        .count()
        < 2
    {
        assert!(began.elapsed() < PATIENCE, "cursors are not published");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let new = Rig::new(&member, Limits::default()).await;
    let behind = new.journal().remembered(&node("behind"), None);
    let CursorState::At(position) = behind else { panic!("{behind:?}") };
    assert!((first..second).contains(&position), "{position}");
    assert_eq!(new.journal().remembered(&node("current"), Some("1")), CursorState::At(second));
    assert_eq!(new.journal().remembered(&node("current"), Some("2")), CursorState::CacheRestarted);
    assert_eq!(new.journal().remembered(&node("stranger"), None), CursorState::Unknown);
    // What only seals keep from readers is known to one that was never there.
    let relies = |id, epoch| new.journal().relies_on_seals(&node(id), Some(epoch));
    assert_eq!([relies("current", "1"), relies("current", "2"), relies("behind", "1")], [true, false, false]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_who_was_away_for_longer_than_purges_are_kept_has_a_gap() {
    let member = Member::start();
    let limits = Limits { retention: Duration::from_secs(2), ..Limits::default() };
    let mut away = Rig::new(&member, Limits::default()).await;
    let there = Rig::new(&member, limits).await;
    away.journal().append(purge("a")).await.unwrap();
    there.has(&["a"]).await;
    let cursor = away.journal().head();
    away.close().await;
    there.journal().append(purge("b")).await.unwrap();
    let session = member.session().await;
    let began = std::time::Instant::now();
    loop {
        let options = etcd_client::GetOptions::new().with_prefix().with_keys_only();
        let listed = session.request(async |mut client| client.get("/clearcoat/v1/purges/", Some(options)).await).await;
        let keys: Vec<String> =
            listed.unwrap().kvs().iter().map(|kv| String::from_utf8_lossy(kv.key()).into_owned()).collect();
        if keys == ["/clearcoat/v1/purges/floor"] {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "purges are not deleted: {keys:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    away.open(member.cluster(), Limits::default()).await;
    assert_eq!(away.journal().since(cursor), Missed::Truncated);
    assert!(away.journal().head() > cursor);
    // Nothing is missing here, deleted or not.
    let head = there.journal().head();
    assert_eq!(there.journal().since(head), Missed::Entries(vec![]));
    // A gap does not stay for ever.
    let head = away.journal().head();
    away.open(member.cluster(), Limits::default()).await;
    assert_eq!((away.journal().head(), away.journal().since(head)), (head, Missed::Entries(vec![])));
}

/// The clock of this machine, shifted by this number of seconds.
fn apart(seconds: i64) -> Clock {
    let clock = wall_clock();
    Arc::new(move || clock().saturating_add_signed(seconds * 1000))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clocks_that_differ_by_days_make_no_gap_and_delete_nothing_early() {
    let member = Member::start();
    let limits = Limits { retention: Duration::from_secs(4), ..Limits::default() };
    let rig = Rig::new(&member, limits).await;
    let (mut ahead, mut behind) = (Rig::new(&member, limits).await, Rig::new(&member, limits).await);
    for (other, seconds) in [(&mut ahead, 200_000), (&mut behind, -200_000)] {
        other.open_at(member.cluster(), limits, apart(seconds)).await;
        eventually("purges can be written", || other.journal().inner.uplink.session()).await;
    }
    eventually("purges can be written", || rig.journal().inner.uplink.session()).await;
    let cursors: Vec<Position> = [&rig, &ahead, &behind].iter().map(|rig| rig.journal().head()).collect();
    rig.journal().append(purge("a")).await.unwrap();
    ahead.journal().append(purge("b")).await.unwrap();
    behind.journal().append(purge("c")).await.unwrap();
    // By the dates of the other machines, some of these would have expired on arrival.
    for (rig, cursor) in [&rig, &ahead, &behind].into_iter().zip(cursors) {
        rig.has(&["a", "b", "c"]).await;
        assert!(matches!(rig.journal().since(cursor), Missed::Entries(entries) if entries.len() == 3));
    }
    // Each expires once it has been here for the retention.
    let session = member.session().await;
    let began = std::time::Instant::now();
    loop {
        let options = etcd_client::GetOptions::new().with_prefix().with_keys_only();
        let listed = session.request(async |mut client| client.get("/clearcoat/v1/purges/", Some(options)).await).await;
        let keys = listed.unwrap().kvs().len();
        assert!(keys >= 3 || began.elapsed() > limits.retention - Duration::from_secs(1), "deleted too early");
        if keys == 1 {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "purges are not deleted");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_in_etcd_before_us_was_answered_and_what_comes_live_was_not() {
    let member = Member::start();
    let (there, mut other) = (Rig::new(&member, Limits::default()).await, Rig::new(&member, Limits::default()).await);
    other.has(&[]).await;
    other.close().await;
    there.journal().append(purge("before")).await.unwrap();
    there.uploaded().await;
    other.open(member.cluster(), Limits::default()).await;
    other.has(&["before"]).await;
    let answered = other.journal().answered();
    let before = *answered.borrow();
    assert_eq!(before, other.journal().head());
    there.journal().append(purge("live")).await.unwrap();
    other.has(&["before", "live"]).await;
    assert_eq!(*answered.borrow(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_can_read_is_taken_for_a_purge_of_everything() {
    let member = Member::start();
    let rig = Rig::new(&member, Limits::default()).await;
    let session = member.session().await;
    session.request(async |mut client| client.put("/clearcoat/v1/purges/x", "{", None).await).await.unwrap();
    rig.has(&["Everything"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_of_purges_beyond_the_clients_own_limit_is_read() {
    let member = Member::start();
    let session = member.session().await;
    let large = "x".repeat(100_000);
    for number in 0..60 {
        let (key, value) = (format!("/clearcoat/v1/purges/{number:02}"), large.as_str());
        session.request(async |mut client| client.put(key, value, None).await).await.unwrap();
    }
    let rig = Rig::new(&member, Limits::default()).await;
    rig.has(&["Everything"; 60]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_replica_tells_of_is_taken_in_once() {
    let member = Member::start();
    let rig = Rig::new(&member, Limits::default()).await;
    let told =
        |id: &str, revision| PurgeMessage { id: id.to_owned(), revision, at_ms: 1_900_000_000_000, purge: purge(id) };
    let first = rig.journal().admit(vec![told("a", None), told("b", None)]).await.unwrap();
    assert_eq!(rig.journal().admit(vec![told("a", None)]).await.unwrap(), first - 1);
    // We upload it to etcd, too, since its own replica cannot.
    rig.uploaded().await;
    assert_eq!(rig.tags(), ["a", "b"]);
    let other = Rig::new(&member, Limits::default()).await;
    other.has(&["a", "b"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn purges_that_a_restored_etcd_has_lost_are_there_again() {
    let mut member = Member::start();
    let rig = Rig::new(&member, Limits::default()).await;
    rig.journal().append(purge("kept")).await.unwrap();
    // The backup has the state of this moment.
    member.kill();
    let backup = member.folder.path().join("backup");
    let copied = Command::new("cp").arg("-a").arg(member.folder.path().join("etcd")).arg(&backup).status().unwrap();
    assert!(copied.success());
    member.restart();
    _ = member.session().await;
    eventually("purges can be written again", || rig.journal().inner.uplink.session()).await;
    let lost = rig.journal().append(purge("lost")).await.unwrap();
    rig.uploaded().await;
    member.kill();
    std::fs::remove_dir_all(member.folder.path().join("etcd")).unwrap();
    std::fs::rename(&backup, member.folder.path().join("etcd")).unwrap();
    member.restart();
    _ = member.session().await;
    let session = member.session().await;
    let began = std::time::Instant::now();
    loop {
        let options = etcd_client::GetOptions::new().with_prefix().with_count_only();
        let listed = session.request(async |mut client| client.get("/clearcoat/v1/purges/", Some(options)).await).await;
        if listed.unwrap().count() == 2 {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "the lost purge is not written again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(rig.tags(), ["kept", "lost"]);
    // Positions increase, whatever the revisions do.
    assert!(rig.journal().append(purge("new")).await.unwrap() > lost);
    let other = Rig::new(&member, Limits::default()).await;
    other.has(&["kept", "lost", "new"]).await;
}

#[test]
fn names_are_in_the_order_of_their_time_and_know_their_process() {
    let names = Names { process: 7, count: AtomicU64::new(0) };
    let (early, late) = (names.next(999), names.next(1_900_000_000_000));
    assert!(early < late && *late < *FLOOR);
    assert!(names.are_ours(&late) && !Names { process: 8, count: AtomicU64::new(0) }.are_ours(&late));
}
