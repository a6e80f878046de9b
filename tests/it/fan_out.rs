//! A fleet larger than one machine can run: simulated nodes.

use std::time::Duration;

use crate::support::client::{purge, tag};
use crate::support::fleet::{Fleet, Plan};
use crate::support::simulated::SimulatedFleet;

#[test]
fn one_purge_reaches_two_hundred_simulated_nodes() {
    const NODES: usize = 200;
    let simulated = SimulatedFleet::start(NODES, Duration::from_millis(2));
    let config = simulated.toml().leak();
    let fleet = Fleet::start(&Plan { varnish: 0, web: 0, config, ack_timeout: "20s", ..Plan::default() });
    let answer = purge(fleet.clearcoat.purge, &tag("cat_p_42")).expect("an answer").json();
    assert_eq!(answer["fenced"], serde_json::json!([]));
    assert_eq!(answer["applied"].as_array().expect("a list").len(), NODES);
    assert_eq!(simulated.told_of("cat_p_42"), NODES);
    assert_eq!(simulated.told_of("cat_p_4"), 0);
}
