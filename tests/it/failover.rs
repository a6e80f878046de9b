//! Nodes that hang, die, refuse and return: the effects on clients and purges.

use std::time::{Duration, Instant};

use crate::support::client::{get, purge};
use crate::support::eventually;
use crate::support::faults::{fail_purges, purges_can_fail, second_refuses_clearcoat};
use crate::support::fleet::{Fleet, Plan};
use crate::support::reader::{Outage, Reader};

/// `purge.ack_timeout` of the fleets here, and the tolerance of an answer if a node hangs. The next answer has to come
/// in less than half the time: a fenced node is not waited for.
const ACK_TIMEOUT: Duration = Duration::from_secs(1);
const GRACE: Duration = Duration::from_millis(100);

/// The time between two health checks, of both roles.
const INTERVAL: Duration = Duration::from_secs(1);

/// The number of pages: enough for each Varnish to have some of them.
const PAGES: u64 = 30;

/// Changes all pages and purges them, as after an import. Returns the answer and how long it took.
fn change_all(fleet: &Fleet, version: u64) -> (serde_json::Value, Duration) {
    (1..=PAGES).for_each(|page| fleet.shop.set(page, version));
    let began = Instant::now();
    let answer = fleet.purge_tag("cat_p");
    let took = began.elapsed();
    assert_eq!(answer.status, 200, "{answer:?}");
    (answer.json(), took)
}

fn good_answers(fleet: &Fleet, listener: &str, node: &str) -> f64 {
    fleet.clearcoat.metric(&format!("clearcoat_{listener}_requests_total{{code_class=\"2xx\",node=\"{node}\"}}"))
}

/// Waits until a node answers requests again.
fn serves_again(fleet: &Fleet, listener: &str, node: &str) {
    let before = good_answers(fleet, listener, node);
    eventually("the node gets traffic again", || (good_answers(fleet, listener, node) > before).then_some(()));
}

fn is_up(fleet: &Fleet, node: &str) -> bool {
    fleet.clearcoat.node(node)["health"] == "up"
}

/// The second of three Varnish nodes hangs, two purges are sent, it resumes. Returns how long the purges took.
fn hang_and_catch_up(fleet: &Fleet, reader: &Reader, version: u64) -> (Duration, Duration) {
    fleet.varnish[1].hang();
    let (first_answer, first) = change_all(fleet, version - 1);
    let (second_answer, second) = change_all(fleet, version);
    reader.promise(version);
    println!("a Varnish hangs: the first purge took {first:?}, the second {second:?}");
    for answer in [first_answer, second_answer] {
        assert_eq!(answer["fenced"], serde_json::json!(["varnish-2"]));
        assert_eq!(answer["applied"], serde_json::json!(["varnish-1", "varnish-3"]));
    }

    // Every page is read, including those of the hung node.
    let reads = reader.reads();
    eventually("every page was read again", || (reader.reads() > reads + PAGES).then_some(()));
    let node = fleet.clearcoat.node("varnish-2");
    assert_eq!(node["current"], false, "{node}");
    let behind = good_answers(fleet, "edge", "varnish-2");
    fleet.varnish[1].resume();
    eventually("the node has caught up", || {
        // In this order: answers from before the node was current are already in the first number.
        let served = good_answers(fleet, "edge", "varnish-2") > behind;
        let current = fleet.clearcoat.node("varnish-2")["current"] == true;
        assert!(current || !served, "the node got traffic before it had caught up");
        current.then_some(())
    });
    for page in 1..=PAGES {
        assert_eq!(fleet.varnish[1].get(&format!("/p/{page}")).text(), version.to_string(), "page {page}");
    }
    serves_again(fleet, "edge", "varnish-2");
    (first, second)
}

#[test]
fn a_hung_varnish_costs_one_purge_timeout_and_serves_once_caught_up() {
    let fleet = Fleet::start(&Plan::default());
    (1..=PAGES).for_each(|page| fleet.warm(&format!("/p/{page}")));
    let reader = Reader::start(fleet.clearcoat.edge, PAGES, Outage::None);
    serves_again(&fleet, "edge", "varnish-2");
    // On a busy machine a single answer can be late; if one is late in every round, the fault is ours.
    let rounds = (1..=3).map(|round| hang_and_catch_up(&fleet, &reader, 2 * round));
    let in_time = |(first, second): &(Duration, Duration)| {
        assert!(*first > ACK_TIMEOUT - GRACE, "the first purge took {first:?}: nobody waited for the node that hangs");
        *first < ACK_TIMEOUT + GRACE && *second < ACK_TIMEOUT / 2
    };
    assert!(rounds.into_iter().any(|round| in_time(&round)), "no answer came in time");
    reader.stop();
}

#[test]
fn a_healthy_varnish_that_misses_a_purge_does_not_serve_until_it_has_it() {
    let fleet = Fleet::start(&Plan { varnish: 2, vcl: purges_can_fail, ..Plan::default() });
    (1..=PAGES).for_each(|page| fleet.warm(&format!("/p/{page}")));
    let reader = Reader::start(fleet.clearcoat.edge, PAGES, Outage::None);
    serves_again(&fleet, "edge", "varnish-2");

    fail_purges(&fleet, "varnish-2", true);
    let (answer, _) = change_all(&fleet, 1);
    reader.promise(1);
    assert_eq!(answer["fenced"], serde_json::json!(["varnish-2"]));
    let reads = reader.reads();
    eventually("every page was read twice", || (reader.reads() > reads + 2 * PAGES).then_some(()));
    let node = fleet.clearcoat.node("varnish-2");
    assert_eq!((&node["health"], &node["current"]), (&"up".into(), &false.into()), "{node}");
    assert_eq!(fleet.varnish[1].get("/p/1").text(), "0", "it has the purge, and this test shows nothing");

    fail_purges(&fleet, "varnish-2", false);
    eventually("the node has caught up", || (fleet.clearcoat.node("varnish-2")["current"] == true).then_some(()));
    serves_again(&fleet, "edge", "varnish-2");
    reader.stop();
}

#[test]
fn a_dead_varnish_is_out_within_two_checks_and_comes_back_up_to_date() {
    let mut fleet = Fleet::start(&Plan { varnish: 2, ..Plan::default() });
    let reader = Reader::start(fleet.clearcoat.edge, PAGES, Outage::None);
    serves_again(&fleet, "edge", "varnish-2");

    let died = Instant::now();
    fleet.varnish[1].kill();
    eventually("the dead node is out", || (!is_up(&fleet, "varnish-2")).then_some(()));
    let noticed = died.elapsed();
    println!("a dead Varnish was out after {noticed:?}");
    assert!(noticed < 2 * INTERVAL, "it took {noticed:?} to notice a dead node");

    // It is not waited for, though it lacks the purge.
    let (answer, took) = change_all(&fleet, 1);
    reader.promise(1);
    assert_eq!(answer["fenced"], serde_json::json!(["varnish-2"]));
    assert!(took < ACK_TIMEOUT / 2, "a purge waited {took:?} for a node that is known to be dead");
    let reads = reader.reads();
    eventually("every page was read again", || (reader.reads() > reads + PAGES).then_some(()));

    fleet.varnish[1].restart();
    eventually("the node is back and has caught up", || {
        (is_up(&fleet, "varnish-2") && fleet.clearcoat.node("varnish-2")["current"] == true).then_some(())
    });
    serves_again(&fleet, "edge", "varnish-2");
    reader.stop();
}

#[test]
fn a_web_node_that_is_ill_or_dead_gets_no_requests_and_no_client_notices() {
    let mut fleet = Fleet::start(&Plan { varnish: 1, ..Plan::default() });
    // More pages than are ever read: every read is one for the web nodes.
    let reader = Reader::start(fleet.clearcoat.edge, u64::MAX, Outage::None);
    serves_again(&fleet, "origin", "web-1");

    fleet.web[0].healthy.store(false, std::sync::atomic::Ordering::SeqCst);
    eventually("the ill node is out", || (!is_up(&fleet, "web-1")).then_some(()));
    let reason = fleet.clearcoat.node("web-1")["reason"].as_str().expect("a text").to_owned();
    assert!(reason.contains("/health_check.php answered 500"), "{reason}");
    // Requests in flight when the node went out are counted by the time the other one has answered some more.
    (0..2).for_each(|_| serves_again(&fleet, "origin", "web-2"));
    let before = good_answers(&fleet, "origin", "web-1");
    (0..10).for_each(|_| serves_again(&fleet, "origin", "web-2"));
    assert_eq!(good_answers(&fleet, "origin", "web-1"), before, "an ill node got requests");

    fleet.web[0].healthy.store(true, std::sync::atomic::Ordering::SeqCst);
    eventually("the node is back", || is_up(&fleet, "web-1").then_some(()));
    serves_again(&fleet, "origin", "web-1");

    let died = Instant::now();
    drop(fleet.web.remove(0));
    eventually("the dead node is out", || (!is_up(&fleet, "web-1")).then_some(()));
    let noticed = died.elapsed();
    println!("a dead web node was out after {noticed:?}");
    assert!(noticed < 2 * INTERVAL, "it took {noticed:?} to notice a dead node");
    serves_again(&fleet, "origin", "web-2");
    reader.stop();
}

/// One healthy Varnish that has page 1 in its cache as of version 0, and was fenced by a purge of it.
fn all_behind(config: &'static str) -> Fleet {
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, config, vcl: purges_can_fail, ..Plan::default() });
    fleet.warm("/p/1");
    fail_purges(&fleet, "varnish-1", true);
    fleet.shop.set(1, 1);
    let answer = fleet.purge_tag("cat_p_1").json();
    assert_eq!(answer["fenced"], serde_json::json!(["varnish-1"]));
    let node = fleet.clearcoat.node("varnish-1");
    assert_eq!((&node["health"], &node["current"]), (&"up".into(), &false.into()), "{node}");
    let error = node["delivery_error"].as_str().expect("a text");
    assert!(error.contains("503"), "{error}");
    fleet
}

/// The fault is over: the Varnish catches up and serves the new page.
fn assert_recovers(fleet: &Fleet) {
    fail_purges(fleet, "varnish-1", false);
    eventually("the node has caught up", || (fleet.clearcoat.node("varnish-1")["current"] == true).then_some(()));
    let page = fleet.get("/p/1");
    assert_eq!((page.cache(), page.text()), ("MISS", "1"));
    assert_eq!(fleet.get("/p/1").cache(), "HIT");
}

#[test]
fn while_all_are_behind_the_web_nodes_answer() {
    let fleet = all_behind("");
    let page = fleet.get("/p/1");
    assert_eq!((page.status, page.text(), page.cache()), (200, "1", "none"), "{page:?}");
    assert_eq!(fleet.clearcoat.metric("clearcoat_stale_served_total"), 0.0);
    assert_recovers(&fleet);
}

#[test]
fn while_all_are_behind_clients_are_refused_where_that_is_wanted() {
    let fleet = all_behind("[edge]\nlisten = [\"127.0.0.1:0\"]\nwhen_all_behind = \"refuse\"\n");
    let answer = fleet.get("/p/1");
    assert_eq!(answer.status, 503, "{answer:?}");
    assert_recovers(&fleet);
}

#[test]
fn while_all_are_behind_old_pages_are_served_and_counted_if_configured() {
    let fleet = all_behind("[edge]\nlisten = [\"127.0.0.1:0\"]\nwhen_all_behind = \"serve\"\n");
    let page = fleet.get("/p/1");
    assert_eq!((page.status, page.text(), page.cache()), (200, "0", "HIT"), "{page:?}");
    assert_eq!(fleet.clearcoat.metric("clearcoat_stale_served_total"), 1.0);
    assert_recovers(&fleet);
    assert_eq!(fleet.clearcoat.metric("clearcoat_stale_served_total"), 1.0);
}

#[test]
fn a_varnish_whose_acl_refuses_purges_is_down_and_says_what_to_change() {
    let fleet = Fleet::launch(&Plan { varnish: 2, web: 1, vcl: second_refuses_clearcoat, ..Plan::default() });
    eventually("every node has been checked", || {
        let nodes = fleet.clearcoat.nodes();
        (nodes.len() == 3 && nodes.iter().all(|node| node["health"] != "unknown")).then_some(())
    });
    assert!(is_up(&fleet, "varnish-1") && !is_up(&fleet, "varnish-2"), "{}", fleet.clearcoat.fleet());
    let reason = fleet.clearcoat.node("varnish-2")["reason"].as_str().expect("a text").to_owned();
    assert!(reason.contains("405") && reason.contains("acl purge"), "{reason}");

    for page in 1..=PAGES {
        let answer = get(fleet.clearcoat.edge, &format!("/p/{page}")).expect("an answer");
        assert_eq!((answer.status, answer.cache()), (200, "MISS"), "page {page}");
    }
    // A request is counted slightly after its answer has arrived.
    eventually("the first one has answered all", || {
        (good_answers(&fleet, "edge", "varnish-1") == PAGES as f64).then_some(())
    });
    let (answer, took) = change_all(&fleet, 1);
    assert_eq!((&answer["applied"], &answer["fenced"]), (&vec!["varnish-1"].into(), &vec!["varnish-2"].into()));
    assert!(took < ACK_TIMEOUT / 2, "a purge waited {took:?} for a node that is down");
    let error = eventually("the purge was refused", || {
        let error = fleet.clearcoat.node("varnish-2")["delivery_error"].as_str().expect("a text").to_owned();
        (!error.is_empty()).then_some(error)
    });
    assert!(error.contains("405") && error.contains("acl purge"), "{error}");
    assert_eq!(
        purge(fleet.clearcoat.purge, ".*").expect("an answer").json()["applied"],
        serde_json::json!(["varnish-1"])
    );
}
