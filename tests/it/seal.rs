//! The seal, against real varnishd: what a cache keeps in spite of its purge reaches no reader.
//!
//! The guard is off here, and Varnish is not believed: each test makes a Varnish that serves an old page, and shows that the
//! edge does not.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::support::client::{Answer, Connection, exchange, get, purge, tag};
use crate::support::eventually;
use crate::support::faults::{fail_purges, purges_can_fail};
use crate::support::fleet::{Fleet, Plan};
use crate::support::upstream::{Then, Upstream};

/// Purges of tags are answered as if they had been carried out.
pub(crate) fn says_purged(vcl: &str, _id: &str, _folder: &Path) -> String {
    let rule =
        "sub vcl_recv {\n    if (req.http.X-Magento-Tags-Pattern) {\n        return (synth(200, \"Purged\"));\n    }\n";
    vcl.replacen("sub vcl_recv {\n", rule, 1)
}

pub(crate) const WITHOUT_TRIAL: &str = "[health.varnish]\ntrial = false\n";

/// A fleet whose pages nobody guards.
fn unguarded() -> Plan {
    Plan { varnish: 1, web: 1, ack_timeout: "20s", guard: false, config: WITHOUT_TRIAL, ..Plan::default() }
}

/// Makes page 1 old in the cache: it is rendered before its purge, and stored after its ban.
fn store_an_old_page(fleet: &Fleet) {
    std::thread::scope(|scope| {
        let gate = fleet.shop.hold(1);
        let first = scope.spawn(|| fleet.get("/p/1"));
        gate.holds(1);
        fleet.shop.set(1, 1);
        assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
        drop(gate);
        assert_eq!(first.join().expect("a reader").text(), "0");
    });
    assert_eq!(fleet.cached("/p/1"), ["HIT"]);
}

fn caught(fleet: &Fleet) -> f64 {
    fleet.clearcoat.metric("clearcoat_stale_caught_total{node=\"varnish-1\"}")
}

fn said(answer: &Answer) -> (&str, &str) {
    (answer.cache(), answer.text())
}

#[test]
fn a_page_that_is_stored_after_its_ban_is_dropped_before_a_reader_sees_it() {
    let fleet = Fleet::start(&unguarded());
    store_an_old_page(&fleet);
    assert_eq!(fleet.varnish[0].get("/p/1").text(), "0", "past the edge it is there");
    assert_eq!(said(&fleet.get("/p/1")), ("MISS", "1"));
    // One ban was enough, and the page is cached again.
    assert_eq!(said(&fleet.get("/p/1")), ("HIT", "1"));
    assert_eq!(caught(&fleet), 1.0);
    assert_eq!(fleet.clearcoat.metric("clearcoat_seal_checks_total{verdict=\"stale\"}"), 1.0);
    assert_eq!(fleet.clearcoat.metric("clearcoat_stale_served_total"), 0.0);
}

#[test]
fn without_seals_the_old_page_is_served() {
    let config = "[health.varnish]\ntrial = false\n[edge]\nlisten = [\"127.0.0.1:0\"]\nseal = false\n";
    let fleet = Fleet::start(&Plan { config, ..unguarded() });
    store_an_old_page(&fleet);
    assert_eq!(said(&fleet.get("/p/1")), ("HIT", "0"));
}

#[test]
fn a_head_a_range_and_a_conditional_request_get_nothing_of_an_old_page() {
    for (request, status, body) in [
        ("HEAD /p/1 HTTP/1.1\r\nHost: shop.test\r\n\r\n", 200, ""),
        ("GET /p/1 HTTP/1.1\r\nHost: shop.test\r\nRange: bytes=0-0\r\n\r\n", 206, "1"),
        ("GET /p/1 HTTP/1.1\r\nHost: shop.test\r\nIf-None-Match: \"0\"\r\n\r\n", 200, "1"),
    ] {
        let fleet = Fleet::start(&unguarded());
        store_an_old_page(&fleet);
        let mut client = Connection::open(fleet.clearcoat.edge).expect("a connection");
        client.send(request).expect("sent");
        let answer = client.answer(request.starts_with("HEAD")).expect("an answer");
        assert_eq!((answer.status, answer.text()), (status, body), "{request}: {answer:?}");
        assert_eq!(answer.cache(), "MISS", "{request}");
        assert_eq!(caught(&fleet), 1.0, "{request}");
    }
}

#[test]
fn a_varnish_that_only_says_purged_is_asked_past() {
    for (varnish, web) in [(1, 1), (2, 1)] {
        let fleet = Fleet::start(&Plan { varnish, web, vcl: says_purged, ..unguarded() });
        fleet.warm("/p/1");
        fleet.shop.set(1, 1);
        assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
        assert!(fleet.varnish.iter().all(|varnish| varnish.get("/p/1").text() == "0"), "each keeps it");
        for _ in 0..3 {
            assert_eq!(fleet.get("/p/1").text(), "1");
        }
        let edge = |node: &str| format!("clearcoat_edge_requests_total{{code_class=\"2xx\",node=\"{node}\"}}");
        eventually("the web node is seen to have answered", || {
            (fleet.clearcoat.metric(&edge("web-1")) == 3.0).then_some(())
        });
        assert_eq!(fleet.clearcoat.metric("clearcoat_stale_served_total"), 0.0);
    }
}

#[test]
fn an_old_page_is_served_and_counted_or_refused_as_configured() {
    for (policy, status) in [("serve", 200), ("refuse", 503)] {
        let edge = format!("[edge]\nlisten = [\"127.0.0.1:0\"]\nwhen_all_behind = \"{policy}\"\n{WITHOUT_TRIAL}");
        let fleet = Fleet::start(&Plan { config: edge.leak(), vcl: says_purged, ..unguarded() });
        fleet.warm("/p/1");
        assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
        assert_eq!(fleet.get("/p/1").status, status, "{policy}");
        let served = fleet.clearcoat.metric("clearcoat_stale_served_total");
        assert_eq!(served, f64::from(u8::from(status == 200)), "{policy}");
    }
}

#[test]
fn after_a_restart_a_page_that_was_purged_before_is_caught_all_the_same() {
    let mut fleet = Fleet::start(&Plan { vcl: says_purged, ..unguarded() });
    ["/p/1", "/p/2"].iter().for_each(|page| fleet.warm(page));
    [1, 2].iter().for_each(|page| fleet.shop.set(*page, 1));
    assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
    fleet.clearcoat.kill();
    fleet.clearcoat.restart();
    fleet.clearcoat.ready();
    assert_eq!(fleet.get("/p/1").text(), "1");
    // What was not purged is what the cache has.
    assert_eq!(said(&fleet.get("/p/2")), ("HIT", "0"));
    assert_eq!(fleet.purge_tag("cat_p_2").status, 200);
    assert_eq!(fleet.get("/p/2").text(), "1");
}

/// The tags that are purged beside those of pages: so many that each bucket of the smallest index forgets what was in it.
fn purge_others(fleet: &Fleet) {
    for round in 0..80 {
        // Half of what is remembered: the disk then forgets what came before the last two.
        let tags = (0..500).map(|number| tag(&format!("cat_c_{round}_{number}")));
        let answer = purge(fleet.clearcoat.purge, &tags.collect::<Vec<_>>().join("|"));
        assert_eq!(answer.expect("an answer").status, 200);
    }
}

/// Page 1 is old in a cache that only says that it purges; that it was purged is forgotten.
fn forget_a_purge() -> Fleet {
    let mut fleet = Fleet::start(&Plan { vcl: says_purged, ..unguarded() });
    fleet.clearcoat.kill();
    fleet.clearcoat.configure(&fleet.clearcoat.config().replacen("[journal]", "[journal]\nnames = 1000", 1));
    fleet.clearcoat.restart();
    fleet.clearcoat.ready();
    fleet.warm("/p/1");
    fleet.shop.set(1, 1);
    assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
    purge_others(&fleet);
    fleet
}

#[test]
fn a_page_whose_purge_was_pushed_out_of_memory_is_caught_all_the_same() {
    let fleet = forget_a_purge();
    assert_eq!(fleet.get("/p/1").text(), "1");
}

#[test]
fn a_page_whose_purge_the_disk_has_forgotten_is_caught_after_a_restart() {
    let mut fleet = forget_a_purge();
    fleet.clearcoat.kill();
    fleet.clearcoat.restart();
    fleet.clearcoat.ready();
    assert_eq!(fleet.get("/p/1").text(), "1");
}

#[test]
fn purges_of_a_url_and_of_everything_are_seen_in_a_seal_too() {
    fn keeps_everything(vcl: &str, _: &str, _: &Path) -> String {
        let rule = "sub vcl_recv {\n    if (req.method == \"PURGE\" && req.url != \"/.clearcoat/probe\") {\n        \
            return (synth(200, \"Purged\"));\n    }\n";
        vcl.replacen("sub vcl_recv {\n", rule, 1)
    }
    let fleet = Fleet::start(&Plan { vcl: keeps_everything, ..unguarded() });
    for (page, purge) in [
        (1, "PURGE /p/1?of=it HTTP/1.1\r\nHost: shop.test\r\n\r\n"),
        (2, "PURGE / HTTP/1.1\r\nHost: a\r\nX-Magento-Tags-Pattern: .*\r\n\r\n"),
        (3, "PURGE / HTTP/1.1\r\nHost: a\r\nX-Clearcoat-Flush: all\r\n\r\n"),
    ] {
        let path = format!("/p/{page}");
        fleet.warm(&path);
        fleet.shop.set(page, 1);
        assert_eq!(fleet.get(&path).text(), "0");
        let answer = exchange(fleet.clearcoat.purge, purge).expect("an answer");
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(fleet.get(&path).text(), "1", "{purge}");
    }
}

#[test]
fn forged_fields_count_for_nothing_and_no_client_sees_ours() {
    let forged = "X-Clearcoat-Seal: 1 0000000000000000.00000000 99 0000000000000000 .\r\n";
    let web = Upstream::start(move |call| {
        let asked = call.seen.asked.is_some() || call.seen.head.to_lowercase().contains("x-clearcoat-");
        let page = if asked { "told" } else { "page" };
        let head = format!("HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\n{forged}Content-Length: 4\r\n\r\n");
        call.send_then(head + page, Then::KeepAlive)
    });
    let node = format!("{WITHOUT_TRIAL}[[node]]\nrole = \"web\"\nid = \"forger\"\naddress = \"{}\"\n", web.address);
    let fleet = Fleet::start(&Plan { web: 0, config: node.leak(), ..unguarded() });
    for _ in 0..2 {
        let request =
            "GET /p/1 HTTP/1.1\r\nHost: shop.test\r\nX-Clearcoat-Asked: forged\r\nX-Clearcoat-Seal: a\r\n\r\n";
        let answer = exchange(fleet.clearcoat.edge, request).expect("an answer");
        assert_eq!((answer.text(), answer.header("x-clearcoat-seal")), ("page", None), "{answer:?}");
    }
    let stored = get(fleet.varnish[0].address, "/p/1").expect("an answer");
    let seal = stored.header("x-clearcoat-seal").expect("a seal");
    assert!(!seal.starts_with("1 0000000000000000."), "{seal}");
    assert_eq!(fleet.clearcoat.metric("clearcoat_seal_checks_total{verdict=\"fresh\"}"), 2.0);
}

/// A fleet whose nodes return seals, and began empty.
pub(crate) fn sealing(plan: &Plan) -> Fleet {
    let fleet = Fleet::start(&Plan { first_start: "flush", ..*plan });
    fleet.seals();
    fleet
}

fn lazy(gather: &'static str) -> Plan {
    let config = format!("[purge]\nlisten = [\"127.0.0.1:0\"]\nack_timeout = \"20s\"\ngather = \"{gather}\"\n");
    Plan { varnish: 2, web: 1, config: config.leak(), ..Plan::default() }
}

/// A web node with pages that include `/block`, and the version of that. Blocks have the tag `of_block`, pages `of_page`.
pub(crate) fn blocks() -> (Upstream, Arc<AtomicU64>) {
    let block = Arc::new(AtomicU64::new(0));
    let shown = Arc::clone(&block);
    let web = Upstream::start(move |call| {
        if call.path().starts_with("/customer/") {
            return call.send_then("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", Then::KeepAlive);
        }
        let (tags, body) = if call.seen.head.starts_with("GET /block ") {
            ("of_block", format!("block {}", shown.load(Ordering::SeqCst)))
        } else {
            ("of_page", "<p><esi:include src=\"/block\"/></p>".to_owned())
        };
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nCache-Control: public, max-age=86400\r\nX-Magento-Tags: {tags}\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        call.send_then(head + &body, Then::KeepAlive)
    });
    (web, block)
}

pub(crate) fn of_blocks(web: &Upstream) -> String {
    format!("[[node]]\nrole = \"web\"\nid = \"blocks\"\naddress = \"{}\"\n", web.address)
}

/// The bans that were sent to both nodes.
fn bans(fleet: &Fleet) -> f64 {
    let of = |id: &str| fleet.clearcoat.metric(&format!("clearcoat_bans_sent_total{{node=\"{id}\"}}"));
    of("varnish-1") + of("varnish-2")
}

fn ids(answer: &Answer, key: &str) -> Vec<String> {
    serde_json::from_value(answer.json()[key].clone()).expect("names of nodes")
}

#[test]
fn a_sealed_purge_is_answered_before_any_varnish_has_it() {
    let fleet = sealing(&lazy("60s"));
    let before = bans(&fleet);
    for round in 1..=5 {
        assert_eq!(fleet.get("/p/1").text(), (round - 1).to_string());
        fleet.shop.set(1, round);
        let answer = fleet.purge_tag("cat_p_1");
        assert_eq!((answer.status, ids(&answer, "fenced")), (200, vec![]), "{answer:?}");
        assert!(!ids(&answer, "pending").is_empty(), "{answer:?}");
        assert_eq!(fleet.get("/p/1").text(), round.to_string());
        assert_eq!(said(&fleet.get("/p/1")), ("HIT", &*round.to_string()));
    }
    let bans = bans(&fleet) - before;
    assert!((1.0..=5.0).contains(&bans), "one for each reader who met an old page: {bans}");
}

#[test]
fn a_storm_of_purges_one_after_the_other_becomes_a_few_bans() {
    let fleet = sealing(&lazy("1s"));
    let before = bans(&fleet);
    let mut sender = Connection::open(fleet.clearcoat.purge).expect("a connection");
    for page in 0..500 {
        let pattern = tag(&format!("cat_p_{page}"));
        sender.send(format!("PURGE / HTTP/1.1\r\nHost: a\r\nX-Magento-Tags-Pattern: {pattern}\r\n\r\n")).expect("sent");
        assert_eq!(sender.answer(false).expect("an answer").status, 200);
    }
    fleet.clearcoat.current();
    let bans = bans(&fleet) - before;
    assert!((2.0..=40.0).contains(&bans), "{bans} for two nodes");
}

#[test]
fn a_hung_varnish_costs_a_sealed_purge_nothing_and_its_answers_are_judged() {
    let fleet = sealing(&lazy("10ms"));
    fleet.get("/p/1");
    fleet.varnish[0].hang();
    fleet.shop.set(1, 1);
    let answer = fleet.purge_tag("cat_p_1");
    assert_eq!((answer.status, ids(&answer, "fenced")), (200, vec![]), "{answer:?}");
    fleet.varnish[0].resume();
    for _ in 0..20 {
        assert_eq!(fleet.get("/p/1").text(), "1");
    }
    fleet.clearcoat.current();
}

#[test]
fn a_purge_that_no_seal_shows_waits_and_takes_those_before_it_along() {
    let fleet = sealing(&lazy("60s"));
    let sealed = fleet.purge_tag("cat_p_1");
    assert_eq!(ids(&sealed, "pending").len(), 2);
    let answer = purge_all_products(&fleet);
    assert_eq!((ids(&answer, "applied").len(), ids(&answer, "pending").len()), (2, 0), "{answer:?}");
    fleet.clearcoat.current();
}

/// A purge that no seal shows.
fn purge_all_products(fleet: &Fleet) -> Answer {
    let pattern = "PURGE / HTTP/1.1\r\nHost: a\r\nX-Magento-Tags-Pattern: cat_p_[0-9]+,\r\n\r\n";
    exchange(fleet.clearcoat.purge, pattern).expect("an answer")
}

#[test]
fn a_page_that_a_pattern_purges_is_not_served_after_the_answer() {
    let fleet = sealing(&lazy("60s"));
    fleet.get("/p/1");
    assert_eq!(fleet.get("/p/1").cache(), "HIT");
    fleet.shop.set(1, 1);
    assert_eq!(purge_all_products(&fleet).status, 200);
    assert_eq!(fleet.get("/p/1").text(), "1");
}

#[test]
fn a_varnish_that_misses_a_purge_that_no_seal_shows_is_out() {
    let fleet = sealing(&Plan { varnish: 1, web: 1, vcl: purges_can_fail, ..Plan::default() });
    fleet.get("/p/1");
    assert_eq!(fleet.get("/p/1").cache(), "HIT");
    fleet.shop.set(1, 1);
    fail_purges(&fleet, "varnish-1", true);
    assert_eq!(purge_all_products(&fleet).status, 200);
    assert_eq!(fleet.get("/p/1").text(), "1");
    fail_purges(&fleet, "varnish-1", false);
    fleet.clearcoat.current();
}

#[test]
fn a_block_of_a_page_is_not_served_after_its_purge_was_answered() {
    // A page with a block: the seal that comes with the answer is that of the page alone.
    let (web, block) = blocks();
    let plan = lazy("60s");
    let config: &'static str = format!("{}{}", plan.config, of_blocks(&web)).leak();
    let mut fleet = sealing(&Plan { web: 0, config, ..plan });
    for round in 0..4 {
        assert_eq!(fleet.get("/page").text(), format!("<p>block {round}</p>"));
        block.store(round + 1, Ordering::SeqCst);
        let answer = fleet.purge_tag("of_block");
        assert_eq!((ids(&answer, "applied").len(), ids(&answer, "pending").len()), (2, 0), "{answer:?}");
        if round == 1 {
            fleet.clearcoat.kill();
            fleet.clearcoat.restart();
            fleet.clearcoat.ready();
            fleet.seals();
        }
    }
    assert_eq!(ids(&fleet.purge_tag("of_page"), "pending").len(), 2, "the page itself is shown by its seal");
}

#[test]
fn a_varnish_that_drops_seals_is_waited_for() {
    fn drops(vcl: &str, _: &str, _: &Path) -> String {
        vcl.replacen("sub vcl_deliver {\n", "sub vcl_deliver {\n    unset resp.http.X-Clearcoat-Seal;\n", 1)
    }
    let fleet = Fleet::start(&Plan { first_start: "flush", vcl: drops, ..lazy("60s") });
    eventually("each has been tried", || {
        fleet.clearcoat.nodes().iter().all(|node| node["role"] == "web" || node["trial"] == "passed").then_some(())
    });
    fleet.warm("/p/1");
    fleet.shop.set(1, 1);
    let answer = fleet.purge_tag("cat_p_1");
    assert_eq!((ids(&answer, "applied").len(), ids(&answer, "pending").len()), (2, 0), "{answer:?}");
    assert_eq!(fleet.get("/p/1").text(), "1");
}

/// Answers are stored without their seals while there is a file `drops`.
pub(crate) fn drops_seals(vcl: &str, _: &str, folder: &Path) -> String {
    let rule = format!(
        "sub vcl_backend_response {{\n    if (std.file_exists(\"{}\")) {{ unset beresp.http.X-Clearcoat-Seal; }}\n",
        folder.join("drops").display()
    );
    vcl.replacen("sub vcl_backend_response {\n", &rule, 1)
}

/// Has the first Varnish tried anew, as one that comes up is.
fn try_again(fleet: &Fleet) {
    let health = |wanted: &str| {
        eventually(wanted, || (fleet.clearcoat.node("varnish-1")["health"] == wanted).then_some(()));
    };
    fleet.varnish[0].hang();
    health("down");
    fleet.varnish[0].resume();
    health("up");
}

#[test]
fn what_a_varnish_stored_while_it_dropped_seals_goes_or_counts() {
    for restarts in [false, true] {
        let mut fleet = sealing(&Plan { varnish: 1, vcl: drops_seals, ..lazy("60s") });
        let file = fleet.folder.path().join("drops");
        std::fs::write(&file, "").expect("a file");
        let node = |key: &str| fleet.clearcoat.node("varnish-1")[key].clone();
        try_again(&fleet);
        eventually("it is seen to drop seals", || (node("seals") == false).then_some(()));
        // A flush does not help: what comes after it has no seal either.
        let flush = "PURGE / HTTP/1.1\r\nHost: a\r\nX-Clearcoat-Flush: all\r\n\r\n";
        assert_eq!(exchange(fleet.clearcoat.purge, flush).expect("an answer").status, 200);
        eventually("a page without a seal is stored", || (fleet.get("/p/1").cache() == "HIT").then_some(()));
        eventually("what it has is saved", || (node("saved")["cursor"] == node("cursor")).then_some(()));
        assert_eq!(ids(&fleet.purge_tag("any"), "applied").len(), 1, "purges wait for it");
        std::fs::remove_file(&file).expect("our file");
        if restarts {
            fleet.clearcoat.kill();
            fleet.clearcoat.restart();
            fleet.clearcoat.ready();
            let node = || fleet.clearcoat.node("varnish-1");
            eventually("it has been tried", || (node()["trial"] == "passed").then_some(()));
            assert_eq!((fleet.get("/p/1").cache(), &node()["seals"]), ("HIT", &false.into()));
        } else {
            try_again(&fleet);
            fleet.seals();
            assert_eq!(fleet.get("/p/1").cache(), "MISS");
            assert_eq!(fleet.get("/p/1").cache(), "HIT");
        }
    }
}

#[test]
fn a_hot_page_that_is_purged_is_rendered_a_few_times() {
    const READERS: usize = 40;
    let fleet = sealing(&Plan { varnish: 1, ..lazy("60s") });
    fleet.get("/p/1");
    assert_eq!(fleet.get("/p/1").cache(), "HIT");
    let before = fleet.shop.renders.load(Ordering::SeqCst);
    for version in 1..=5 {
        fleet.shop.set(1, version);
        std::thread::scope(|scope| {
            let reader = || {
                let mut client = Connection::open(fleet.clearcoat.edge).expect("a connection");
                let mut read = || {
                    client.send("GET /p/1 HTTP/1.1\r\nHost: shop.test\r\n\r\n").expect("sent");
                    client.answer(false).expect("an answer").text().to_owned()
                };
                // As long as the page is what it was.
                while read() != version.to_string() {}
            };
            (0..READERS).for_each(|_| _ = scope.spawn(reader));
            assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
        });
    }
    let renders = fleet.shop.renders.load(Ordering::SeqCst) - before;
    assert!((5..=25).contains(&renders), "{renders} renders for 5 purges and {READERS} readers");
}
