//! Purges by URL that a Varnish takes from one clearcoat and refuses to another, or refuses after a restart.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use clearcoat::http_server::{self, Handler, Response};
use clearcoat::shutdown;
use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::support::clearcoat::Clearcoat;
use crate::support::client::{Answer, exchange, get};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::varnish::signal;

/// Refuses a URL while a file says so: to the clearcoat with a way of its own (`refuses-by-way`), and to any other
/// (`refuses`). It obeys all other purges.
fn refuses_urls(vcl: &str, id: &str, folder: &Path) -> String {
    let file = |name: &str| folder.join(format!("{id}-{name}")).display().to_string();
    let (by_way, directly) = (file("refuses-by-way"), file("refuses"));
    let rule = format!(
        "acl own_way {{\n    \"127.64.0.0\"/10;\n}}\n\nsub take_purge {{\n    if (req.url ~ \"^/p/\" && \
         ((client.ip ~ own_way && std.file_exists(\"{by_way}\")) || \
         (client.ip !~ own_way && std.file_exists(\"{directly}\")))) {{\n        return (synth(405));\n    }}\n"
    );
    let changed = vcl.replacen("sub take_purge {\n", &rule, 1);
    assert_ne!(changed, vcl);
    changed
}

/// The same, and it does not say what a flush drops.
fn refuses_urls_and_says_nothing(vcl: &str, id: &str, folder: &Path) -> String {
    let changed = vcl.replacen("set resp.http.X-Clearcoat-Flushed = \"all\";", "", 1);
    assert_ne!(changed, vcl);
    refuses_urls(&changed, id, folder)
}

/// Two clearcoats; the last one reaches the first Varnish by a way of its own, and can be cut off from it.
fn plan() -> Plan {
    Plan { varnish: 2, replicas: 2, own_way: true, ack_timeout: "4s", vcl: refuses_urls, ..Plan::default() }
}

fn refuse(fleet: &Fleet, name: &str) {
    std::fs::write(fleet.folder.path().join(name), "").expect("a file in our folder");
}

fn purge_url(clearcoat: &Clearcoat, path: &str) -> Answer {
    let request = format!("PURGE {path} HTTP/1.1\r\nHost: shop.test\r\n\r\n");
    exchange(clearcoat.purge, request).expect("an answer")
}

fn read(clearcoat: &Clearcoat, path: &str) -> String {
    get(clearcoat.edge, path).expect("the edge answers").text().to_owned()
}

fn is_current(clearcoat: &Clearcoat, id: &str) -> bool {
    clearcoat.node(id)["current"] == true
}

/// Cuts the last clearcoat off from the first Varnish, and waits until it has noticed.
fn cut(fleet: &Fleet) {
    fleet.own_way.as_ref().expect("a plan with it").cut();
    eventually("it is down there", || (fleet.clearcoats().last()?.node("varnish-1")["health"] == "down").then_some(()));
}

#[test]
fn a_url_that_a_varnish_refuses_at_another_replica_is_answered_400() {
    for plan in [plan(), Plan { etcd: 1, journal: "etcd", ..plan() }] {
        let fleet = Fleet::start(&plan);
        fleet.warm("/p/1");
        // It reaches the one that obeys it no more, and the other one is refused.
        refuse(&fleet, "varnish-1-refuses");
        cut(&fleet);
        let answer = purge_url(&fleet.others[0], "/p/1");
        assert_eq!(answer.status, 400, "{answer:?}");
        let told = answer.text();
        assert!(told.contains("varnish-1: it answered 405, asked by clearcoat-1"), "{told}");
        // Nobody was promised anything, and so no Varnish is kept out for it.
        for clearcoat in fleet.clearcoats() {
            eventually("every Varnish that can be reached is current", || {
                let waits = clearcoat.node("varnish-1")["health"] == "up" && !is_current(clearcoat, "varnish-1");
                (!waits && is_current(clearcoat, "varnish-2")).then_some(())
            });
        }
        fleet.shop.set(2, 7);
        assert_eq!(purge_url(&fleet.others[0], "/media/2").status, 200);
    }
}

#[test]
fn what_another_replica_answered_400_costs_no_cache_after_a_restart() {
    let mut fleet = Fleet::start(&plan());
    fleet.warm("/p/1");
    cut(&fleet);
    // One that both reach, so that it is refused, while the other one is away from the second clearcoat.
    refuse(&fleet, "varnish-2-refuses");
    refuse(&fleet, "varnish-1-refuses-by-way");
    assert_eq!(purge_url(&fleet.clearcoat, "/p/2").status, 400);
    let head = fleet.clearcoat.fleet()["head"].clone();
    eventually("the other one has it", || (fleet.others[0].fleet()["head"] == head).then_some(()));
    // Whoever has confirmed a later purge has heard of what was refused before it.
    eventually("and has heard how it was answered", || {
        purge_url(&fleet.clearcoat, "/media/1");
        fleet.others[0].log().has("were refused to their senders").then_some(())
    });
    fleet.replica(1).kill();
    fleet.replica(1).restart();
    fleet.own_way.as_mut().expect("a plan with it").mend();
    fleet.others[0].opened();
    eventually("it is current there", || is_current(&fleet.others[0], "varnish-1").then_some(()));
    assert_eq!(fleet.varnish[0].get("/p/1").cache(), "HIT");
    assert!(fleet.others[0].log().has("a purge is passed over"));
}

#[test]
fn a_varnish_that_refuses_after_the_answer_owes_a_flush_that_is_shown() {
    for (vcl, comes_back) in
        [(refuses_urls as fn(&str, &str, &Path) -> String, true), (refuses_urls_and_says_nothing, false)]
    {
        let mut fleet = Fleet::start(&Plan { vcl, ..plan() });
        fleet.warm("/p/1");
        cut(&fleet);
        refuse(&fleet, "varnish-1-refuses-by-way");
        fleet.shop.set(1, 7);
        let answer = purge_url(&fleet.clearcoat, "/p/1");
        assert_eq!((answer.status, &answer.json()["fenced"]), (200, &json!(["varnish-1"])), "{answer:?}");
        fleet.own_way.as_mut().expect("a plan with it").mend();
        let other = &fleet.others[0];
        if comes_back {
            eventually("it is current there", || is_current(other, "varnish-1").then_some(()));
            assert!(other.log().has("is carried out as one of everything"));
        } else {
            other.log().waits_for("it does not take a purge that was answered as done");
            assert!(!is_current(other, "varnish-1"));
        }
        assert_eq!(read(other, "/p/1"), "7");
    }
}

/// A purge is accepted while the first Varnish hangs, and clearcoat is killed before that runs again.
fn with_a_restart_in_between(fleet: &mut Fleet) -> Answer {
    fleet.warm("/p/9");
    fleet.varnish[0].hang();
    eventually("it is down", || (fleet.clearcoat.node("varnish-1")["health"] == "down").then_some(()));
    let answer = purge_url(&fleet.clearcoat, "/p/1");
    fleet.clearcoat.kill();
    fleet.clearcoat.restart();
    refuse(fleet, "varnish-1-refuses");
    fleet.varnish[0].resume();
    fleet.clearcoat.opened();
    answer
}

#[test]
fn a_restart_after_a_400_costs_a_varnish_that_was_away_nothing() {
    let mut fleet = Fleet::start(&Plan { varnish: 2, vcl: refuses_urls_and_says_nothing, ..Plan::default() });
    refuse(&fleet, "varnish-2-refuses");
    let answer = with_a_restart_in_between(&mut fleet);
    assert_eq!(answer.status, 400, "{answer:?}");
    eventually("it is current", || is_current(&fleet.clearcoat, "varnish-1").then_some(()));
    assert_eq!(fleet.varnish[0].get("/p/9").cache(), "HIT");
    assert!(fleet.clearcoat.log().has("a purge is passed over"));
}

#[test]
fn a_restart_after_a_200_makes_nobody_forget_that_it_was_promised() {
    let mut fleet = Fleet::start(&Plan { varnish: 2, vcl: refuses_urls_and_says_nothing, ..Plan::default() });
    let answer = with_a_restart_in_between(&mut fleet);
    assert_eq!((answer.status, &answer.json()["fenced"]), (200, &json!(["varnish-1"])), "{answer:?}");
    fleet.clearcoat.log().waits_for("it does not take a purge that was answered as done");
    assert!(!is_current(&fleet.clearcoat, "varnish-1"));
}

#[test]
fn a_url_that_has_retired_is_not_forgotten_over_restarts() {
    let config = "[journal]\nkind = \"disk\"\nretention = \"1s\"\nfirst_start = \"trust\"\n";
    let folder = tempfile::tempdir().expect("a folder");
    let config = format!("{config}path = \"{}\"\n", folder.path().display());
    let mut fleet = Fleet::start(&Plan {
        varnish: 2,
        config: config.leak(),
        vcl: refuses_urls_and_says_nothing,
        ..Plan::default()
    });
    fleet.varnish[0].hang();
    eventually("it is down", || (fleet.clearcoat.node("varnish-1")["health"] == "down").then_some(()));
    let missed = purge_url(&fleet.clearcoat, "/p/1").json()["position"].as_u64().expect("a position");
    let retired = std::time::Instant::now() + std::time::Duration::from_millis(1_100);
    eventually("it has retired", || {
        fleet.purge_tag("cat_p_1");
        (std::time::Instant::now() > retired && fleet.clearcoat.fleet()["head"].as_u64()? > missed + 2).then_some(())
    });
    for _ in 0..2 {
        fleet.clearcoat.kill();
        fleet.clearcoat.restart();
        fleet.clearcoat.opened();
        fleet.purge_tag("cat_p_2");
    }
    fleet.varnish[0].resume();
    fleet.clearcoat.log().waits_for("it missed purges by URL that are no longer held");
    assert!(!is_current(&fleet.clearcoat, "varnish-1"));
}

#[test]
fn what_a_replica_refuses_that_was_not_waited_for_is_flushed_there() {
    let plan = Plan { ack_timeout: "2s", vcl: refuses_urls_and_says_nothing, ..plan() };
    for plan in [Plan { etcd: 1, journal: "etcd", ..plan }, plan] {
        let fleet = Fleet::start(&plan);
        refuse(&fleet, "varnish-1-refuses-by-way");
        let other = &fleet.others[0];
        signal("-STOP", &[other.pid()]);
        let answer = purge_url(&fleet.clearcoat, "/p/1").json();
        assert_eq!(answer["unconfirmed"], json!(["clearcoat-2"]), "{answer}");
        signal("-CONT", &[other.pid()]);
        other.log().waits_for("it does not take a purge that was answered as done");
        assert!(!is_current(other, "varnish-1") && is_current(other, "varnish-2"));
        assert!(is_current(&fleet.clearcoat, "varnish-1"));
    }
}

/// Another replica (a fake: what it confirms, and when, is the test's).
struct Other {
    address: SocketAddr,
    /// It may confirm what was not answered yet, and what was.
    may_confirm: watch::Receiver<(bool, bool)>,
}

impl Handler for Other {
    fn wants_body(&self, _: &http::request::Parts, _: SocketAddr) -> bool {
        true
    }

    /// Says of each purge that `varnish-1` does not take it, until it hears that it is done.
    async fn handle(&self, request: http::Request<Bytes>, _: SocketAddr) -> Response {
        let message: Value = serde_json::from_slice(request.body()).unwrap_or_default();
        let purges = message["purges"].as_array().cloned().unwrap_or_default();
        let is_done = message["done"].as_array().is_some_and(|done| done.len() == purges.len());
        let refused = |told: &Value| json!({"id": told["id"], "nodes": {"varnish-1": "it answered 405"}});
        let refused: Vec<Value> = purges.iter().filter(|_| !is_done).map(refused).collect();
        if !purges.is_empty() {
            let mut may_confirm = self.may_confirm.clone();
            _ = may_confirm.wait_for(|(before, after)| if is_done { *after } else { *before }).await;
        }
        let record = json!({
            "address": self.address, "journal": "disk", "journal_id": "theirs", "version": "0", "started": 0, "boot": "0"
        });
        // A name of its own: one who was known and has another journal would be sent a purge of everything.
        let from = json!({"id": "clearcoat-3", "record": record, "fresh": true});
        let nodes = ["varnish-1", "varnish-2"];
        http_server::json(200, &json!({"applied": nodes, "fenced": [], "refused": refused, "from": from}))
    }
}

#[test]
fn a_replica_that_refuses_too_late_is_told_so_and_named_until_it_confirms() {
    // An eighth of it is left when the answer is there.
    let mut fleet = Fleet::start(&Plan { ack_timeout: "8s", ..plan() });
    fleet.replica(1).kill();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
    let address = listener.local_addr().expect("an address");
    let (_stop, running) = shutdown::channel();
    let (confirms, may_confirm) = watch::channel((false, false));
    let other = Arc::new(Other { address, may_confirm });
    runtime.spawn(http_server::serve(listener, other, 64, 1 << 20, running));
    fleet.clearcoat.kill();
    let config = fleet.clearcoat.config();
    fleet.clearcoat.configure(&config.replacen(&fleet.others[0].purge.to_string(), &address.to_string(), 1));
    fleet.clearcoat.restart();
    fleet.clearcoat.opened();
    let problem = || {
        let replicas = fleet.clearcoat.fleet()["replicas"].clone();
        let replicas = replicas.as_array().expect("replicas").clone();
        let other = replicas.into_iter().find(|replica| replica["id"] == "clearcoat-3");
        other.map(|other| other["problem"].as_str().unwrap_or_default().to_owned())
    };
    eventually("it is known", || problem().filter(String::is_empty));
    // Too late.
    let answer = purge_url(&fleet.clearcoat, "/p/1").json();
    assert_eq!(answer["unconfirmed"], json!(["clearcoat-3"]), "{answer}");
    confirms.send_replace((true, false));
    eventually("it is said", || problem().filter(|problem| problem.contains("answered as done without it")));
    confirms.send_replace((true, true));
    eventually("it has confirmed", || problem().filter(String::is_empty));
    // In time.
    let answer = purge_url(&fleet.clearcoat, "/p/2");
    assert_eq!(answer.status, 400, "{answer:?}");
    assert!(answer.text().contains("asked by clearcoat-3"), "{answer:?}");
    runtime.shutdown_background();
}
