//! A storm of purges: clients that purge one tag after the other, as Magento's consumers and cron jobs do, with three
//! real Varnish nodes. Through clearcoat with its journal on disk (with fsync), where the edge knows a purge before it is
//! answered or every Varnish; through one and two clearcoats with a journal in an etcd of one member (with fsync too); and in
//! Magento's own way, node by node. In turns, in one run.
//!
//! The clients write the bytes of Magento's client, on a new connection for each request, and read the complete answer.
//! With two clearcoats, each client alternates between them.

#[path = "../tests/it"]
mod it {
    #[allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "written for the tests, which need all of it")]
    pub mod support;
}

use std::io::Write;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use it::support::client::{exchange, tag};
use it::support::fleet::{Fleet, Plan};

const NODES: usize = 3;
const ROUNDS: usize = 3;
const ROUND: Duration = Duration::from_secs(4);

/// The target of purges.
struct Target {
    name: &'static str,
    fleet: Fleet,
    /// Without clearcoat, each Varnish in turn.
    one_by_one: bool,
}

impl Target {
    fn new(name: &'static str, plan: &Plan, one_by_one: bool) -> Self {
        let fleet = Fleet::start(&Plan { varnish: NODES, web: 1, ..*plan });
        if plan.first_start == "flush" {
            fleet.seals();
        }
        Target { name, fleet, one_by_one }
    }

    /// The addresses of successive purges: each list is for one purge.
    fn visits(&self) -> Vec<Vec<SocketAddr>> {
        if self.one_by_one {
            return vec![self.fleet.varnish.iter().map(|varnish| varnish.address).collect()];
        }
        self.fleet.clearcoats().map(|clearcoat| vec![clearcoat.purge]).collect()
    }

    /// The number of bans that one Varnish has got from clearcoat.
    fn bans(&self) -> f64 {
        const SENT: &str = "clearcoat_bans_sent_total{node=\"varnish-1\"}";
        self.fleet.clearcoats().map(|clearcoat| clearcoat.metric(SENT)).sum()
    }
}

/// The measurements of a target with a number of clients.
struct Way<'a> {
    target: &'a Target,
    clients: usize,
    times: Vec<Duration>,
    seconds: f64,
    bans: f64,
}

impl<'a> Way<'a> {
    fn new(target: &'a Target, clients: usize) -> Self {
        Way { target, clients, times: Vec::new(), seconds: 0.0, bans: 0.0 }
    }

    /// All clients purge for one round, each time another tag.
    fn round(&mut self, next: &AtomicU64) {
        let visits = self.target.visits();
        let before = self.target.bans();
        let began = Instant::now();
        std::thread::scope(|scope| {
            let client = |number: usize| {
                let mut times = Vec::new();
                for visit in visits.iter().cycle().skip(number % visits.len()) {
                    if began.elapsed() >= ROUND {
                        break;
                    }
                    let pattern = tag(&format!("cat_p_{}", next.fetch_add(1, Ordering::Relaxed)));
                    let request =
                        format!("PURGE / HTTP/1.1\r\nX-Magento-Tags-Pattern: {pattern}\r\nHost: 127.0.0.1\r\n\r\n");
                    let sent = Instant::now();
                    for &address in visit {
                        assert_eq!(exchange(address, &request).expect("an answer").status, 200);
                    }
                    times.push(sent.elapsed());
                }
                times
            };
            let clients: Vec<_> = (0..self.clients).map(|number| scope.spawn(move || client(number))).collect();
            clients.into_iter().for_each(|client| self.times.extend(client.join().expect("a client")));
        });
        self.seconds += began.elapsed().as_secs_f64();
        self.bans += self.target.bans() - before;
    }

    fn rate(&self) -> f64 {
        self.times.len() as f64 / self.seconds
    }

    /// With its rate as a ratio to each of the two baselines.
    fn print(&self, [magento, disk]: [f64; 2]) {
        let mut times = self.times.clone();
        times.sort();
        let percentile = |percent: usize| times[(times.len() * percent).div_ceil(100).max(1) - 1].as_secs_f64() * 1e3;
        let bans = if self.target.one_by_one { self.rate() } else { self.bans / self.seconds };
        println!(
            "{:<42}{:>8}{:>10.0}{:>10.2}{:>10.2}{:>10.1} ms{:>10.1} ms{:>10.1}",
            self.target.name,
            self.clients,
            self.rate(),
            self.rate() / magento,
            self.rate() / disk,
            percentile(50),
            percentile(99),
            bans
        );
    }
}

const MAGENTO: &str = "Magento, one Varnish after the other";
const DISK: &str = "clearcoat, on disk";
const WAITS: &str = "clearcoat, on disk, waits for Varnish";
const RATION: &str = "the same with the ration of bans";

fn targets() -> [Target; 6] {
    const LOG: &str = "[log]\nlevel = \"info\"\nformat = \"json\"\n";
    const NO_RATION: &str = "[log]\nlevel = \"info\"\nformat = \"json\"\n\
                             [purge]\nlisten = [\"127.0.0.1:0\"]\nmax_bans_per_second = 0\nwait_for = \"varnish\"\n";
    const WITH_RATION: &str = "[log]\nlevel = \"info\"\nformat = \"json\"\n\
                               [purge]\nlisten = [\"127.0.0.1:0\"]\nwait_for = \"varnish\"\n";
    let plan = |config| Plan { config, ..Plan::default() };
    let etcd = |replicas| Plan { journal: "etcd", etcd: 1, etcd_on_disk: true, replicas, ..plan(NO_RATION) };
    [
        Target::new(DISK, &Plan { first_start: "flush", ..plan(LOG) }, false),
        Target::new(WAITS, &plan(NO_RATION), false),
        Target::new(RATION, &plan(WITH_RATION), false),
        Target::new("clearcoat, in etcd", &etcd(1), false),
        Target::new("two clearcoats, in etcd", &etcd(2), false),
        Target::new(MAGENTO, &plan(LOG), true),
    ]
}

/// The median time of an fsync after a write of 4 KiB.
fn fsync() -> Duration {
    let mut file = tempfile::tempfile().expect("a file");
    let mut times: Vec<Duration> = (0..200)
        .map(|_| {
            let began = Instant::now();
            file.write_all(&[7; 4096]).expect("written");
            file.sync_data().expect("synced");
            began.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}

/// How a single purge fares, in turns: of a page that nobody asked for, of one that has just passed, and with a Varnish that hangs.
fn print_circumstances() {
    const PURGES: usize = 100;
    let target = Target::new("", &Plan { first_start: "flush", ..Plan::default() }, false);
    let fleet = &target.fleet;
    let mut page = 0_usize;
    let mut purges = |times: &mut Vec<Duration>, has_passed: bool| {
        for _ in 0..PURGES {
            page += 1;
            if has_passed {
                assert_eq!(fleet.get(&format!("/p/{page}")).status, 200);
            }
            let sent = Instant::now();
            assert_eq!(fleet.purge_tag(&format!("cat_p_{page}")).status, 200);
            times.push(sent.elapsed());
        }
    };
    let mut of = [const { Vec::new() }; 4];
    for _ in 0..ROUNDS {
        purges(&mut of[0], false);
        purges(&mut of[1], true);
        fleet.varnish[0].hang();
        purges(&mut of[2], false);
        purges(&mut of[3], true);
        fleet.varnish[0].resume();
        fleet.clearcoat.current();
    }
    println!("\none purge at a time, {} of each, clearcoat with its journal on disk", of[0].len());
    println!("{:<60}{:>13}{:>13}", "", "ack p50", "ack p99");
    for (name, times) in [
        "of a page that nobody asked for",
        "of a page that has just passed",
        "of a page that nobody asked for, while one Varnish hangs",
        "of a page that has just passed, while one Varnish hangs",
    ]
    .into_iter()
    .zip(&mut of)
    {
        times.sort();
        let percentile = |percent: usize| times[(times.len() * percent).div_ceil(100) - 1].as_secs_f64() * 1e3;
        println!("{name:<60}{:>10.2} ms{:>10.2} ms", percentile(50), percentile(99));
    }
}

fn main() {
    let targets = targets();
    let next = AtomicU64::new(0);
    println!(
        "purges of one tag to {NODES} Varnish, {ROUNDS} rounds of {ROUND:?} each, in turns; the ratios are of purges/s to"
    );
    println!("Magento's way and to the first line; bans are those of one Varnish\n");
    println!("an fsync of 4 KiB where the journals are: p50 {:.2} ms\n", fsync().as_secs_f64() * 1e3);
    println!(
        "{:<42}{:>8}{:>10}{:>10}{:>10}{:>13}{:>13}{:>10}",
        "", "clients", "purges/s", "/Magento", "/disk", "ack p50", "ack p99", "bans/s"
    );
    for clients in [20, 1] {
        let mut ways: Vec<Way> = targets.iter().map(|target| Way::new(target, clients)).collect();
        for _ in 0..ROUNDS {
            ways.iter_mut().for_each(|way| way.round(&next));
        }
        let peers = [MAGENTO, DISK]
            .map(|name| ways.iter().find(|way| way.target.name == name).expect("both were measured").rate());
        ways.iter().for_each(|way| way.print(peers));
    }
    drop(targets);
    print_circumstances();
}
