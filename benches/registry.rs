//! A thousand nodes in etcd and ten thousand changes of them, in bursts, while clients read through the edge: the time
//! until a change is in the fleet, the cost of the changes, and whether they cost a request.
//!
//! etcd and clearcoat share the machine. The nodes get no traffic and few health checks: the measured time is from
//! etcd's confirmation of a change until `/api/v1/fleet` shows it; that is polled meanwhile, so the polling is part of
//! each time.

#[path = "../tests/it"]
mod it {
    #[allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "written for the tests, which need all of it")]
    pub mod support;
}

use std::sync::Arc;
use std::time::{Duration, Instant};

use it::support::client::get;
use it::support::etcd::Etcd;
use it::support::eventually;
use it::support::fleet::{Fleet, Plan};
use it::support::reader::{Outage, Reader};
use it::support::web::{Shop, Web};

const NODES: usize = 1000;
const BURSTS: usize = 10;
const SINGLES: usize = 200;

fn key(node: usize) -> String {
    format!("/clearcoat/v1/nodes/web/idle-{node}")
}

fn value(node: usize, mark: &str) -> String {
    format!("{{\"address\":\"127.1.{}.{}:9\",\"weight\":0,\"zone\":\"{mark}\"}}", node / 250, node % 250 + 1)
}

/// The number of nodes with this label.
fn marked(fleet: &Fleet, mark: &str) -> usize {
    let answer = get(fleet.clearcoat.admin, "/api/v1/fleet").expect("the admin listener answers");
    answer.text().matches(&format!("\"zone\":\"{mark}\"")).count()
}

fn until_marked(fleet: &Fleet, mark: &str, nodes: usize) -> Duration {
    let began = Instant::now();
    eventually("the changes are in the fleet", || (marked(fleet, mark) == nodes).then_some(()));
    began.elapsed()
}

/// The CPU time of the process so far.
fn cpu(fleet: &Fleet) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", fleet.clearcoat.pid())).expect("our child");
    let fields: Vec<&str> = stat.rsplit(") ").next().expect("a line").split(' ').collect();
    let ticks = |field: usize| fields[field].parse::<u64>().expect("a number");
    // utime and stime, in hundredths of a second.
    Duration::from_millis((ticks(11) + ticks(12)) * 10)
}

fn print(what: &str, times: &mut [Duration]) {
    times.sort();
    let percentile = |percent: usize| times[(times.len() * percent).div_ceil(100).max(1) - 1].as_secs_f64() * 1e3;
    println!("{what:<58}{:>9.1} ms{:>9.1} ms{:>9.1} ms", percentile(50), percentile(99), percentile(100));
}

fn main() {
    let etcd = Etcd::start();
    let config = format!(
        "[log]\nlevel = \"info\"\nformat = \"json\"\n[registry]\nkind = \"etcd\"\n[registry.etcd]\nendpoints = {:?}\n\
         [health.web]\ninterval = \"60s\"\npanic_threshold = 0\n",
        etcd.endpoints()
    );
    let shop = Arc::new(Shop::default());
    let web: Vec<Web> = (0..2).map(|_| Web::start(&shop)).collect();
    for (number, web) in web.iter().enumerate() {
        etcd.put(&format!("/clearcoat/v1/nodes/web/web-{number}"), &web.address.to_string());
    }
    let fleet = Fleet::launch(&Plan { varnish: 0, web: 0, config: config.leak(), ..Plan::default() });
    fleet.clearcoat.ready();
    let all = |mark: &str| etcd.put_many((0..NODES).map(|node| (key(node), value(node, mark))));
    all("first");
    until_marked(&fleet, "first", NODES);

    let reader = Reader::start(fleet.clearcoat.edge, 10, Outage::None);
    let mut singles: Vec<Duration> = (0..SINGLES)
        .map(|number| {
            let mark = format!("single-{number}");
            etcd.put(&key(number), &value(number, &mark));
            until_marked(&fleet, &mark, 1)
        })
        .collect();
    let (before, began) = (cpu(&fleet), Instant::now());
    let version = || fleet.clearcoat.fleet()["version"].as_u64().expect("a version");
    let first = version();
    let mut bursts: Vec<Duration> = (0..BURSTS)
        .map(|number| {
            let mark = format!("burst-{number}");
            all(&mark);
            until_marked(&fleet, &mark, NODES)
        })
        .collect();
    let (spent, took, snapshots) = (cpu(&fleet) - before, began.elapsed(), version() - first);

    println!("{NODES} nodes in etcd, from etcd's answer to the fleet, as read from the API");
    println!("{:<58}{:>12}{:>12}{:>12}", "", "median", "p99", "longest");
    print(&format!("one change, {SINGLES} times"), &mut singles);
    print(&format!("the last of {NODES} changes, {BURSTS} times"), &mut bursts);
    println!(
        "{} changes in {:.2} s: {:.2} s of CPU with all the reading, {snapshots} snapshots; {} requests, none lost",
        NODES * BURSTS,
        took.as_secs_f64(),
        spent.as_secs_f64(),
        reader.reads()
    );
    reader.stop();
}
