//! A storm of purges: twenty clients that purge one tag after the other, as Magento's consumers and cron jobs do, before
//! three real Varnish. Through clearcoat (journal on disk, with fsync), and in Magento's own way, which visits the Varnish
//! nodes one after the other. In turns, in one run.
//!
//! The clients write the bytes of Magento's client, on a connection of its own for each request, and read the answer to
//! its end.

#[path = "../tests/it"]
mod it {
    #[allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "written for the tests, which need all of it")]
    pub mod support;
}

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use it::support::client::{exchange, tag};
use it::support::fleet::{Fleet, Plan};

const NODES: usize = 3;
const ROUNDS: usize = 3;
const ROUND: Duration = Duration::from_secs(4);

/// One way to purge, and what was measured of it.
struct Way {
    name: &'static str,
    clients: usize,
    fleet: Fleet,
    /// Past clearcoat, each node in turn.
    one_by_one: bool,
    times: Vec<Duration>,
    seconds: f64,
    bans: f64,
}

impl Way {
    fn new(name: &'static str, clients: usize, config: &'static str, one_by_one: bool) -> Self {
        let fleet = Fleet::start(&Plan { varnish: NODES, web: 1, config, ..Plan::default() });
        fleet.clearcoat.ready();
        Way { name, clients, fleet, one_by_one, times: Vec::new(), seconds: 0.0, bans: 0.0 }
    }

    /// Everybody purges for one round, each time another tag.
    fn round(&mut self, next: &AtomicU64) {
        let targets: Vec<SocketAddr> = if self.one_by_one {
            self.fleet.varnish.iter().map(|varnish| varnish.address).collect()
        } else {
            vec![self.fleet.clearcoat.purge]
        };
        let sent = |fleet: &Fleet| fleet.clearcoat.metric("clearcoat_bans_sent_total{node=\"varnish-1\"}");
        let before = sent(&self.fleet);
        let began = Instant::now();
        std::thread::scope(|scope| {
            let client = || {
                let mut times = Vec::new();
                while began.elapsed() < ROUND {
                    let pattern = tag(&format!("cat_p_{}", next.fetch_add(1, Ordering::Relaxed)));
                    let request =
                        format!("PURGE / HTTP/1.1\r\nX-Magento-Tags-Pattern: {pattern}\r\nHost: 127.0.0.1\r\n\r\n");
                    let sent = Instant::now();
                    for &target in &targets {
                        assert_eq!(exchange(target, &request).expect("an answer").status, 200);
                    }
                    times.push(sent.elapsed());
                }
                times
            };
            let clients: Vec<_> = (0..self.clients).map(|_| scope.spawn(client)).collect();
            clients.into_iter().for_each(|client| self.times.extend(client.join().expect("a client")));
        });
        self.seconds += began.elapsed().as_secs_f64();
        self.bans += if self.one_by_one { 0.0 } else { sent(&self.fleet) - before };
    }

    fn print(&mut self) {
        self.times.sort();
        let purges = self.times.len();
        let percentile = |percent: usize| self.times[(purges * percent).div_ceil(100).max(1) - 1].as_secs_f64() * 1e3;
        let bans = if self.one_by_one { purges as f64 } else { self.bans };
        println!(
            "{:<42}{:>8}{:>12.0}{:>10.1} ms{:>10.1} ms{:>14.1}",
            self.name,
            self.clients,
            purges as f64 / self.seconds,
            percentile(50),
            percentile(99),
            bans / self.seconds
        );
    }
}

fn main() {
    const QUIET: &str = "[log]\nlevel = \"info\"\nformat = \"json\"\n";
    const NO_LIMIT: &str = "[log]\nlevel = \"info\"\nformat = \"json\"\n\
                            [purge]\nlisten = [\"127.0.0.1:0\"]\nmax_bans_per_second = 0\n";
    let mut ways = [
        Way::new("clearcoat", 20, QUIET, false),
        Way::new("clearcoat, max_bans_per_second = 0", 20, NO_LIMIT, false),
        Way::new("Magento, one Varnish after the other", 20, QUIET, true),
        Way::new("clearcoat, max_bans_per_second = 0", 1, NO_LIMIT, false),
        Way::new("Magento, one Varnish after the other", 1, QUIET, true),
    ];
    let next = AtomicU64::new(0);
    for _ in 0..ROUNDS {
        ways.iter_mut().for_each(|way| way.round(&next));
    }
    println!(
        "purges of one tag to {NODES} Varnish, {ROUNDS} rounds of {ROUND:?} each, in turns; bans are those of one Varnish"
    );
    println!("{:<42}{:>8}{:>12}{:>13}{:>13}{:>14}", "", "clients", "purges/s", "ack p50", "ack p99", "bans/s");
    ways.iter_mut().for_each(Way::print);
}
