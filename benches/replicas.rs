//! The time for a purge to reach the other replica's Varnish: from a write to etcd, and from a request to one of two
//! clearcoats, until the other one has delivered it to all of three real Varnish nodes.
//!
//! Both clearcoats purge the same Varnish nodes; the measurement uses the cursors of the one that did not get the
//! request, as shown by `/api/v1/fleet`. That is polled meanwhile, so the polling is part of each time.

#[path = "../tests/it"]
mod it {
    #[allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "written for the tests, which need all of it")]
    pub mod support;
}

use std::time::{Duration, Instant};

use it::support::clearcoat::Clearcoat;
use it::support::client::{purge, tag};
use it::support::fleet::{Fleet, Plan};

const NODES: usize = 3;
const PURGES: usize = 500;
const PURGES_KEY: &str = "/clearcoat/v1/purges/";

/// Waits until all Varnish nodes of this clearcoat have everything up to this position.
fn told(clearcoat: &Clearcoat, position: u64) {
    let has = |node: &serde_json::Value| node["role"] != "varnish" || node["cursor"].as_u64() >= Some(position);
    while !clearcoat.nodes().iter().all(has) {}
}

/// Purges through one of the two; the answer has the position, which is the revision in etcd.
fn through_one(fleet: &Fleet, number: usize) -> u64 {
    let answer = purge(fleet.clearcoat.purge, &tag(&format!("cat_p_{number}"))).expect("an answer");
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["position"].as_u64().expect("a position")
}

fn line(name: &str, mut times: Vec<Duration>) {
    times.sort();
    let percentile = |percent: usize| times[(times.len() * percent).div_ceil(100).max(1) - 1].as_secs_f64() * 1e3;
    println!("{name:<52}{:>10.1} ms{:>10.1} ms", percentile(50), percentile(99));
}

fn main() {
    const CONFIG: &str = "[log]\nlevel = \"info\"\nformat = \"json\"\n\
                          [purge]\nlisten = [\"127.0.0.1:0\"]\nmax_bans_per_second = 0\n";
    let plan =
        Plan { varnish: NODES, web: 1, config: CONFIG, replicas: 2, etcd: 1, journal: "etcd", ..Plan::default() };
    let mut fleet = Fleet::start(&Plan { etcd_on_disk: true, ..plan });
    // A replica's record: written again under another name, it is another purge.
    told(&fleet.others[0], through_one(&fleet, 0));
    let (_, value) = fleet.etcd().list(PURGES_KEY).pop_last().expect("the purge");

    let (mut answered, mut through, mut written, mut read) = (vec![], vec![], vec![], vec![]);
    for number in 1..=PURGES {
        let began = Instant::now();
        let position = through_one(&fleet, number);
        answered.push(began.elapsed());
        told(&fleet.others[0], position);
        through.push(began.elapsed());

        let began = Instant::now();
        let revision = fleet.etcd().put(&format!("{PURGES_KEY}z-bench-{number:05}"), &value);
        written.push(began.elapsed());
        told(&fleet.others[0], revision.unsigned_abs());
        read.push(began.elapsed());
    }
    println!("{PURGES} purges, one after the other, to {NODES} Varnish behind two clearcoats\n");
    println!("{:<52}{:>13}{:>13}", "", "p50", "p99");
    line("a purge through one is answered", answered);
    line("  ... and the other has told all Varnish", through);
    line("a put to etcd is answered", written);
    line("  ... and a clearcoat that watches has told all", read);
}
