//! The fleet, the readers and the purger of these tests.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::support::clearcoat::Clearcoat;
use crate::support::client::{get, purge, tag};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::reader::{Outage, Reader};
use crate::support::web::Shop;

pub const PURGES: &str = "/clearcoat/v1/purges/";
pub const REPLICAS: &str = "/clearcoat/v1/replicas/";

/// `purge.ack_timeout` of the plan, and the tolerance for a busy machine.
const ACK: Duration = Duration::from_millis(1_000);
const SLACK: Duration = Duration::from_millis(2_000);

const PAGES: [u64; 2] = [1, 2];

/// Two replicas, two Varnish nodes and two web nodes in an etcd of three members.
pub fn plan() -> Plan {
    Plan {
        varnish: 2,
        replicas: 2,
        etcd: 3,
        journal: "etcd",
        registered: true,
        config: "[admin]\nlisten = [\"127.0.0.1:0\"]\ntoken_file = \"tests/it/data/operator-token\"\n[registry]\nkind = \"etcd\"\n[health.web]\ninterval = \"500ms\"\ntimeout = \"400ms\"\n",
        ..Plan::default()
    }
}

/// The duration of an outage.
pub fn outage() -> Duration {
    let longer = std::env::var("CLEARCOAT_OUTAGE_SECONDS").map(|seconds| seconds.parse().expect("seconds"));
    Duration::from_secs(longer.unwrap_or(2))
}

/// The fleet under load. Fields are dropped in this order.
pub struct Rig {
    load: Option<Load>,
    pub fleet: Fleet,
    /// Purges in etcd that are not from the purger.
    pub others: u64,
}

/// Readers behind each replica, and a purger that alternates between both.
struct Load {
    state: Arc<State>,
    purger: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    stop: AtomicBool,
    /// The number of answered purges.
    answered: AtomicU64,
    told: Mutex<Told>,
}

/// The contents of the answers.
#[derive(Default)]
struct Told {
    slowest: Duration,
    unconfirmed: u64,
    bad: Vec<String>,
}

impl Rig {
    pub fn start(plan: &Plan) -> Self {
        let fleet = Fleet::start(plan);
        for clearcoat in fleet.clearcoats() {
            eventually("the nodes are known", || (clearcoat.nodes().len() == 4).then_some(()));
            clearcoat.ready();
        }
        PAGES.iter().for_each(|page| fleet.warm(&format!("/p/{page}")));
        Rig { load: Some(Load::start(&fleet)), fleet, others: 0 }
    }

    /// The number of answered purges so far.
    pub fn answered(&self) -> u64 {
        self.load.as_ref().expect("load").state.answered.load(Ordering::SeqCst)
    }

    /// Waits until this many more purges were answered.
    pub fn more(&self, purges: u64) {
        let enough = self.answered() + purges;
        eventually("there are more purges", || (self.answered() >= enough).then_some(()));
    }

    /// Waits for the duration of an outage, with at least some purges in it.
    pub fn suffer(&self) {
        let (began, before) = (Instant::now(), self.answered());
        let long_enough = || (began.elapsed() >= outage() && self.answered() > before + 6).then_some(());
        crate::support::eventually_within(outage() + crate::support::PATIENCE, "an outage is over", long_enough);
    }

    /// Waits until no replica has a purge that is not in etcd, and etcd answers both. Returns how long that took.
    pub fn recovers(&self, what: &str) {
        let began = Instant::now();
        // These purges notice every broken part at the latest.
        self.more(4);
        for clearcoat in self.fleet.clearcoats() {
            eventually("a replica works with etcd again", || is_in_step(clearcoat).then_some(()));
        }
        println!("{what}: in step with etcd again after {} ms", began.elapsed().as_millis());
    }

    /// Stops readers and purger; every answer was good. Then all copies are complete: each Varnish has the last pages,
    /// each journal and etcd every purge.
    pub fn ends(&mut self, what: &str) {
        let version = self.load.take().expect("load").end(what);
        for clearcoat in self.fleet.clearcoats() {
            clearcoat.current();
            eventually("everything is in etcd", || is_in_step(clearcoat).then_some(()));
        }
        self.settle();
        for clearcoat in self.fleet.clearcoats() {
            PAGES.iter().for_each(|page| {
                let text = get(clearcoat.edge, &format!("/p/{page}")).expect("the edge answers").text().to_owned();
                assert_eq!(text, version.to_string());
            });
        }
        for (varnish, page) in self.fleet.varnish.iter().flat_map(|varnish| PAGES.map(|page| (varnish, page))) {
            assert_eq!(varnish.get(&format!("/p/{page}")).text(), version.to_string(), "{}", varnish.id);
        }
        let in_etcd = self.in_etcd();
        assert_eq!(in_etcd.len() as u64, version + self.others, "one key for each purge");
        (0..=self.fleet.others.len()).for_each(|number| self.holds_all(number, &in_etcd));
    }

    /// Purges until every journal has etcd's order again, so that a position says what a journal holds. A purge for
    /// which etcd was too slow has a position in the journal that is older than its revision.
    fn settle(&mut self) {
        eventually("the last purge has its place in every journal", || {
            for clearcoat in self.fleet.clearcoats() {
                let answer = purge(clearcoat.purge, &tag("settled")).expect("the purge listener answers");
                assert_eq!(answer.status, 200, "{answer:?}");
                self.others += 1;
            }
            let newest = self.newest();
            self.fleet.clearcoats().all(|clearcoat| clearcoat.fleet()["head"].as_i64() >= Some(newest)).then_some(())
        });
    }

    /// The revision of the last purge in etcd.
    fn newest(&mut self) -> i64 {
        self.fleet.etcd().entries(PURGES).iter().map(|entry| entry.create_revision()).max().unwrap_or(0)
    }

    /// The names of the purges in etcd.
    pub fn in_etcd(&mut self) -> BTreeSet<String> {
        let keys = self.fleet.etcd().list(PURGES).into_keys();
        keys.map(|key| key[PURGES.len()..].to_owned()).filter(|key| key != "floor").collect()
    }

    /// Waits until a replica has the last purge, kills it, and compares its disk.
    pub fn holds_all(&mut self, number: usize, names: &BTreeSet<String>) {
        let newest = self.newest();
        let clearcoat = self.fleet.replica(number);
        eventually("a journal has the last purge", || {
            (clearcoat.fleet()["head"].as_i64() >= Some(newest)).then_some(())
        });
        clearcoat.kill();
        assert_eq!(self.on_disk(number), *names, "the journal of replica {}", number + 1);
    }

    /// The names of the purges in the journal of a killed replica.
    fn on_disk(&self, number: usize) -> BTreeSet<String> {
        const ORIGINS: TableDefinition<u64, (&str, u64)> = TableDefinition::new("origins");
        let file = self.fleet.journal_of(number).join("journal.redb");
        // The process that writes it has lost its clearcoat, and is about to exit.
        let database = eventually("the journal is let go", || match Database::open(&file) {
            Err(redb::DatabaseError::DatabaseAlreadyOpen) => None,
            opened => Some(opened.expect("a journal")),
        });
        let origins = database.begin_read().expect("a journal").open_table(ORIGINS).expect("a journal with names");
        let name = |row: Result<(_, redb::AccessGuard<'_, (&str, u64)>), _>| row.expect("a row").1.value().0.to_owned();
        origins.iter().expect("rows").map(name).collect()
    }
}

/// Whether it has no purge that is not in etcd, and follows etcd.
fn is_in_step(clearcoat: &Clearcoat) -> bool {
    let fleet = clearcoat.fleet();
    fleet["spooled"] == 0 && fleet["registry"]["connected"] == true
}

impl Load {
    fn start(fleet: &Fleet) -> Self {
        let readers: Vec<Reader> =
            fleet.clearcoats().map(|clearcoat| Reader::start(clearcoat.edge, 2, Outage::None)).collect();
        let listeners: Vec<SocketAddr> = fleet.clearcoats().map(|clearcoat| clearcoat.purge).collect();
        let (state, shop) = (Arc::<State>::default(), Arc::clone(&fleet.shop));
        let of_thread = Arc::clone(&state);
        let purger = std::thread::spawn(move || of_thread.purge_until_stopped(&listeners, &shop, readers));
        Load { state, purger: Some(purger) }
    }

    /// Returns the last version.
    fn end(mut self, what: &str) -> u64 {
        self.join();
        let told = self.state.told.lock().unwrap();
        let answered = self.state.answered.load(Ordering::SeqCst);
        println!(
            "{what}: {answered} purges, the slowest {} ms, {} with a replica that had not confirmed",
            told.slowest.as_millis(),
            told.unconfirmed
        );
        assert!(told.bad.is_empty(), "{} bad answers to purges: {:#?}", told.bad.len(), told.bad.first());
        answered
    }

    fn join(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        if let Some(purger) = self.purger.take() {
            assert!(purger.join().is_ok() || std::thread::panicking(), "a reader or the purger has failed");
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.join();
    }
}

impl State {
    fn purge_until_stopped(&self, listeners: &[SocketAddr], shop: &Shop, readers: Vec<Reader>) {
        let tags = PAGES.map(|page| tag(&format!("cat_p_{page}"))).join("|");
        for version in 1.. {
            if self.stop.load(Ordering::SeqCst) {
                break;
            }
            // A pace that leaves the machine to the code under test.
            std::thread::sleep(Duration::from_millis(20));
            PAGES.iter().for_each(|page| shop.set(*page, version));
            let began = Instant::now();
            let answer = purge(listeners[version as usize % listeners.len()], &tags);
            let took = began.elapsed();
            let mut told = self.told.lock().unwrap();
            told.slowest = told.slowest.max(took);
            match answer {
                Ok(answer) if answer.status == 200 && took < ACK + SLACK => {
                    told.unconfirmed += u64::from(!answer.json()["unconfirmed"].is_null());
                }
                answer => told.bad.push(format!("purge {version} after {} ms: {answer:?}", took.as_millis())),
            }
            drop(told);
            readers.iter().for_each(|reader| reader.promise(version));
            self.answered.store(version, Ordering::SeqCst);
        }
        readers.into_iter().for_each(Reader::stop);
    }
}
