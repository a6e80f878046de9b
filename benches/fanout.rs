//! One purge to two hundred Varnish nodes: the time until the last of them has acknowledged it, through clearcoat and
//! in Magento's own way, node by node. Both in one run, against the same nodes.
//!
//! The nodes are simulated: each answers after [`THINK`], which stands for the round trip.

#[path = "../tests/it"]
mod it {
    #[allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "written for the tests, which need all of it")]
    pub mod support;
}

use std::time::{Duration, Instant};

use it::support::client::{exchange, purge, tag};
use it::support::fleet::{Fleet, Plan};
use it::support::simulated::SimulatedFleet;

const NODES: usize = 200;
const PURGES: usize = 50;
const THINK: Duration = Duration::from_millis(2);

/// The duration of each purge.
fn measure(name: &str, simulated: &SimulatedFleet, purge_tag: impl Fn(&str)) -> Vec<Duration> {
    let one = |number| {
        let name = format!("{name}_{number}");
        let began = Instant::now();
        purge_tag(&name);
        let took = began.elapsed();
        assert_eq!(simulated.told_of(&name), NODES, "{name} did not reach every node");
        took
    };
    // The first purge opens connections.
    one(0);
    (1..=PURGES).map(one).collect()
}

fn milliseconds(sorted: &[Duration], percentile: usize) -> f64 {
    sorted[(sorted.len() * percentile).div_ceil(100).max(1) - 1].as_secs_f64() * 1e3
}

fn main() {
    let simulated = SimulatedFleet::start(NODES, THINK);
    let fleet = Fleet::start(&Plan { varnish: 0, web: 0, config: simulated.toml().leak(), ..Plan::default() });
    let mut through_clearcoat = measure("fanned_out", &simulated, |name| {
        let answer = purge(fleet.clearcoat.purge, &tag(name)).expect("an answer").json();
        assert_eq!(answer["applied"].as_array().map(Vec::len), Some(NODES), "{answer}");
    });
    // Magento's client: a connection for each node, read to the end of the answer and closed.
    let mut one_by_one = measure("one_by_one", &simulated, |name| {
        for node in &simulated.nodes {
            let request =
                format!("PURGE / HTTP/1.1\r\nX-Magento-Tags-Pattern: {}\r\nHost: 127.0.0.1\r\n\r\n", tag(name));
            assert_eq!(exchange(node.address, request).expect("an answer").status, 200);
        }
    });
    through_clearcoat.sort();
    one_by_one.sort();

    println!(
        "{PURGES} purges to {NODES} simulated Varnish nodes that take {THINK:?} each, until the last acknowledgement"
    );
    println!("{:<22}{:>12}{:>12}", "", "median", "p99");
    for (name, times) in [("clearcoat", &through_clearcoat), ("one after the other", &one_by_one)] {
        println!("{name:<22}{:>9.1} ms{:>9.1} ms", milliseconds(times, 50), milliseconds(times, 99));
    }
    let ratio = |percentile| milliseconds(&one_by_one, percentile) / milliseconds(&through_clearcoat, percentile);
    println!("{:<22}{:>11.1}x{:>11.1}x", "ratio", ratio(50), ratio(99));
}
