//! Many nodes, and many changes at once.

use super::rig::{Rig, key};
use crate::support::etcd::Etcd;

const MANY: usize = 1000;
const BURSTS: usize = 10;

/// A node without traffic and with rare health checks: nothing listens at its address.
fn idle(node: usize, turn: usize) -> (String, String) {
    let value = format!(
        "{{\"address\":\"127.1.{}.{}:9\",\"weight\":0,\"labels\":{{\"n\":\"{turn}\"}}}}",
        node / 250,
        node % 250 + 1
    );
    (key(&format!("idle-{node}")), value)
}

#[test]
fn after_each_burst_of_changes_the_fleet_is_what_is_in_etcd() {
    const QUIET: &str =
        "[log]\nlevel = \"info\"\nformat = \"json\"\n[health.web]\ninterval = \"60s\"\npanic_threshold = 0\n";
    let rig = Rig::start_with(Etcd::start(), 2, QUIET);
    let reader = rig.reader();
    for turn in 0..BURSTS {
        rig.etcd.put_many((0..MANY).map(|node| idle(node, turn)));
        println!("burst {turn} of {MANY} changes: {:?} more to the fleet of etcd", rig.equals_etcd());
    }
    assert_eq!(rig.ids().len(), MANY + 2);
    reader.stop();
}
