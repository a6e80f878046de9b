//! Reloading the configuration.

use crate::support::client::{Connection, get};
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
    eventually("it is counted", || (reloads(&fleet, "applied") == 1.0).then_some(()));
    assert_eq!(reloads(&fleet, "unchanged"), 0.0);
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
        config["edge"].as_table_mut().expect("a table").insert("seal".into(), false.into());
        config["purge"].as_table_mut().expect("a table").insert("ack_timeout".into(), "2s".into());
        let web = nodes(config).pop().expect("a node");
        assert_eq!(web["id"].as_str(), Some("web-2"));
    });
    fleet.clearcoat.reload();
    eventually("the node leaves", || (ids(&fleet) == ["varnish-1", "varnish-2", "web-1"]).then_some(()));
    log.waits_for("takes effect at the next start: edge.seal, purge.ack_timeout\"");
    reader.stop();
    eventually("it is counted", || (reloads(&fleet, "applied") == 1.0).then_some(()));
    assert_eq!(reloads(&fleet, "refused"), 1.0);
}

#[test]
fn a_node_that_a_reload_takes_out_finishes_the_requests_that_it_has() {
    let fleet = small();
    let gate = fleet.shop.hold(77);
    let edge = fleet.clearcoat.edge;
    let reading = std::thread::spawn(move || get(edge, "/p/77").expect("an answer"));
    gate.holds(1);
    let busy: Vec<String> = fleet
        .clearcoat
        .nodes()
        .iter()
        .filter(|node| node["inflight"] != 0)
        .map(|node| node["id"].as_str().expect("a name").to_owned())
        .collect();
    assert_eq!(busy.len(), 2, "a Varnish and a web node: {busy:?}");
    configure(&fleet, |config| nodes(config).retain(|node| !busy.iter().any(|id| node["id"].as_str() == Some(id))));
    fleet.clearcoat.reload();
    eventually("they have left", || busy.iter().all(|id| !ids(&fleet).contains(id)).then_some(()));
    assert_eq!(fleet.get("/p/1").status, 200, "others serve");
    drop(gate);
    let answer = reading.join().expect("a reader");
    assert_eq!((answer.status, answer.text()), (200, "0"));
    assert_eq!(fleet.shop.renders.load(std::sync::atomic::Ordering::SeqCst), 2, "none was asked for twice");
}

#[test]
fn a_reload_each_moment_under_load_costs_no_request() {
    let fleet = small();
    let readers: Vec<Reader> = (0..2).map(|_| Reader::start(fleet.clearcoat.edge, 30, Outage::None)).collect();
    let mut kept = Connection::open(fleet.clearcoat.edge).expect("a connection");
    let before = fleet.clearcoat.config();
    for turn in 0..20 {
        configure(&fleet, |config| {
            let limits: toml::Table =
                format!("max_fields = {}\nmax_body = {}", 50 + turn, 100_000 + turn).parse().expect("TOML");
            config.insert("limits".into(), limits.into());
            let edge = config["edge"].as_table_mut().expect("a table");
            edge.insert("policy".into(), ["random", "rendezvous", "round_robin"][turn % 3].into());
            config["purge"]
                .as_table_mut()
                .expect("a table")
                .insert("gather".into(), format!("{}ms", 100 + turn).into());
            let health: toml::Table = format!("[varnish]\nfall = {}", 2 + turn % 2).parse().expect("TOML");
            config.insert("health".into(), health.into());
        });
        fleet.clearcoat.reload();
        eventually("it is applied", || (reloads(&fleet, "applied") == (turn + 1) as f64).then_some(()));
        kept.send("GET /p/1 HTTP/1.1\r\nHost: shop.test\r\n\r\n").expect("it is open");
        assert_eq!(kept.answer(false).expect("an answer").status, 200);
        assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
    }
    fleet.clearcoat.configure(&before);
    readers.into_iter().for_each(Reader::stop);
    assert_eq!(reloads(&fleet, "refused"), 0.0);
    assert!(!fleet.clearcoat.log().has("node is down"));
}
