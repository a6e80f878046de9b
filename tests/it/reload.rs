//! Reloading the configuration.

use crate::support::client::Connection;
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::reader::{Outage, Reader};
use crate::support::web::Web;

fn small() -> Fleet {
    Fleet::start(&Plan { varnish: 2, web: 2, ..Plan::default() })
}

fn reloads(fleet: &Fleet, result: &str) -> f64 {
    fleet.clearcoat.metric(&format!("clearcoat_reloads_total{{result=\"{result}\"}}"))
}

/// Edits the configuration as a tree.
fn configure(fleet: &Fleet, change: impl FnOnce(&mut toml::Table)) {
    let mut config: toml::Table = fleet.clearcoat.config().parse().expect("TOML");
    change(&mut config);
    fleet.clearcoat.configure(&config.to_string());
}

fn nodes(config: &mut toml::Table) -> &mut Vec<toml::Value> {
    config["node"].as_array_mut().expect("nodes")
}

fn web_node(id: &str, web: &Web) -> toml::Value {
    let text = format!("role = \"web\"\nid = \"{id}\"\naddress = \"{}\"", web.address);
    toml::Value::Table(text.parse().expect("TOML"))
}

fn ids(fleet: &Fleet) -> Vec<String> {
    fleet.clearcoat.nodes().iter().map(|node| node["id"].as_str().expect("a name").to_owned()).collect()
}

fn has_joined(fleet: &Fleet, id: &str) -> usize {
    let lines = fleet.clearcoat.log().text();
    lines
        .lines()
        .filter(|line| line.contains("\"node joined\"") && line.contains(&format!("\"node\":\"{id}\"")))
        .count()
}

#[test]
fn a_reload_changes_the_nodes_that_changed_and_costs_nobody_anything() {
    let fleet = small();
    fleet.purge_tag("cat_p_1");
    fleet.clearcoat.current();
    // A request in flight all the time; the only one, until its node is known.
    let gate = fleet.shop.hold(77);
    let mut slow = Connection::open(fleet.clearcoat.edge).expect("a connection");
    slow.send("GET /p/77 HTTP/1.1\r\nHost: shop.test\r\n\r\n").expect("sent");
    gate.holds(1);
    let at = |role: &str| {
        let busy = fleet.clearcoat.nodes().into_iter().find(|node| node["role"] == role && node["inflight"] != 0);
        busy.expect("a busy node")["id"].as_str().expect("a name").to_owned()
    };
    let (varnish, web) = (at("varnish"), at("web"));
    let reader = Reader::start(fleet.clearcoat.edge, 30, Outage::None);
    let other = |id: &str| if id.ends_with('1') { id.replace('1', "2") } else { id.replace('2', "1") };

    let new = Web::start(&fleet.shop);
    configure(&fleet, |config| {
        let nodes = nodes(config);
        nodes.retain(|node| node["id"].as_str() != Some(other(&varnish).as_str()));
        let busy = nodes.iter_mut().find(|node| node["id"].as_str() == Some(web.as_str())).expect("it");
        busy.as_table_mut().expect("a table").insert("weight".into(), 5.into());
        nodes.insert(0, web_node("web-3", &new));
        nodes.reverse();
    });
    fleet.clearcoat.reload();
    eventually("it is applied", || (reloads(&fleet, "applied") == 1.0).then_some(()));
    eventually("the fleet is the new one", || {
        (ids(&fleet) == [varnish.as_str(), "web-1", "web-2", "web-3"] && fleet.clearcoat.node(&web)["weight"] == 5)
            .then_some(())
    });
    // Nodes that stayed keep their state.
    for id in [&varnish, &web] {
        let node = fleet.clearcoat.node(id);
        assert_eq!((&node["health"], node["inflight"].as_u64() >= Some(1)), (&"up".into(), true), "{node}");
        eventually("that it joined is logged", || (has_joined(&fleet, id) > 0).then_some(()));
        assert_eq!(has_joined(&fleet, id), 1);
    }
    let node = fleet.clearcoat.node(&varnish);
    assert_eq!((&node["cursor"], &node["current"]), (&1.into(), &true.into()), "{node}");
    assert!(!fleet.clearcoat.log().has("node is down"));
    fleet.clearcoat.ready();
    let applied = fleet.purge_tag("cat_p_1").json()["applied"].clone();
    assert_eq!(applied, serde_json::json!([varnish]));

    drop(gate);
    let answer = slow.answer(false).expect("an answer");
    assert_eq!(answer.status, 200, "{answer:?}");
    reader.stop();
    assert_eq!(reloads(&fleet, "refused"), 0.0);
}

#[test]
fn a_fleet_whose_nodes_are_all_replaced_serves_on() {
    let fleet = small();
    let reader = Reader::start(fleet.clearcoat.edge, 30, Outage::None);
    let new = [Web::start(&fleet.shop), Web::start(&fleet.shop)];
    configure(&fleet, |config| {
        let nodes = nodes(config);
        nodes.retain(|node| node["role"].as_str() != Some("web"));
        nodes.extend(new.iter().zip(["web-3", "web-4"]).map(|(web, id)| web_node(id, web)));
    });
    fleet.clearcoat.reload();
    eventually("the fleet is the new one", || {
        (ids(&fleet) == ["varnish-1", "varnish-2", "web-3", "web-4"]).then_some(())
    });
    fleet.clearcoat.ready();
    // Uncached pages come from the new nodes.
    assert_eq!(fleet.get("/p/1234").status, 200);
    reader.stop();
}

#[test]
fn a_changed_file_is_noticed_without_a_signal() {
    let fleet = small();
    let new = Web::start(&fleet.shop);
    configure(&fleet, |config| nodes(config).push(web_node("web-3", &new)));
    eventually("it is noticed", || ids(&fleet).contains(&"web-3".to_owned()).then_some(()));
    assert_eq!([reloads(&fleet, "applied"), reloads(&fleet, "unchanged")], [1.0, 0.0]);
}

#[test]
fn a_bad_file_is_refused_as_a_whole_and_what_needs_a_restart_is_named() {
    let fleet = small();
    let before = (ids(&fleet), fleet.clearcoat.fleet()["version"].clone(), fleet.clearcoat.config());
    let reader = Reader::start(fleet.clearcoat.edge, 30, Outage::None);
    configure(&fleet, |config| {
        nodes(config).clear();
        config["edge"].as_table_mut().expect("a table").insert("policy".into(), "fastest".into());
        config["purge"].as_table_mut().expect("a table").insert("ack_timout".into(), "1s".into());
    });
    fleet.clearcoat.reload();
    eventually("it is refused", || (reloads(&fleet, "refused") == 1.0).then_some(()));
    let log = fleet.clearcoat.log();
    for error in ["edge.policy = \\\"fastest\\\": unknown value", "purge.ack_timout", "the old one goes on"] {
        log.waits_for(error);
    }
    assert_eq!((ids(&fleet), &fleet.clearcoat.fleet()["version"]), (before.0, &before.1));

    // The old configuration in other words: nothing changes.
    fleet.clearcoat.configure(&format!("# the same\n{}", before.2));
    fleet.clearcoat.reload();
    eventually("it is the same", || (reloads(&fleet, "unchanged") == 1.0).then_some(()));

    configure(&fleet, |config| {
        config["edge"].as_table_mut().expect("a table").insert("policy".into(), "random".into());
        config["purge"].as_table_mut().expect("a table").insert("allow".into(), vec!["10.0.0.0/8"].into());
        let web = nodes(config).pop().expect("a node");
        assert_eq!(web["id"].as_str(), Some("web-2"));
    });
    fleet.clearcoat.reload();
    eventually("the node leaves", || (ids(&fleet) == ["varnish-1", "varnish-2", "web-1"]).then_some(()));
    log.waits_for("takes effect at the next start: edge.policy, purge.allow\"");
    // It is not in effect: we are not in 10.0.0.0/8.
    assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
    reader.stop();
    assert_eq!([reloads(&fleet, "refused"), reloads(&fleet, "applied")], [1.0, 1.0]);
}
