//! When a node is registered, and with which data.

use serde_json::json;

use crate::support::agent::{Agent, Node, arguments, is, is_gone, record, recorded, script};
use crate::support::etcd::Etcd;
use crate::support::eventually;

#[test]
fn a_node_is_registered_once_its_check_passes_and_drains_while_it_fails() {
    let etcd = Etcd::start();
    let node = Node::start(500);
    let mut arguments = node.arguments("varnish", "varnish-1", &etcd.endpoints());
    arguments.extend(["--check", &node.page(), "--expect", "204", "--zone", "b"].map(str::to_owned));
    arguments.extend(["--weight", "3", "--label", "rack=7", "--delivery", "xkey"].map(str::to_owned));
    let mut agent = Agent::start(arguments);
    eventually("the check has failed", || agent.log().has("answered 500").then_some(()));
    assert!(record(&etcd, "varnish/varnish-1").is_none());

    node.answer(204);
    let first = is(&etcd, "varnish/varnish-1", "up");
    let value = &first.value;
    assert_eq!(value["address"], node.address.to_string());
    assert_eq!((&value["weight"], &value["zone"], &value["delivery"]), (&json!(3), &json!("b"), &json!("xkey")));
    assert_eq!(value["labels"], json!({"rack": "7"}));
    assert!(value["boot"].is_string() && value["started"].is_u64(), "{value}");
    assert!(value.get("header_limit").is_none() && value.get("epoch").is_none(), "{value}");
    assert!(etcd.lease_ttl(first.lease).is_some());

    node.answer(500);
    let draining = is(&etcd, "varnish/varnish-1", "drain");
    assert_eq!(draining.created, first.created, "its key was away");
    node.answer(204);
    let again = is(&etcd, "varnish/varnish-1", "up");
    assert_eq!((again.created, again.lease), (first.created, first.lease));

    agent.signal("-TERM");
    assert_eq!(agent.status(), 0);
    assert!(record(&etcd, "varnish/varnish-1").is_none());
    assert_eq!(etcd.lease_ttl(first.lease), None, "its lease was left behind");
}

#[test]
fn an_address_is_found_by_interface_and_by_the_way_to_etcd() {
    let etcd = Etcd::start();
    let node = Node::start(200);
    let port = node.address.port().to_string();
    let of = |id: &str, more: &[&str]| {
        let mut arguments = arguments("web", id, &etcd.endpoints());
        arguments.extend(["--port", &port].into_iter().chain(more.iter().copied()).map(str::to_owned));
        Agent::start(arguments)
    };
    let _agents = [of("by-interface", &["--interface", "lo"]), of("by-route", &[])];
    for id in ["web/by-interface", "web/by-route"] {
        assert_eq!(is(&etcd, id, "up").value["address"], node.address.to_string(), "{id}");
    }
    let nowhere = of("nowhere", &["--interface", "none0"]);
    eventually("the interface is missed", || nowhere.log().has("the interface none0 has no address").then_some(()));
    assert!(record(&etcd, "web/nowhere").is_none());
}

#[test]
fn a_node_without_a_name_has_that_of_its_host_and_flags_are_variables_too() {
    let etcd = Etcd::start();
    let node = Node::start(200);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_clearcoat"));
    command.arg("agent").env("CLEARCOAT_AGENT_ROLE", "web").env("CLEARCOAT_AGENT_ETCD", etcd.endpoint(0));
    command.env("CLEARCOAT_AGENT_ADDRESS", node.address.to_string()).env("CLEARCOAT_AGENT_DRAIN", "0s");
    command.env("CLEARCOAT_AGENT_LABEL", "a=1,b=2");
    let mut agent = Agent::spawn(command);
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").expect("Linux");
    let key = format!("web/{}", host.trim());
    assert_eq!(is(&etcd, &key, "up").value["labels"], json!({"a": "1", "b": "2"}));
    agent.signal("-INT");
    assert_eq!(agent.status(), 0);
    is_gone(&etcd, &key);
}

#[test]
fn a_node_starts_and_lives_without_etcd_and_is_registered_when_it_comes() {
    let mut etcd = Etcd::start();
    let endpoints = etcd.endpoints();
    etcd.kill_all();
    let node = Node::start(200);
    let folder = tempfile::tempdir().expect("a folder");
    let (mut arguments, runs) = (node.arguments("web", "web-1", &endpoints), folder.path().join("runs"));
    arguments.extend(script(folder.path(), &format!("touch {}\nexec sleep 1000\n", runs.display())));
    let mut agent = Agent::start(arguments);
    eventually("the node runs", || runs.exists().then_some(()));
    eventually("etcd is missed", || agent.log().has("not registered in etcd").then_some(()));
    etcd.restart_all();
    is(&etcd, "web/web-1", "up");

    etcd.kill_all();
    agent.signal("-TERM");
    assert_eq!(agent.status(), 128 + 15, "the end waits for nobody who is away");
}

#[test]
fn wrong_usage_exits_with_2_and_says_what_is_allowed() {
    for (arguments, hint) in [
        (&["--role", "cache", "--port", "80"][..], "[possible values: web, varnish]"),
        (&["--role", "web"], "--address"),
        (&["--role", "web", "--port", "80", "--pid-file", "x"], "--pid-file: only for --role varnish"),
        (&["--role", "web", "--port", "80", "--etcd", "10.0.0.1:2379"], "--etcd: wanted http://HOST:PORT"),
    ] {
        let mut agent = Agent::start(arguments);
        assert_eq!(agent.status(), 2, "{arguments:?}");
        eventually("it says why", || agent.log().has(hint).then_some(()));
    }
}

#[test]
fn two_nodes_of_a_fleet_have_a_key_each() {
    let etcd = Etcd::start();
    let node = Node::start(200);
    let agents = ["web", "varnish"].map(|role| Agent::start(node.arguments(role, "a", &etcd.endpoints())));
    recorded(&etcd, "web/a", "is there", |_| true);
    recorded(&etcd, "varnish/a", "is there", |_| true);
    drop(agents);
    // The killed agents cannot deregister: their leases expire.
    is_gone(&etcd, "web/a");
    is_gone(&etcd, "varnish/a");
}
