//! Agents and clearcoat together: agents write the records that clearcoat reads.

use std::sync::Arc;

use crate::support::agent::{Agent, Node, arguments};
use crate::support::etcd::Etcd;
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::reader::{Outage, Reader};
use crate::support::web::{Shop, Web};

/// A clearcoat in front of this etcd's nodes.
fn before(etcd: &Etcd) -> Fleet {
    let config = format!(
        "[registry]\nkind = \"etcd\"\n[registry.etcd]\nendpoints = {:?}\n\
         [health.web]\ninterval = \"200ms\"\ntimeout = \"200ms\"\nslow_start = \"0s\"\n",
        etcd.endpoints()
    );
    Fleet::launch(&Plan { varnish: 0, web: 0, config: config.leak(), ..Plan::default() })
}

/// Waits until the fleet has exactly these nodes, all of them up.
fn has(fleet: &Fleet, ids: &[&str]) {
    eventually(&format!("the fleet is {ids:?}"), || {
        let nodes = fleet.clearcoat.nodes();
        let are = nodes.len() == ids.len() && nodes.iter().zip(ids).all(|(node, id)| node["id"] == *id);
        (are && nodes.iter().all(|node| node["health"] == "up")).then_some(())
    });
}

#[test]
fn agents_that_end_and_start_one_after_the_other_cost_no_request() {
    let etcd = Etcd::start();
    let shop = Arc::new(Shop::default());
    let web = [Web::start(&shop), Web::start(&shop)];
    let start = |index: usize| {
        let mut arguments = arguments("web", &format!("web-{}", index + 1), &etcd.endpoints());
        arguments.extend(["--address", &web[index].address.to_string(), "--drain", "200ms"].map(str::to_owned));
        Agent::start(arguments)
    };
    let mut agents = [start(0), start(1)];
    let fleet = before(&etcd);
    has(&fleet, &["web-1", "web-2"]);
    fleet.clearcoat.opened();
    let reader = Reader::start(fleet.clearcoat.edge, u64::MAX, Outage::None);
    for (index, left) in [(0, "web-2"), (1, "web-1")] {
        agents[index].signal("-TERM");
        assert_eq!(agents[index].status(), 0);
        has(&fleet, &[left]);
        agents[index] = start(index);
        has(&fleet, &["web-1", "web-2"]);
    }
    reader.stop();
}

#[test]
fn the_fleet_is_as_the_agents_say() {
    let etcd = Etcd::start();
    let node = Node::start(200);
    let mut arguments = node.arguments("varnish", "varnish-1", &etcd.endpoints());
    arguments.extend(["--check", &node.page(), "--epoch", "disk-1", "--weight", "3", "--zone", "b"].map(str::to_owned));
    arguments.extend(["--delivery", "xkey", "--header-limit", "4096", "--label", "rack=7"].map(str::to_owned));
    let _agent = Agent::start(arguments);
    let fleet = before(&etcd);
    has(&fleet, &["varnish-1"]);
    let shown = fleet.clearcoat.node("varnish-1");
    assert_eq!((&shown["weight"], &shown["epoch"], &shown["zone"]), (&3.into(), &"disk-1".into(), &"b".into()));
    assert_eq!(shown["labels"]["rack"], "7");
    for complaint in ["are not known here", "cannot be read"] {
        assert!(!fleet.clearcoat.log().has(complaint), "{complaint}: {}", fleet.clearcoat.log().text());
    }

    node.answer(404);
    eventually("it drains", || (fleet.clearcoat.node("varnish-1")["weight"] == 0).then_some(()));
    node.answer(200);
    eventually("it is back", || (fleet.clearcoat.node("varnish-1")["weight"] == 3).then_some(()));
}
