//! The log: what an operator has to know is there, once, and a purge can be followed.

use serde_json::Value;

use crate::support::client::get;
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};

/// The lines with this message.
fn lines(fleet: &Fleet, message: &str) -> Vec<Value> {
    let text = fleet.clearcoat.log().text();
    let values = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    values.filter(|line| line["message"] == message).collect()
}

#[test]
fn a_purge_is_followed_by_its_position_from_its_arrival_to_every_varnish() {
    let fleet = Fleet::start(&Plan { varnish: 2, web: 1, ..Plan::default() });
    fleet.purge_tag("cat_p_1");
    let answer = fleet.purge_tag("cat_p_2");
    let position = answer.json()["position"].as_u64().expect("a position");
    let is_of_it = |line: &Value| line["position"] == position;
    let has = |message: &str| lines(&fleet, message).iter().any(is_of_it);
    eventually("its arrival is said", || has("purge accepted").then_some(()));
    eventually("its answer is said", || has("purge answered").then_some(()));
    for node in ["varnish-1", "varnish-2"] {
        eventually("bans of it were sent", || {
            let sent = lines(&fleet, "bans were sent");
            let of_it = |line: &Value| line["node"] == node && line["position"].as_u64() >= Some(position);
            sent.iter().any(of_it).then_some(())
        });
        eventually("it is applied", || {
            let applied = lines(&fleet, "purges are applied");
            let covers = |line: &Value| {
                let number = |key: &str| line[key].as_u64().expect("a position");
                line["node"] == node && (number("after") + 1..=number("position")).contains(&position)
            };
            applied.iter().any(covers).then_some(())
        });
    }
}

#[test]
fn the_start_says_which_file_was_read_and_every_line_has_its_target() {
    let config = "[log]\nlevel = \"info\"\nformat = \"json\"\n";
    let fleet = Fleet::start(&Plan { varnish: 1, web: 2, config, ..Plan::default() });
    let read = lines(&fleet, "configuration read").remove(0);
    assert!(read["file"].as_str().expect("a file").ends_with("clearcoat.toml"), "{read}");
    assert_eq!([&read["varnish"], &read["web"]], [1, 2], "{read}");
    let text = fleet.clearcoat.log().text();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert!(line["target"].as_str().is_some_and(|target| target.starts_with("clearcoat")), "{line}");
    }
}

#[test]
fn a_storm_of_requests_without_a_node_is_a_few_lines_that_name_the_reason() {
    let config = "[runtime]\nworkers = 1\n[log]\nlevel = \"info\"\nformat = \"json\"\n";
    let fleet = Fleet::start(&Plan { varnish: 0, web: 0, config, ..Plan::default() });
    for _ in 0..200 {
        assert_eq!(get(fleet.clearcoat.edge, "/p?token=geheim").unwrap().status, 503);
    }
    let said =
        eventually("it is said", || Some(lines(&fleet, "a request found no node")).filter(|lines| lines.len() >= 20));
    assert!(said.len() < 30, "{} lines", said.len());
    let line = &said[0];
    assert_eq!([&line["status"], &line["path"]], [&Value::from(503), &"/p".into()], "{line}");
    assert!(line["reason"].as_str().expect("a reason").contains("NoneUp"), "{line}");
}

#[test]
fn a_node_that_is_drained_and_taken_back_is_said_at_info() {
    let config = "[log]\nlevel = \"info\"\nformat = \"json\"\n";
    let fleet = Fleet::start(&Plan { varnish: 1, web: 2, config, ..Plan::default() });
    let weigh = |weight: i64| {
        let mut config: toml::Table = fleet.clearcoat.config().parse().expect("TOML");
        let nodes = config["node"].as_array_mut().expect("nodes");
        let web = nodes.iter_mut().find(|node| node["id"].as_str() == Some("web-1")).expect("it is there");
        web.as_table_mut().expect("a table").insert("weight".into(), weight.into());
        fleet.clearcoat.configure(&config.to_string());
        fleet.clearcoat.reload();
    };
    weigh(0);
    fleet.clearcoat.log().waits_for("node is drained");
    weigh(1);
    fleet.clearcoat.log().waits_for("node is not drained any more");
    assert_eq!(lines(&fleet, "node is drained: it gets no new requests")[0]["node"], "web-1");
}
