//! A returning node first gets a small share of the traffic.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;

use crate::support::client::get;
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};

/// A slow start that is far from its end while the test counts, without bounded load, which would move keys too.
const CONFIG: &str = "[edge]\nlisten = [\"127.0.0.1:0\"]\nbounded_load = 0\n
    [health.web]\ninterval = \"500ms\"\ntimeout = \"500ms\"\nslow_start = \"120s\"\n
    [health.varnish]\ninterval = \"500ms\"\ntimeout = \"500ms\"\nslow_start = \"120s\"\n";

const REQUESTS: u64 = 300;

/// The share of these requests for different pages that go to the first of two nodes.
fn part_of_the_first(fleet: &Fleet, listener: &str, role: &str, address: SocketAddr) -> f64 {
    let counts = || {
        let series =
            |number| format!("clearcoat_{listener}_requests_total{{code_class=\"2xx\",node=\"{role}-{number}\"}}");
        [1, 2].map(|number| fleet.clearcoat.metric(&series(number)))
    };
    let before = counts();
    for page in 0..REQUESTS {
        assert_eq!(get(address, &format!("/p/{page}")).expect("an answer").status, 200);
    }
    // A request is counted slightly after its answer has arrived.
    eventually("all are counted", || {
        let after = counts();
        let [first, second] = [after[0] - before[0], after[1] - before[1]];
        (first + second == REQUESTS as f64).then_some(first)
    })
}

/// Waits until a node is back, in its slow start.
fn starts(fleet: &Fleet, id: &str) {
    let share = eventually("the node is back", || {
        let node = fleet.clearcoat.node(id);
        (node["health"] == "up").then(|| node["share"].as_u64().expect("percent"))
    });
    assert!((10..40).contains(&share), "{share} %");
}

/// With equal shares, half of the requests are the node's; with a fifth or less, a tenth or less. The bounds are more
/// than five standard deviations away from either.
fn assert_small(part: f64) {
    assert!(part > 0.0 && part < REQUESTS as f64 / 3.0, "{part} of {REQUESTS} requests at a small share");
}

fn assert_half(part: f64) {
    assert!(part > REQUESTS as f64 / 3.0, "{part} of {REQUESTS} requests at the whole share");
}

#[test]
fn a_web_node_that_recovers_gets_a_small_part_first() {
    let fleet = Fleet::start(&Plan { varnish: 0, web: 2, config: CONFIG, ..Plan::default() });
    let origin = fleet.clearcoat.origin;
    assert_eq!(fleet.clearcoat.node("web-1")["share"], 100);
    assert_half(part_of_the_first(&fleet, "origin", "web", origin));

    fleet.web[0].healthy.store(false, Ordering::SeqCst);
    eventually("the ill node is out", || (fleet.clearcoat.node("web-1")["health"] == "down").then_some(()));
    fleet.web[0].healthy.store(true, Ordering::SeqCst);
    starts(&fleet, "web-1");
    assert_small(part_of_the_first(&fleet, "origin", "web", origin));
    assert_eq!(fleet.clearcoat.node("web-2")["share"], 100);
}

#[test]
fn a_varnish_that_was_restarted_gets_a_small_part_first() {
    let mut fleet = Fleet::start(&Plan { varnish: 2, web: 1, config: CONFIG, ..Plan::default() });
    let edge = fleet.clearcoat.edge;
    assert_half(part_of_the_first(&fleet, "edge", "varnish", edge));

    fleet.varnish[0].kill();
    eventually("the dead node is out", || (fleet.clearcoat.node("varnish-1")["health"] == "down").then_some(()));
    fleet.varnish[0].restart();
    starts(&fleet, "varnish-1");
    assert_small(part_of_the_first(&fleet, "edge", "varnish", edge));
}
