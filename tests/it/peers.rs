//! Several clearcoats in front of one fleet, each with its own journal, which notify each other.

use std::time::Duration;

use clearcoat::http_server::{self, Handler, Response, text};
use clearcoat::shutdown;

use crate::support::clearcoat::Clearcoat;
use crate::support::client::{Answer, get, purge, tag};
use crate::support::eventually;
use crate::support::faults::{fail_purges, purges_can_fail};
use crate::support::fleet::{Fleet, Plan};
use crate::support::reader::{Outage, Reader};
use crate::support::varnish::signal;

/// Two clearcoats, two Varnish nodes, no etcd.
fn plan() -> Plan {
    // Longer than anything takes on a busy machine: a replica named as unconfirmed has not answered at all.
    Plan { varnish: 2, replicas: 2, ack_timeout: "15s", ..Plan::default() }
}

fn read(clearcoat: &Clearcoat, path: &str) -> String {
    get(clearcoat.edge, path).expect("the edge answers").text().to_owned()
}

fn purge_by(clearcoat: &Clearcoat, name: &str) -> serde_json::Value {
    let answer = purge(clearcoat.purge, &tag(name)).expect("the purge listener answers");
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

/// A clearcoat's status entry of itself or of another one.
fn view(clearcoat: &Clearcoat, id: &str) -> serde_json::Value {
    let fleet = clearcoat.fleet();
    let replicas = fleet["replicas"].as_array().expect("replicas").clone();
    replicas.into_iter().find(|replica| replica["id"] == id).unwrap_or_default()
}

/// Waits until a purge leaves no replica unconfirmed.
fn all_confirm(clearcoat: &Clearcoat) {
    eventually("all others confirm", || purge_by(clearcoat, "nothing")["unconfirmed"].is_null().then_some(()));
}

/// Restarts a clearcoat with a changed configuration.
fn restart_with(clearcoat: &mut Clearcoat, before: &str, after: &str) {
    let config = clearcoat.config();
    assert!(config.contains(before), "{config}");
    clearcoat.configure(&config.replacen(before, after, 1));
    clearcoat.restart();
}

#[test]
fn a_purge_answered_by_one_holds_behind_all_without_a_shared_journal() {
    for journal in ["disk", "memory"] {
        let mut fleet = Fleet::start(&Plan { journal, ..plan() });
        fleet.warm("/p/1");
        let heads = |fleet: &Fleet| -> Vec<u64> {
            fleet.clearcoats().map(|clearcoat| clearcoat.fleet()["head"].as_u64().unwrap()).collect()
        };
        let at_first = heads(&fleet);
        let readers: Vec<Reader> =
            fleet.clearcoats().map(|clearcoat| Reader::start(clearcoat.edge, 1, Outage::None)).collect();
        for version in 1..=20 {
            fleet.shop.set(1, version);
            let answer = purge_by(fleet.replica(version as usize % 2), "cat_p_1");
            assert_eq!(answer["fenced"], serde_json::json!([]), "{answer}");
            assert!(answer["unconfirmed"].is_null() && answer["fenced_at"].is_null(), "{answer}");
            readers.iter().for_each(|reader| reader.promise(version));
            for clearcoat in fleet.clearcoats() {
                assert_eq!(read(clearcoat, "/p/1"), version.to_string());
            }
        }
        readers.into_iter().for_each(Reader::stop);
        // Each has each purge once: no replica has passed on a purge that it was told.
        let new: Vec<u64> = heads(&fleet).iter().zip(at_first).map(|(head, at_first)| head - at_first).collect();
        assert_eq!(new, [20, 20]);
    }
}

#[test]
fn a_varnish_that_one_could_not_purge_is_avoided_by_the_other_at_once() {
    let fleet = Fleet::start(&Plan { vcl: purges_can_fail, ack_timeout: "1s", ..plan() });
    all_confirm(&fleet.clearcoat);
    let pages: Vec<u64> = (1..=20).collect();
    for page in &pages {
        fleet.warm(&format!("/p/{page}"));
        fleet.shop.set(*page, 7);
    }
    fail_purges(&fleet, "varnish-1", true);
    let tags: Vec<String> = pages.iter().map(|page| tag(&format!("cat_p_{page}"))).collect();
    assert_eq!(purge(fleet.clearcoat.purge, &tags.join("|")).expect("an answer").status, 200);
    for page in &pages {
        assert_eq!(read(&fleet.others[0], &format!("/p/{page}")), "7");
    }
    fail_purges(&fleet, "varnish-1", false);
    fleet.clearcoats().for_each(Clearcoat::current);
}

#[test]
fn a_returning_replica_catches_up_before_its_edge_opens() {
    let mut fleet = Fleet::start(&plan());
    fleet.warm("/p/1");
    all_confirm(&fleet.clearcoat);
    eventually("it is written down how far it is", || {
        let marks = std::fs::read_to_string(fleet.journal_of(0).join("peers.json")).ok()?;
        marks.contains("clearcoat-2").then_some(())
    });
    fleet.replica(1).kill();
    fleet.shop.set(1, 7);
    let answer = purge_by(&fleet.clearcoat, "cat_p_1");
    assert_eq!(answer["unconfirmed"], serde_json::json!(["clearcoat-2"]), "{answer}");
    let head = fleet.clearcoat.fleet()["head"].clone();
    fleet.clearcoat.kill();
    fleet.clearcoat.restart();
    fleet.clearcoat.opened();
    // The peer was not seen since, but is not forgotten.
    let answer = purge_by(&fleet.clearcoat, "cat_p_2");
    assert_eq!(answer["unconfirmed"], serde_json::json!([fleet.others[0].purge.to_string()]), "{answer}");
    let reader = Reader::start(fleet.others[0].edge, 1, Outage::AtFirst);
    reader.promise(7);
    fleet.replica(1).restart();
    fleet.others[0].opened();
    assert!(fleet.others[0].fleet()["head"].as_u64() > head.as_u64(), "it has what it missed when its edge opens");
    eventually("the page was read", || (reader.reads() > 20).then_some(()));
    reader.stop();
    all_confirm(&fleet.clearcoat);
    // All purges one by one, not a single purge of everything.
    assert_eq!(fleet.others[0].metric("clearcoat_replica_gaps_total"), 0.0);
}

#[test]
fn a_lost_journal_or_too_long_an_absence_drops_every_page() {
    let mut fleet = Fleet::start(&plan());
    all_confirm(&fleet.clearcoat);
    // It has lost its journal.
    fleet.replica(1).kill();
    let path = fleet.journal_of(1);
    std::fs::remove_dir_all(&path).expect("its journal");
    purge_by(&fleet.clearcoat, "cat_p_1");
    fleet.replica(1).restart();
    fleet.others[0].opened();
    assert_eq!(fleet.others[0].metric("clearcoat_replica_gaps_total"), 1.0);
    assert!(fleet.others[0].log().has("every Varnish drops its pages"));
    all_confirm(&fleet.clearcoat);

    // It is away for longer than the other one keeps purges.
    fleet.clearcoat.kill();
    restart_with(&mut fleet.clearcoat, "[journal]", "[journal]\nretention = \"1s\"");
    fleet.clearcoat.opened();
    all_confirm(&fleet.clearcoat);
    fleet.replica(1).kill();
    purge_by(&fleet.clearcoat, "cat_p_1");
    let missed = std::time::Instant::now();
    eventually("the purge that it misses is not held any more", || {
        purge_by(&fleet.clearcoat, "cat_p_2");
        (missed.elapsed() > Duration::from_secs(2)).then_some(())
    });
    fleet.replica(1).restart();
    fleet.others[0].opened();
    assert_eq!(fleet.others[0].metric("clearcoat_replica_gaps_total"), 1.0);
    all_confirm(&fleet.clearcoat);
}

#[test]
fn a_new_replica_empties_no_cache_and_notifies_those_not_naming_it() {
    let mut fleet = Fleet::start(&Plan { replicas: 3, ..plan() });
    all_confirm(&fleet.clearcoat);
    fleet.replica(2).kill();
    let path = fleet.journal_of(2);
    std::fs::remove_dir_all(&path).expect("its journal");
    purge_by(&fleet.clearcoat, "cat_p_1");
    fleet.warm("/p/1");
    restart_with(fleet.replica(2), "id = \"clearcoat-3\"", "id = \"clearcoat-4\"");
    fleet.others[1].opened();
    for clearcoat in fleet.clearcoats() {
        assert_eq!(clearcoat.metric("clearcoat_replica_gaps_total"), 0.0);
        all_confirm(clearcoat);
    }
    assert!(fleet.cached("/p/1").iter().all(|cache| cache == "HIT"));
    fleet.shop.set(1, 5);
    purge_by(&fleet.others[1], "cat_p_1");
    fleet.clearcoats().for_each(|clearcoat| assert_eq!(read(clearcoat, "/p/1"), "5"));
    // A replica configured only with itself still exchanges purges with one that names it.
    fleet.replica(2).kill();
    let (config, own) = (fleet.others[1].config(), fleet.others[1].purge.to_string());
    let start = config.find("peers = [").expect("its peers");
    let end = start + config[start..].find(']').expect("an end");
    let alone = format!("{}peers = [\"{own}\"{}", &config[..start], &config[end..]);
    fleet.others[1].configure(&alone);
    fleet.replica(2).restart();
    fleet.others[1].opened();
    all_confirm(&fleet.clearcoat);
    eventually("it knows the others", || (fleet.others[1].fleet()["replicas"].as_array()?.len() == 3).then_some(()));
    fleet.shop.set(1, 6);
    purge_by(&fleet.others[1], "cat_p_1");
    fleet.clearcoats().for_each(|clearcoat| assert_eq!(read(clearcoat, "/p/1"), "6"));
}

#[test]
fn one_that_hangs_is_named_and_gets_everything_when_it_runs_again() {
    let fleet = Fleet::start(&Plan { ack_timeout: "2s", ..plan() });
    fleet.warm("/p/1");
    all_confirm(&fleet.clearcoat);
    let other = &fleet.others[0];
    signal("-STOP", &[other.pid()]);
    fleet.shop.set(1, 1);
    for _ in 0..2 {
        let answer = purge_by(&fleet.clearcoat, "cat_p_1");
        assert_eq!(answer["unconfirmed"], serde_json::json!(["clearcoat-2"]), "{answer}");
    }
    let head = fleet.clearcoat.fleet()["head"].as_u64().unwrap();
    signal("-CONT", &[other.pid()]);
    eventually("it has what it missed", || (other.fleet()["head"].as_u64()? >= head).then_some(()));
    all_confirm(&fleet.clearcoat);
    assert_eq!(read(other, "/p/1"), "1");
}

#[test]
fn one_that_ends_in_order_is_not_waited_for_nor_named() {
    let mut fleet = Fleet::start(&plan());
    all_confirm(&fleet.clearcoat);
    fleet.others[0].terminate();
    fleet.replica(1).wait();
    let answer = purge_by(&fleet.clearcoat, "cat_p_1");
    assert!(answer["unconfirmed"].is_null(), "{answer}");
}

#[test]
fn one_with_another_token_is_named_with_what_it_answers() {
    let mut fleet = Fleet::start(&plan());
    all_confirm(&fleet.clearcoat);
    let token = fleet.folder.path().join("token");
    std::fs::write(&token, "a-token-of-its-own").expect("a file");
    fleet.replica(1).kill();
    let keys = format!("[purge]\ntoken_file = {:?}", token.display().to_string());
    restart_with(fleet.replica(1), "[purge]", &keys);
    fleet.others[0].opened();
    let answer = purge_by(&fleet.clearcoat, "cat_p_1");
    assert!(!answer["unconfirmed"].is_null(), "{answer}");
    eventually("it is said why", || {
        let replicas = fleet.clearcoat.fleet()["replicas"].to_string();
        replicas.contains("it answered 403").then_some(())
    });
}

#[test]
fn two_of_one_name_are_an_error_at_both_and_it_is_over_when_one_ends() {
    let mut fleet = Fleet::start(&plan());
    fleet.replica(1).kill();
    restart_with(fleet.replica(1), "id = \"clearcoat-2\"", "id = \"clearcoat-1\"");
    let addresses = [fleet.clearcoat.purge.to_string(), fleet.others[0].purge.to_string()];
    for clearcoat in fleet.clearcoats() {
        eventually("it is said with both addresses", || {
            let problem = view(clearcoat, "clearcoat-1")["problem"].to_string();
            let says_both = addresses.iter().all(|address| problem.contains(address));
            (says_both && clearcoat.metric("clearcoat_replica_same_id") == 1.0).then_some(())
        });
        // Logged once for the name and once for the address, however often they meet.
        assert!(clearcoat.log().count("is also used by") <= 2);
    }
    // One of them continues to serve.
    let ready = |clearcoat: &Clearcoat| get(clearcoat.admin, "/readyz").expect("an answer");
    eventually("one of them is ready, and the other one says why it is not", || {
        let answers: Vec<_> = fleet.clearcoats().map(ready).collect();
        let refused: Vec<_> = answers.iter().filter(|answer| answer.status == 503).collect();
        let says_why = |answer: &Answer| addresses.iter().all(|address| answer.text().contains(address));
        (refused.len() == 1 && says_why(refused[0])).then_some(())
    });
    fleet.replica(1).kill();
    fleet.clearcoat.opened();
    eventually("the metric says that it is over", || {
        (fleet.clearcoat.metric("clearcoat_replica_same_id") == 0.0).then_some(())
    });
}

#[test]
fn a_name_of_only_oneself_is_ignored_and_an_unresolved_one_is_reported() {
    let mut fleet = Fleet::start(&Plan { varnish: 1, ..plan() });
    fleet.replica(1).kill();
    fleet.clearcoat.kill();
    let (config, own) = (fleet.clearcoat.config(), fleet.clearcoat.purge);
    let start = config.find("peers = [").expect("its peers");
    let end = start + config[start..].find(']').expect("an end");
    let named =
        |name: &str| format!("{}peers = [\"dns+http://{name}:{}\"{}", &config[..start], own.port(), &config[end..]);
    fleet.clearcoat.configure(&named("localhost"));
    fleet.clearcoat.restart();
    fleet.clearcoat.opened();
    let answer = purge_by(&fleet.clearcoat, "cat_p_1");
    // `localhost` may also have an IPv6 address without a listener.
    let unconfirmed = answer["unconfirmed"].to_string();
    assert!(!unconfirmed.contains("127.0.0.1"), "{answer}");
    fleet.clearcoat.kill();
    fleet.clearcoat.configure(&named("nothing.invalid"));
    fleet.clearcoat.restart();
    fleet.clearcoat.opened();
    let answer = purge_by(&fleet.clearcoat, "cat_p_1");
    let name = format!("nothing.invalid:{}", own.port());
    assert_eq!(answer["unconfirmed"], serde_json::json!([name]), "{answer}");
    assert!(
        view(&fleet.clearcoat, &name)["problem"].to_string().contains("looking up"),
        "{:?}",
        fleet.clearcoat.fleet()
    );
}

/// Not a replica, or one of an older version.
struct Older(u16, &'static str);

impl Handler for Older {
    fn wants_body(&self, _head: &http::request::Parts, _peer: std::net::SocketAddr) -> bool {
        true
    }

    async fn handle(&self, _: http::Request<hyper::body::Bytes>, _: std::net::SocketAddr) -> Response {
        text(self.0, self.1)
    }
}

#[test]
fn one_of_an_older_version_is_named_with_what_it_says() {
    let mut fleet = Fleet::start(&plan());
    fleet.replica(1).kill();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    for (status, body, said) in [
        (404, "not found", "it answered 404: not found"),
        (409, "{\"error\":\"knows of no replicas\"}", "it answered 409: knows of no replicas"),
        (200, "{\"applied\":[],\"fenced\":[]}", "of a version that knows no replica.peers"),
    ] {
        let (stop, running) = shutdown::channel();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let server = http_server::serve(listener, std::sync::Arc::new(Older(status, body)), 64, 1 << 20, running);
        let serving = runtime.spawn(server);
        fleet.clearcoat.kill();
        let (config, before) = (fleet.clearcoat.config(), fleet.others[0].purge.to_string());
        fleet.clearcoat.configure(&config.replacen(&before, &address, 1));
        fleet.clearcoat.restart();
        fleet.clearcoat.opened();
        let answer = purge_by(&fleet.clearcoat, "cat_p_1");
        assert_eq!(answer["unconfirmed"], serde_json::json!([address]), "{answer}");
        let problem = view(&fleet.clearcoat, &address)["problem"].to_string();
        assert!(problem.contains(said), "{problem}");
        fleet.clearcoat.kill();
        fleet.clearcoat.configure(&config);
        stop.advance(shutdown::Stage::Stopping);
        serving.abort();
    }
}
