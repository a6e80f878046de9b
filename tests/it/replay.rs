//! Purges that clearcoat owes a Varnish when it restarts.

use std::io::Write;

use crate::support::client::{Connection, get, tag};
use crate::support::eventually;
use crate::support::faults::{fail_purges, purges_can_fail};
use crate::support::fleet::{Fleet, Plan};
use crate::support::reader::{Outage, Reader};
use crate::support::varnish::Varnish;

/// The log message when a cache is dropped completely.
const CANNOT_BE_REPLAYED: &str = "cannot be replayed: its cache is dropped";

const NODES: [&str; 2] = ["varnish-1", "varnish-2"];

fn bans_sent(fleet: &Fleet, node: &str) -> f64 {
    fleet.clearcoat.metric(&format!("clearcoat_bans_sent_total{{node=\"{node}\"}}"))
}

/// Stops clearcoat once every Varnish is current, and starts it again.
fn restart_in_order(fleet: &mut Fleet) {
    let is_current = |node: &serde_json::Value| node["role"] != "varnish" || node["current"] == true;
    eventually("every Varnish is up to date", || fleet.clearcoat.nodes().iter().all(is_current).then_some(()));
    fleet.clearcoat.terminate();
    let status = fleet.clearcoat.wait();
    assert_eq!(status.code(), Some(0), "{status}");
    fleet.clearcoat.restart();
    fleet.clearcoat.ready();
}

#[test]
fn a_purge_durable_before_a_kill_is_delivered_before_clients_are_served() {
    let mut fleet = Fleet::start(&Plan { varnish: 2, vcl: purges_can_fail, ..Plan::default() });
    for page in ["/p/1", "/p/2"] {
        fleet.warm(page);
    }
    assert_eq!(fleet.purge_tag("cat_p_9").status, 200);

    // After a clean stop no Varnish is owed anything.
    restart_in_order(&mut fleet);
    for node in NODES {
        assert_eq!(fleet.clearcoat.node(node)["current"], true);
        assert_eq!(bans_sent(&fleet, node), 0.0, "{node} was told again what it knew");
    }
    for page in ["/p/1", "/p/2"] {
        assert_eq!(fleet.cached(page), ["HIT", "HIT"]);
    }

    // Now a purge that reaches the journal but no Varnish.
    NODES.iter().for_each(|node| fail_purges(&fleet, node, true));
    fleet.shop.set(1, 7);
    let mut magento = Connection::open(fleet.clearcoat.purge).expect("a connection");
    let pattern = tag("cat_p_1");
    magento.send(format!("PURGE / HTTP/1.1\r\nX-Magento-Tags-Pattern: {pattern}\r\nHost: a\r\n\r\n")).expect("sent");
    eventually("the purge is durable", || (fleet.clearcoat.fleet()["head"] == 2).then_some(()));
    fleet.clearcoat.kill();
    let old: Vec<_> = fleet.varnish.iter().map(|varnish| varnish.get("/p/1").text().to_owned()).collect();
    assert_eq!(old, ["0", "0"], "the purge was delivered before the kill");

    // From the start of the new process the edge serves only the new page, even while the purge still cannot be
    // delivered.
    let reader = Reader::start(fleet.clearcoat.edge, 1, Outage::AtFirst);
    reader.promise(7);
    fleet.clearcoat.restart();
    fleet.clearcoat.ready();
    eventually("the page was read", || (reader.reads() > 20).then_some(()));
    assert!(NODES.iter().all(|node| fleet.clearcoat.node(node)["current"] == false), "{}", fleet.clearcoat.fleet());
    let reads = reader.reads();
    NODES.iter().for_each(|node| fail_purges(&fleet, node, false));
    eventually("both nodes are up to date", || {
        NODES.iter().all(|node| fleet.clearcoat.node(node)["current"] == true).then_some(())
    });
    eventually("the page was read again", || (reader.reads() > reads + 20).then_some(()));
    reader.stop();
    let new: Vec<_> = fleet.varnish.iter().map(|varnish| varnish.get("/p/1").text().to_owned()).collect();
    assert_eq!(new, ["7", "7"]);
    // By a replay, not a flush.
    assert!(!fleet.clearcoat.log().has(CANNOT_BE_REPLAYED));
    assert_eq!(fleet.cached("/p/2"), ["HIT", "HIT"]);
}

#[test]
fn a_hung_fleet_catches_up_after_a_kill_before_clients_are_served() {
    let mut fleet = Fleet::start(&Plan { varnish: 2, ..Plan::default() });
    assert_eq!(fleet.purge_tag("cat_p_9").status, 200);
    restart_in_order(&mut fleet);
    fleet.warm("/p/1");
    fleet.varnish.iter().for_each(Varnish::hang);
    fleet.shop.set(1, 7);
    let mut magento = Connection::open(fleet.clearcoat.purge).expect("a connection");
    let pattern = tag("cat_p_1");
    magento.send(format!("PURGE / HTTP/1.1\r\nX-Magento-Tags-Pattern: {pattern}\r\nHost: a\r\n\r\n")).expect("sent");
    eventually("the purge is durable", || (fleet.clearcoat.fleet()["head"] == 2).then_some(()));
    fleet.clearcoat.kill();
    fleet.varnish.iter().for_each(Varnish::resume);

    let reader = Reader::start(fleet.clearcoat.edge, 1, Outage::AtFirst);
    reader.promise(7);
    fleet.clearcoat.restart();
    fleet.clearcoat.ready();
    eventually("the page was read", || (reader.reads() > 20).then_some(()));
    reader.stop();
}

#[test]
fn a_varnish_that_nobody_knows_is_emptied_before_it_serves() {
    let mut fleet = Fleet::start(&Plan { varnish: 1, ..Plan::default() });
    let mut newcomer = Varnish::spawn(fleet.folder.path(), "varnish-2", &fleet.folder.path().join("varnish-1.vcl"));
    newcomer.ready();
    fleet.varnish.push(newcomer);
    for page in ["/p/1", "/p/2"] {
        fleet.warm(page);
    }
    fleet.shop.set(1, 7);
    let answer = fleet.purge_tag("cat_p_1").json();
    assert_eq!(answer["applied"], serde_json::json!(["varnish-1"]));
    assert_eq!(fleet.varnish[1].get("/p/1").text(), "0");

    fleet.clearcoat.terminate();
    assert_eq!(fleet.clearcoat.wait().code(), Some(0));
    let config = std::fs::OpenOptions::new().append(true).open(fleet.folder.path().join("clearcoat.toml"));
    let address = fleet.varnish[1].address;
    write!(config.expect("our file"), "\n[[node]]\nrole = \"varnish\"\nid = \"varnish-2\"\naddress = \"{address}\"\n")
        .expect("written");
    let reader = Reader::start(fleet.clearcoat.edge, 1, Outage::AtFirst);
    reader.promise(7);
    fleet.clearcoat.restart();
    fleet.clearcoat.ready();
    eventually("the new node is up to date", || (fleet.clearcoat.node("varnish-2")["current"] == true).then_some(()));
    reader.stop();
    fleet.clearcoat.log().waits_for("this node is new here: it gets one ban of everything");
    assert!(!fleet.clearcoat.log().has(CANNOT_BE_REPLAYED));
    // Its other missed purges are unknown; the other Varnish keeps its pages.
    assert_eq!(fleet.cached("/p/2"), ["HIT", "MISS"]);
    assert_eq!(bans_sent(&fleet, "varnish-1"), 0.0);
    assert_eq!(fleet.varnish[1].get("/p/1").text(), "7");
}

#[test]
fn the_first_start_before_a_warm_fleet_empties_nothing() {
    let mut fleet = Fleet::start(&Plan { varnish: 1, web: 1, ..Plan::default() });
    fleet.warm("/p/1");
    restart_in_order(&mut fleet);
    assert_eq!(get(fleet.clearcoat.edge, "/p/1").expect("an answer").cache(), "HIT");
    assert_eq!(bans_sent(&fleet, "varnish-1"), 0.0);
}
