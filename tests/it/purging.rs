//! Purges end to end: Magento's own bytes, real varnishd.

use std::time::Duration;

use crate::support::client::{Answer, Connection, exchange, get, purge};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};

/// A request of Magento's client, byte for byte.
const ONE_TAG: &[u8] = include_bytes!("data/magento/one-tag-1.bin");
const THREE_TAGS: &[u8] = include_bytes!("data/magento/three-tags-1.bin");
const PRODUCT_SAVE: &[u8] = include_bytes!("data/magento/product-save-1.bin");
const FLUSH: &[u8] = include_bytes!("data/magento/flush-1.bin");
/// A reindex of products 1 to 900: three requests, in Magento's chunks.
const REINDEX: [&[u8]; 3] = [
    include_bytes!("data/magento/reindex-1.bin"),
    include_bytes!("data/magento/reindex-2.bin"),
    include_bytes!("data/magento/reindex-3.bin"),
];
/// The first and the last product of each chunk.
const REINDEXED: [[&str; 2]; 3] = [["/p/1", "/p/354"], ["/p/355", "/p/703"], ["/p/704", "/p/900"]];
/// Products whose tag is in no chunk, though 9000 begins like one and 0 ends like one.
const NOT_REINDEXED: [&str; 3] = ["/p/0", "/p/901", "/p/9000"];

/// A fleet with a long `ack_timeout`, so that a busy machine does not fence nodes: other tests check durations.
fn plan(varnish: usize, web: usize) -> Plan {
    let config = "[purge]\nlisten = [\"127.0.0.1:0\"]\nack_timeout = \"20s\"\nwait_for = \"varnish\"\n";
    Plan { varnish, web, config, ..Plan::default() }
}

/// Checks every detail of an answer to an accepted purge.
fn assert_purged(answer: &Answer, applied: usize) {
    assert!(answer.head.starts_with("HTTP/1.1 200 Purged\r\n"), "{answer:?}");
    assert_eq!(answer.header("Content-Type"), Some("application/json"));
    assert_eq!(answer.header("Content-Length"), Some(answer.body.len().to_string().as_str()));
    let json = answer.json();
    assert!(json["position"].as_u64().is_some_and(|position| position > 0), "{json}");
    assert!(json["invalidated"].is_u64(), "{json}");
    assert_eq!(json["applied"].as_array().expect("a list").len(), applied, "{json}");
    assert_eq!(json["fenced"], serde_json::json!([]));
}

/// The same request as from an HTTP/1.0 client, or a careless one.
fn without_host(request: &[u8]) -> Vec<u8> {
    let text = String::from_utf8(request.to_vec()).expect("text");
    assert!(text.contains("\r\nHost: 127.0.0.1\r\n"), "{text}");
    text.replacen("Host: 127.0.0.1\r\n", "", 1).into_bytes()
}

fn assert_cached(fleet: &Fleet, path: &str, expected: &str) {
    let cached = fleet.cached(path);
    assert!(cached.iter().all(|cache| cache == expected), "{path} is {cached:?} and not everywhere a {expected}");
}

fn warm_products(fleet: &Fleet) {
    REINDEXED.iter().flatten().chain(&NOT_REINDEXED).for_each(|page| fleet.warm(page));
}

fn assert_reindexed(fleet: &Fleet) {
    NOT_REINDEXED.iter().for_each(|page| assert_cached(fleet, page, "HIT"));
    REINDEXED.iter().flatten().for_each(|page| assert_cached(fleet, page, "MISS"));
}

#[test]
fn a_purged_page_is_rendered_again_and_others_stay() {
    // With bounded load, a request that is just ending can send the next one for its page to another cache.
    let config = "[edge]\nlisten = [\"127.0.0.1:0\"]\nbounded_load = 0\n";
    let fleet = Fleet::start(&Plan { config, ..plan(3, 2) });
    for page in ["/p/1", "/p/2"] {
        assert_eq!(fleet.get(page).cache(), "MISS");
        assert_eq!(fleet.get(page).cache(), "HIT");
    }
    fleet.shop.set(1, 7);
    let answer = fleet.purge_tag("cat_p_1");
    assert_purged(&answer, 3);
    let page = fleet.get("/p/1");
    assert_eq!((page.cache(), page.text()), ("MISS", "7"));
    assert_eq!(fleet.get("/p/2").cache(), "HIT");
}

#[test]
fn a_reindex_drops_its_products_in_every_varnish_and_no_other() {
    let fleet = Fleet::start(&plan(3, 2));
    let purge = fleet.clearcoat.purge;

    // As Magento sends them: one connection each.
    warm_products(&fleet);
    REINDEX.iter().for_each(|chunk| assert_purged(&exchange(purge, chunk).expect("an answer"), 3));
    assert_reindexed(&fleet);

    // Three requests on a kept connection.
    warm_products(&fleet);
    let mut kept = Connection::open(purge).expect("a connection");
    for chunk in REINDEX {
        kept.send(chunk).expect("sent");
        assert_purged(&kept.answer(false).expect("an answer"), 3);
    }
    assert_reindexed(&fleet);

    // All at once, without waiting for an answer.
    warm_products(&fleet);
    kept.send(REINDEX.concat()).expect("sent");
    REINDEX.iter().for_each(|_| assert_purged(&kept.answer(false).expect("an answer"), 3));
    assert_reindexed(&fleet);
}

#[test]
fn every_captured_magento_request_is_accepted_with_and_without_a_host() {
    let fleet = Fleet::start(&plan(1, 1));
    let captured = [ONE_TAG, THREE_TAGS, PRODUCT_SAVE, FLUSH].into_iter().chain(REINDEX);
    for request in captured {
        fleet.warm("/p/1");
        assert_purged(&exchange(fleet.clearcoat.purge, request).expect("an answer"), 1);
        let begin = String::from_utf8_lossy(&request[..request.len().min(80)]).into_owned();
        // All but two name product 1, all products, or everything.
        let names_it = request != REINDEX[1] && request != REINDEX[2];
        assert_eq!(fleet.cached("/p/1"), [if names_it { "MISS" } else { "HIT" }], "{begin}");

        let position = fleet.clearcoat.fleet()["head"].as_u64().expect("a position");
        let answer = exchange(fleet.clearcoat.purge, without_host(request)).expect("an answer");
        assert_purged(&answer, 1);
        assert_eq!(answer.json()["position"], position + 1, "{begin}");
    }
}

#[test]
fn a_purge_outlives_the_client_that_hangs_up_at_once() {
    let fleet = Fleet::start(&plan(2, 1));
    for round in 1..=20 {
        fleet.warm("/p/1");
        fleet.shop.set(1, round);
        let mut client = Connection::open(fleet.clearcoat.purge).expect("a connection");
        match round % 3 {
            // A process killed with unread data: the connection is reset.
            0 => {
                client.send(ONE_TAG).expect("sent");
                let linger = socket2::SockRef::from(&client.stream).set_linger(Some(Duration::ZERO));
                linger.expect("a socket option");
            }
            // A process killed in the middle of a body, which is ignored anyway.
            1 => {
                let request = String::from_utf8_lossy(ONE_TAG).replace("Host:", "Content-Length: 10\r\nHost:");
                client.send(request + "012").expect("sent");
            }
            _ => client.send(ONE_TAG).expect("sent"),
        }
        drop(client);
        eventually("every Varnish has the purge of a client that left", || {
            fleet
                .clearcoat
                .nodes()
                .iter()
                .all(|node| node["role"] != "varnish" || node["cursor"] == round)
                .then_some(())
        });
        let pages: Vec<_> = fleet.varnish.iter().map(|varnish| varnish.get("/p/1").text().to_owned()).collect();
        assert_eq!(pages, [round.to_string(), round.to_string()]);
    }
}

#[test]
fn a_client_that_says_it_has_said_all_still_gets_its_answer() {
    let fleet = Fleet::start(&plan(0, 0));
    for _ in 0..20 {
        let mut client = Connection::open(fleet.clearcoat.purge).expect("a connection");
        client.send(ONE_TAG).expect("sent");
        client.stream.shutdown(std::net::Shutdown::Write).expect("a connection");
        assert_purged(&client.answer(false).expect("an answer"), 0);
    }
}

#[test]
fn pools_urls_and_everything_can_be_purged_too() {
    let fleet = Fleet::start(&plan(2, 1));
    let send = |request: &str| exchange(fleet.clearcoat.purge, request).expect("an answer");
    let pages = ["/p/1", "/p/2", "/p/1?page=2"];
    pages.iter().for_each(|page| fleet.warm(page));

    assert_purged(&send("PURGE / HTTP/1.1\r\nHost: a\r\nX-Pool: another_shop\r\n\r\n"), 2);
    assert_purged(&send("PURGE /p/3 HTTP/1.1\r\nHost: shop.test\r\n\r\n"), 2);
    assert_purged(&send("PURGE /p/1 HTTP/1.1\r\nHost: another-shop.test\r\n\r\n"), 2);
    pages.iter().for_each(|page| assert_cached(&fleet, page, "HIT"));

    assert_purged(&send("PURGE /p/1 HTTP/1.1\r\nHost: shop.test\r\n\r\n"), 2);
    assert_cached(&fleet, "/p/1", "MISS");
    assert_cached(&fleet, "/p/2", "HIT");
    assert_cached(&fleet, "/p/1?page=2", "HIT");

    assert_purged(&send("PURGE / HTTP/1.1\r\nHost: a\r\nX-Pool: ^shop$\r\n\r\n"), 2);
    pages.iter().for_each(|page| assert_cached(&fleet, page, "MISS"));

    assert_purged(&exchange(fleet.clearcoat.purge, FLUSH).expect("an answer"), 2);
    pages.iter().for_each(|page| assert_cached(&fleet, page, "MISS"));
}

#[test]
fn a_pattern_with_white_space_keeps_its_meaning() {
    let fleet = Fleet::start(&plan(1, 1));
    // A pattern of two words, of which Varnish would take the first; and one with an optional blank.
    fleet.warm("/p/1");
    assert_purged(&purge(fleet.clearcoat.purge, "cat_p_1 red").expect("an answer"), 1);
    assert_eq!(fleet.cached("/p/1"), ["HIT"]);
    assert_purged(&purge(fleet.clearcoat.purge, "cat_p_1 ?,").expect("an answer"), 1);
    assert_eq!(fleet.cached("/p/1"), ["MISS"]);
    assert!(fleet.clearcoat.metric("clearcoat_bans_sent_total{node=\"varnish-1\"}") >= 2.0);
}

#[test]
fn a_request_that_the_vcl_does_not_know_is_refused_and_fences_nobody() {
    let fleet = Fleet::start(&plan(2, 1));
    fleet.warm("/p/1");
    let answer = exchange(fleet.clearcoat.purge, "BAN /p/1 HTTP/1.1\r\nHost: shop.test\r\nX-Url: ^/p/\r\n\r\n");
    let answer = answer.expect("an answer");
    let error = answer.json()["error"].as_str().expect("a text").to_owned();
    assert_eq!(answer.status, 400, "{error}");
    assert!(error.contains("2 of 2") && error.contains("varnish-1") && error.contains("405"), "{error}");

    for node in fleet.clearcoat.nodes().iter().filter(|node| node["role"] == "varnish") {
        assert_eq!((&node["current"], &node["delivery_error"]), (&true.into(), &"".into()), "{node}");
    }
    assert_eq!(fleet.get("/p/1").cache(), "HIT");
    assert_purged(&fleet.purge_tag("cat_p_1"), 2);
    assert_cached(&fleet, "/p/1", "MISS");
}

#[test]
fn no_purge_passes_the_edge() {
    let fleet = Fleet::start(&plan(1, 1));
    fleet.warm("/p/1");
    for request in
        [ONE_TAG, FLUSH, b"PURGE /p/1 HTTP/1.1\r\nHost: shop.test\r\n\r\n", b"BAN / HTTP/1.1\r\nHost: a\r\n\r\n"]
    {
        assert_eq!(exchange(fleet.clearcoat.edge, request).expect("an answer").status, 405);
    }
    assert_eq!(get(fleet.clearcoat.edge, "/p/1").expect("an answer").cache(), "HIT");
}
