//! An operator drains, resumes and weights nodes while clearcoat runs: at every clearcoat, and until it is taken back.

use std::process::Output;

use serde_json::{Value, json};

use crate::support::clearcoat::{Clearcoat, run};
use crate::support::client::{get, purge, tag};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::reader::{Outage, Reader};

/// Operators may, with the token in this file.
const CONFIG: &str = "[admin]\nlisten = [\"127.0.0.1:0\"]\ntoken_file = \"tests/it/data/operator-token\"\n";

/// Two clearcoats, two Varnish nodes, no etcd.
fn plan() -> Plan {
    // Longer than anything takes on a busy machine: a replica named as unconfirmed has not answered at all.
    Plan { varnish: 2, replicas: 2, ack_timeout: "15s", config: CONFIG, ..Plan::default() }
}

/// The same with etcd, where the nodes are registered.
fn plan_with_etcd() -> Plan {
    const CONFIG: &str = "[admin]\nlisten = [\"127.0.0.1:0\"]\ntoken_file = \"tests/it/data/operator-token\"\n\
                          [registry]\nkind = \"etcd\"\n";
    Plan { etcd: 1, journal: "etcd", registered: true, config: CONFIG, ..plan() }
}

/// `clearcoat node ...` at this clearcoat.
fn node(clearcoat: &Clearcoat, order: &[&str]) -> Output {
    let admin = format!("http://{}", clearcoat.admin);
    let more = ["--admin", &admin, "--token-file", "tests/it/data/operator-token"];
    run(&[&["node"], order, &more[..]].concat())
}

/// The same, which has to succeed without a warning. Returns what it prints.
fn order(clearcoat: &Clearcoat, order: &[&str]) -> String {
    let output = node(clearcoat, order);
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && error.is_empty(), "{order:?}: {out}{error}");
    out.into_owned()
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until a clearcoat shows the node as drained by an operator, or not. Returns what it shows.
fn shows_drained(clearcoat: &Clearcoat, id: &str, drained: bool) -> Value {
    eventually("the node is shown as drained, or not", || {
        let node = clearcoat.node(id);
        (node["drained_since"].is_string() == drained).then_some(node)
    })
}

/// Requests that a clearcoat's readers have had answered by this Varnish.
fn answered_by(clearcoat: &Clearcoat, id: &str) -> f64 {
    clearcoat.metric(&format!("clearcoat_edge_requests_total{{code_class=\"2xx\",node=\"{id}\"}}"))
}

#[test]
fn a_varnish_drained_under_load_refuses_nobody_and_has_every_purge() {
    let mut fleet = Fleet::start(&plan());
    let readers: Vec<Reader> =
        fleet.clearcoats().map(|clearcoat| Reader::start(clearcoat.edge, 20, Outage::None)).collect();
    eventually("both serve readers", || readers.iter().all(|reader| reader.reads() > 50).then_some(()));
    let said = order(&fleet.clearcoat, &["drain", "varnish-1"]);
    assert!(said.starts_with("varnish varnish-1 is drained since 2"), "{said}");
    for clearcoat in fleet.clearcoats() {
        let shown = shows_drained(clearcoat, "varnish-1", true);
        assert_eq!((&shown["state"], &shown["gets_traffic"]), (&json!("drained"), &json!(false)));
        assert!(shown["why"].as_str().unwrap().starts_with("drained by an operator since 2"), "{shown}");
        let series = "{node=\"varnish-1\",role=\"varnish\"}";
        assert_eq!(clearcoat.metric(&format!("clearcoat_node_drained{series}")), 1.0);
        assert_eq!(clearcoat.metric(&format!("clearcoat_node_weight{series}")), 0.0);
        assert!(clearcoat.log().has("node is drained"));
    }
    eventually("what it had is finished", || {
        fleet.clearcoats().all(|clearcoat| clearcoat.node("varnish-1")["inflight"] == 0).then_some(())
    });
    let before: Vec<f64> = fleet.clearcoats().map(|clearcoat| answered_by(clearcoat, "varnish-1")).collect();
    // Purges reach it as ever: an old page from before is gone.
    fleet.varnish[0].get("/p/1");
    for version in 1..=5 {
        fleet.shop.set(1, version);
        let answer = purge(fleet.replica(version as usize % 2).purge, &tag("cat_p_1")).expect("an answer");
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    for clearcoat in fleet.clearcoats() {
        clearcoat.current();
        assert_eq!(
            (&clearcoat.node("varnish-1")["lag"], &clearcoat.node("varnish-1")["health"]),
            (&json!(0), &json!("up"))
        );
    }
    assert_eq!(fleet.varnish[0].get("/p/1").text(), "5");
    let reads: Vec<u64> = readers.iter().map(Reader::reads).collect();
    eventually("readers go on", || {
        readers.iter().zip(&reads).all(|(reader, reads)| reader.reads() > reads + 50).then_some(())
    });
    let after: Vec<f64> = fleet.clearcoats().map(|clearcoat| answered_by(clearcoat, "varnish-1")).collect();
    assert_eq!(after, before, "a drained node gets no requests");
    // Resumed at the other one, it serves behind both.
    assert_eq!(order(&fleet.others[0], &["resume", "varnish-1"]).trim(), "varnish varnish-1 is ready");
    for (clearcoat, before) in fleet.clearcoats().zip(before) {
        shows_drained(clearcoat, "varnish-1", false);
        eventually("it serves again", || (answered_by(clearcoat, "varnish-1") > before).then_some(()));
    }
    readers.into_iter().for_each(Reader::stop);
}

#[test]
fn a_request_that_a_node_has_is_finished_though_it_is_drained() {
    let fleet = Fleet::start(&Plan { varnish: 1, web: 2, config: CONFIG, ..Plan::default() });
    let gate = fleet.shop.hold(9);
    let edge = fleet.clearcoat.edge;
    let reading = std::thread::spawn(move || get(edge, "/p/9").expect("an answer"));
    gate.holds(1);
    let busy = eventually("a web node has it", || {
        ["web-1", "web-2"].into_iter().find(|id| fleet.clearcoat.node(id)["inflight"] == 1)
    });
    order(&fleet.clearcoat, &["drain", busy]);
    let shown = shows_drained(&fleet.clearcoat, busy, true);
    assert_eq!((&shown["inflight"], &shown["state"]), (&json!(1), &json!("drained")));
    drop(gate);
    let answer = reading.join().expect("a reader");
    assert_eq!((answer.status, answer.text()), (200, "0"));
    assert_eq!(fleet.shop.renders.load(std::sync::atomic::Ordering::SeqCst), 1, "it was not asked for again");
}

#[test]
fn a_drain_outlives_restarts_and_a_clearcoat_that_was_away_learns_it() {
    let mut fleet = Fleet::start(&plan());
    fleet.replica(1).kill();
    let output = node(&fleet.clearcoat, &["drain", "varnish-2"]);
    assert!(output.status.success() && errors(&output).contains("do not know it yet"), "{output:?}");
    fleet.replica(1).restart();
    fleet.others[0].opened();
    // Before its first request.
    assert_eq!(fleet.others[0].node("varnish-2")["state"], "drained");
    assert_eq!(get(fleet.others[0].edge, "/p/1").expect("an answer").status, 200);
    // All at once, too.
    (0..2).for_each(|number| fleet.replica(number).kill());
    fleet.replica(1).restart();
    fleet.others[0].opened();
    assert_eq!(fleet.others[0].node("varnish-2")["state"], "drained");
    fleet.clearcoat.restart();
    fleet.clearcoats().for_each(Clearcoat::ready);
    fleet.know_each_other();
    order(&fleet.others[0], &["weight", "varnish-1", "7"]);
    // And what was taken back while one was away stays taken back.
    fleet.clearcoat.kill();
    let output = node(&fleet.others[0], &["resume", "varnish-2"]);
    assert!(output.status.success(), "{output:?}");
    fleet.clearcoat.restart();
    fleet.clearcoat.opened();
    for clearcoat in fleet.clearcoats() {
        shows_drained(clearcoat, "varnish-2", false);
        assert_eq!(clearcoat.node("varnish-1")["weight"], 7);
    }
}

#[test]
fn with_etcd_it_is_kept_there_and_no_registration_ends_it() {
    let mut fleet = Fleet::start(&plan_with_etcd());
    order(&fleet.clearcoat, &["drain", "varnish-1"]);
    for clearcoat in fleet.clearcoats() {
        shows_drained(clearcoat, "varnish-1", true);
    }
    let key = "/clearcoat/v1/overrides/varnish/varnish-1";
    let kept = fleet.etcd().entries("/clearcoat/v1/overrides/");
    assert_eq!((kept.len(), kept[0].key_str().unwrap(), kept[0].lease()), (1, key, 0));
    // It leaves and comes back, says of itself what it likes, and so does its weight.
    let address = fleet.varnish[0].address;
    let own = "/clearcoat/v1/nodes/varnish/varnish-1";
    fleet.etcd().delete(own);
    eventually("it has left", || {
        let shown = fleet.others[0].fleet();
        let is_gone = shown["nodes"].as_array()?.iter().all(|node| node["id"] != "varnish-1");
        (is_gone && shown["absent"][0]["id"] == "varnish-1").then_some(())
    });
    fleet.etcd().put(own, &format!(r#"{{"address":"{address}","state":"up","weight":9}}"#));
    for clearcoat in fleet.clearcoats() {
        let shown = eventually("it is back", || {
            let mut nodes = clearcoat.nodes().into_iter();
            nodes.find(|node| node["id"] == "varnish-1" && node["health"] == "up" && node["weight"] == 9)
        });
        assert_eq!(shown["state"], "drained", "{shown}");
    }
    // A clearcoat that starts while etcd is away has it from the disk, and says that it can change nothing.
    for (file, text) in [("fleet.json", "\"weight\":9"), ("overrides.json", "varnish-1")] {
        let path = fleet.journal_of(0).join(file);
        eventually("it is on disk", || std::fs::read_to_string(&path).ok()?.contains(text).then_some(()));
    }
    fleet.clearcoat.kill();
    fleet.etcd().kill_all();
    fleet.clearcoat.restart();
    fleet.clearcoat.opened();
    assert_eq!(fleet.clearcoat.node("varnish-1")["state"], "drained");
    let output = node(&fleet.clearcoat, &["resume", "varnish-1"]);
    assert!(!output.status.success() && errors(&output).contains("etcd has not taken it"), "{output:?}");
    fleet.etcd().restart_all();
    fleet.etcd().healthy();
    eventually("etcd takes it again", || {
        node(&fleet.clearcoat, &["resume", "varnish-1"]).status.success().then_some(())
    });
    for clearcoat in fleet.clearcoats() {
        shows_drained(clearcoat, "varnish-1", false);
    }
    assert!(fleet.etcd().entries("/clearcoat/v1/overrides/").is_empty());
}

#[test]
fn a_weight_counts_until_the_registered_one_is_wanted_again() {
    let fleet = Fleet::start(&plan_with_etcd());
    assert_eq!(order(&fleet.clearcoat, &["weight", "web-1", "5"]).trim(), "web web-1 is ready, with weight 5");
    for clearcoat in fleet.clearcoats() {
        let shown =
            eventually("it has the weight", || Some(clearcoat.node("web-1")).filter(|node| node["weight"] == 5));
        assert_eq!(shown["registered_weight"], 1);
    }
    order(&fleet.others[0], &["weight", "web-1", "registered"]);
    for clearcoat in fleet.clearcoats() {
        eventually("it has its own again", || (clearcoat.node("web-1")["weight"] == 1).then_some(()));
        assert!(clearcoat.node("web-1")["registered_weight"].is_null());
    }
}

#[test]
fn the_last_node_that_serves_is_drained_only_if_the_operator_insists() {
    let fleet = Fleet::start(&Plan { varnish: 2, web: 1, config: CONFIG, ..Plan::default() });
    order(&fleet.clearcoat, &["drain", "varnish-1"]);
    shows_drained(&fleet.clearcoat, "varnish-1", true);
    for (id, role) in [("varnish-2", "varnish"), ("web-1", "web")] {
        let output = node(&fleet.clearcoat, &["drain", id]);
        let error = errors(&output);
        assert!(!output.status.success() && error.contains(&format!("no other {role} node gets traffic")), "{error}");
        assert!(error.contains("--force"), "{error}");
        assert_eq!(fleet.clearcoat.node(id)["gets_traffic"], true);
    }
    // Once more, or of one that gets nothing already, is no harm.
    order(&fleet.clearcoat, &["drain", "varnish-1"]);
    order(&fleet.clearcoat, &["drain", "varnish-2", "--force"]);
    shows_drained(&fleet.clearcoat, "varnish-2", true);
    // Past the caches, as with every Varnish behind.
    assert_eq!(fleet.get("/p/1").status, 200);
}

#[test]
fn two_operators_at_once_do_not_drain_the_last_two_nodes() {
    let alone = Plan { replicas: 1, ..plan() };
    for plan in [alone, plan(), plan_with_etcd()] {
        let fleet = Fleet::start(&plan);
        let (first, second) = (&fleet.clearcoat, fleet.others.first().unwrap_or(&fleet.clearcoat));
        for round in 0..6 {
            let at_once = std::sync::Barrier::new(2);
            let outputs = std::thread::scope(|scope| {
                let at_once = &at_once;
                let drain = |clearcoat, id| {
                    at_once.wait();
                    node(clearcoat, &["drain", id])
                };
                let [one, two] = [(first, "varnish-1"), (second, "varnish-2")]
                    .map(|(clearcoat, id)| scope.spawn(move || drain(clearcoat, id)));
                [one, two].map(|operator| operator.join().expect("an operator"))
            });
            let drained: Vec<bool> = outputs.iter().map(|output| output.status.success()).collect();
            assert_ne!(drained, [true, true], "round {round}");
            for output in outputs.iter().filter(|output| !output.status.success()) {
                assert!(errors(output).contains("no other varnish node gets traffic"), "{output:?}");
            }
            for clearcoat in fleet.clearcoats() {
                for (id, drained) in [("varnish-1", drained[0]), ("varnish-2", drained[1])] {
                    shows_drained(clearcoat, id, drained);
                }
            }
            for id in ["varnish-1", "varnish-2"] {
                order(first, &["resume", id]);
                fleet.clearcoats().for_each(|clearcoat| _ = shows_drained(clearcoat, id, false));
            }
        }
    }
}

#[test]
fn two_nodes_of_one_id_are_told_apart_and_a_stranger_orders_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let listen =
        ["edge", "origin", "purge"].map(|section| format!("[{section}]\nlisten = [\"127.0.0.1:0\"]\n")).concat();
    let journal = folder.path().join("journal");
    let nodes = ["web", "varnish"]
        .map(|role| format!("[[node]]\nrole = \"{role}\"\nid = \"10.0.0.1:80\"\naddress = \"127.0.0.1:1\"\n"))
        .concat();
    let config = format!("{listen}{CONFIG}[journal]\nkind = \"disk\"\npath = \"{}\"\n{nodes}", journal.display());
    let clearcoat = Clearcoat::start(folder.path(), &config);
    clearcoat.opened();
    let output = node(&clearcoat, &["drain", "10.0.0.1:80", "--force"]);
    assert!(!output.status.success() && errors(&output).contains("--role"), "{output:?}");
    order(&clearcoat, &["drain", "10.0.0.1:80", "--force", "--role", "web"]);
    let drained = eventually("one is drained", || {
        let nodes = clearcoat.nodes();
        let drained: Vec<&Value> = nodes.iter().filter(|node| node["drained_since"].is_string()).collect();
        (drained.len() == 1).then(|| drained[0]["role"].clone())
    });
    assert_eq!(drained, "web");
    let output = node(&clearcoat, &["drain", "nobody"]);
    assert!(!output.status.success() && errors(&output).contains("knows no node nobody"), "{output:?}");
    let admin = format!("http://{}", clearcoat.admin);
    let wrong = folder.path().join("wrong");
    std::fs::write(&wrong, "wrong").unwrap();
    let wrong = wrong.to_str().unwrap();
    let output = run(&["node", "resume", "10.0.0.1:80", "--role", "web", "--admin", &admin, "--token-file", wrong]);
    assert!(!output.status.success() && errors(&output).contains("the token is missing or wrong"), "{output:?}");
    assert_eq!(clearcoat.nodes().iter().filter(|node| node["drained_since"].is_string()).count(), 1);
}
