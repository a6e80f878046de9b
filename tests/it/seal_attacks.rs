//! What an attack on the seal has found, against real varnishd.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::seal::{blocks, of_blocks, sealing};
use crate::support::client::{Answer, Connection, exchange};
use crate::support::disk;
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::http2::{Http2, request};
use crate::support::tls::Issued;

/// Nodes whose bans gather for longer than a test takes.
fn lazy(varnish: usize, more: &str) -> Plan {
    let config = format!("[purge]\nlisten = [\"127.0.0.1:0\"]\nack_timeout = \"20s\"\ngather = \"60s\"\n{more}");
    Plan { varnish, web: 1, config: config.leak(), ..Plan::default() }
}

fn said(answer: &Answer) -> (u16, &str, &str) {
    (answer.status, answer.cache(), answer.text())
}

#[test]
fn a_get_with_a_body_gets_no_old_page_either() {
    let length = "GET /p/1 HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 1\r\n\r\n";
    let chunked = "GET /p/1 HTTP/1.1\r\nHost: shop.test\r\nTransfer-Encoding: chunked\r\n\r\n";
    for (head, body) in [(length, "x"), (chunked, "0\r\n\r\n")] {
        let fleet = sealing(&lazy(1, ""));
        let mut client = Connection::open(fleet.clearcoat.edge).expect("a connection");
        for version in 1..=3 {
            fleet.get("/p/1");
            assert_eq!(said(&fleet.get("/p/1")), (200, "HIT", &*(version - 1).to_string()));
            fleet.shop.set(1, version);
            assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
            client.send(format!("{head}{body}")).expect("sent");
            let answer = client.answer(false).expect("an answer");
            assert_eq!((answer.status, answer.text()), (200, &*version.to_string()), "{head}");
        }
    }
}

#[test]
fn a_get_whose_body_comes_late_gets_no_old_page() {
    let fleet = sealing(&lazy(1, ""));
    fleet.get("/p/1");
    assert_eq!(fleet.get("/p/1").cache(), "HIT");
    fleet.shop.set(1, 1);
    assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
    let mut client = Connection::open(fleet.clearcoat.edge).expect("a connection");
    client.send("GET /p/1 HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 200000\r\n\r\n").expect("sent");
    // More than the edge keeps, so that the request cannot be repeated. It may have answered by now.
    _ = client.send("x".repeat(200_000));
    let answer = client.answer(false).expect("an answer");
    assert!(answer.status == 503 || (answer.status, answer.text()) == (200, "1"), "{answer:?}");
}

/// Has what was acknowledged so far written to the disk: cursors become durable with the next purge.
fn make_cursors_durable(fleet: &Fleet) {
    fleet.clearcoat.current();
    eventually("what each Varnish has is saved", || {
        let nodes = fleet.clearcoat.nodes();
        let is_saved = |node: &serde_json::Value| ["cursor", "seals"].iter().all(|key| node["saved"][key] == node[key]);
        nodes.iter().all(|node| node["role"] == "web" || is_saved(node)).then_some(())
    });
    assert_eq!(fleet.purge_tag("any").status, 200);
}

/// The page comes anew, with the block that the cache has, which is then purged.
fn shows_no_old_block(fleet: &Fleet, block: &AtomicU64) {
    assert_eq!(fleet.purge_tag("of_page").status, 200);
    assert_eq!(fleet.get("/page").text(), "<p>block 0</p>");
    block.store(1, Ordering::SeqCst);
    let answer = fleet.purge_tag("of_block");
    assert_eq!(fleet.get("/page").text(), "<p>block 1</p>", "{}", answer.text());
}

#[test]
fn a_block_whose_tags_could_not_be_noted_is_not_stored_later_either() {
    if !disk::is_possible() {
        return;
    }
    let (web, block) = blocks();
    let config =
        format!("[purge]\nlisten = [\"127.0.0.1:0\"]\nack_timeout = \"1s\"\ngather = \"60s\"\n{}", of_blocks(&web));
    let mut fleet = sealing(&Plan { web: 0, varnish: 1, disk: true, config: config.leak(), ..Plan::default() });
    make_cursors_durable(&fleet);
    let frozen = fleet.disk.as_ref().expect("a disk");
    frozen.freeze();
    (0..3).for_each(|_| assert_eq!(fleet.get("/page").text(), "<p>block 0</p>"));
    fleet.clearcoat.kill();
    frozen.thaw();
    fleet.clearcoat.restart();
    fleet.clearcoat.ready();
    fleet.seals();
    shows_no_old_block(&fleet, &block);
}

#[test]
fn what_came_while_purges_waited_for_every_varnish_is_not_sealed() {
    let (web, block) = blocks();
    let [edge, varnish] = ["edge", "varnish"].map(|whom| format!("wait_for = \"{whom}\""));
    let config = lazy(1, &of_blocks(&web)).config.replacen("gather", &format!("{edge}\ngather"), 1);
    let mut fleet = sealing(&Plan { web: 0, config: config.leak(), ..lazy(1, "") });
    make_cursors_durable(&fleet);
    // No purge, and killed twice: nothing is written in between but what a start writes.
    for (before, now) in [(&edge, &varnish), (&varnish, &edge)] {
        fleet.clearcoat.kill();
        fleet.clearcoat.configure(&fleet.clearcoat.config().replacen(before, now, 1));
        fleet.clearcoat.restart();
        fleet.clearcoat.ready();
        assert_eq!(fleet.get("/page").text(), "<p>block 0</p>");
    }
    eventually("it has been tried", || (fleet.clearcoat.node("varnish-1")["trial"] == "passed").then_some(()));
    shows_no_old_block(&fleet, &block);
}

#[test]
fn a_trial_that_fails_for_a_moment_drops_no_cache() {
    /// Pages under trial are not fetched while there is such a file, but for those without a seal.
    fn fails(vcl: &str, _: &str, folder: &Path) -> String {
        let file = folder.join("busy");
        let rule = format!(
            "sub vcl_backend_response {{\n    if (bereq.url ~ \"^/.clearcoat/\" && beresp.http.X-Clearcoat-Seal && \
             std.file_exists(\"{}\")) {{ return (abandon); }}\n",
            file.display()
        );
        vcl.replacen("sub vcl_backend_response {\n", &rule, 1)
    }
    let fleet = sealing(&Plan { vcl: fails, ..lazy(1, "") });
    let health = |wanted: &str| {
        eventually(wanted, || (fleet.clearcoat.node("varnish-1")["health"] == wanted).then_some(()));
    };
    fleet.get("/p/1");
    assert_eq!(fleet.get("/p/1").cache(), "HIT");
    let asked = || fleet.varnish[0].counter("MAIN.backend_req");
    let before = asked();
    std::fs::write(fleet.folder.path().join("busy"), "").expect("a file");
    // A node that comes up is tried.
    fleet.varnish[0].hang();
    health("down");
    fleet.varnish[0].resume();
    health("up");
    // Twice with a seal; then without one, before a purge and after it.
    eventually("it is tried without a seal at last", || (asked() >= before + 4).then_some(()));
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(fleet.get("/p/1").cache(), "HIT");
    assert_eq!(fleet.clearcoat.node("varnish-1")["seals"], true);
}

#[test]
fn a_page_with_a_foreign_seal_empties_a_cache_once() {
    fn foreign(vcl: &str, _: &str, _: &Path) -> String {
        let rule = "sub vcl_deliver {\n    if (req.url == \"/p/1\") {\n        \
            set resp.http.X-Clearcoat-Seal = \"1 0000000000000001.00000001 5 0000000000000001 .\";\n    }\n";
        vcl.replacen("sub vcl_deliver {\n", rule, 1)
    }
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, vcl: foreign, ..Plan::default() });
    for _ in 0..5 {
        assert_eq!(fleet.get("/p/1").text(), "0");
        fleet.get("/p/2");
    }
    assert_eq!(fleet.get("/p/1").text(), "0");
    assert_eq!(fleet.get("/p/2").cache(), "HIT");
}

#[test]
fn a_path_is_as_long_as_a_varnish_takes_it() {
    let fleet = sealing(&lazy(1, ""));
    for length in [8_000, 8_001, 8_150] {
        assert_eq!(fleet.get(&format!("/{}", "x".repeat(length - 1))).status, 404, "{length}");
    }
}

#[test]
fn nothing_old_is_served_or_refused_while_a_third_varnish_is_fresh() {
    fn liars(vcl: &str, id: &str, _: &Path) -> String {
        let rule = "sub vcl_recv {\n    if (req.http.X-Magento-Tags-Pattern) {\n        return (synth(200, \"Purged\"));\n    }\n";
        if id == "varnish-3" { vcl.to_owned() } else { vcl.replacen("sub vcl_recv {\n", rule, 1) }
    }
    for policy in ["serve", "refuse"] {
        let config = format!(
            "[edge]\nlisten = [\"127.0.0.1:0\"]\nwhen_all_behind = \"{policy}\"\n[health.varnish]\ntrial = false\n"
        );
        let fleet = Fleet::start(&Plan { varnish: 3, web: 1, vcl: liars, config: config.leak(), ..Plan::default() });
        for page in 1..=12 {
            let path = format!("/p/{page}");
            fleet.warm(&path);
            fleet.shop.set(page, 1);
            assert_eq!(fleet.purge_tag(&format!("cat_p_{page}")).status, 200);
            let answer = fleet.get(&path);
            assert_eq!((answer.status, answer.text()), (200, "1"), "{policy} {path}");
        }
        assert_eq!(fleet.clearcoat.metric("clearcoat_stale_served_total"), 0.0);
    }
}

#[test]
fn a_purge_of_another_host_or_query_costs_a_page_one_fetch() {
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, ..Plan::default() });
    for (target, host) in [("/p/1", "other.test"), ("/p/1?color=red", "shop.test")] {
        fleet.get("/p/1");
        assert_eq!(fleet.get("/p/1").cache(), "HIT");
        let answer = exchange(fleet.clearcoat.purge, format!("PURGE {target} HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        assert_eq!(answer.expect("an answer").status, 200);
        assert_eq!(fleet.get("/p/1").cache(), "MISS", "{host}{target}");
        assert_eq!(fleet.get("/p/1").cache(), "HIT", "{host}{target}");
    }
}

#[test]
fn a_page_with_many_tags_comes_through_where_it_does_without_a_seal() {
    let fleet = sealing(&lazy(1, ""));
    for limit in ["http_resp_hdr_len", "http_resp_size"] {
        fleet.varnish[0].adm(&["param.set", limit, "32k"]);
    }
    for (page, count) in [(1, 500), (2, 900), (3, 1_100)] {
        let tags: Vec<String> = (0..count).map(|number| format!("catalog_product_{number:012}")).collect();
        fleet.shop.set_tags(page, &tags.join(","));
        let path = format!("/p/{page}");
        assert_eq!(said(&fleet.get(&path)), (200, "MISS", "0"), "{count} tags");
        fleet.shop.set(page, 1);
        assert_eq!(fleet.purge_tag(&tags[0]).status, 200);
        assert_eq!(fleet.get(&path).text(), "1", "{count} tags");
    }
}

#[test]
fn a_warm_fleet_seals_from_its_first_flush_on() {
    let (web, block) = blocks();
    let fleet = Fleet::start(&Plan { web: 0, ..lazy(1, &of_blocks(&web)) });
    eventually("it has been tried", || (fleet.clearcoat.node("varnish-1")["trial"] == "passed").then_some(()));
    assert_eq!(fleet.clearcoat.node("varnish-1")["seals"], false);
    assert_eq!(fleet.get("/page").text(), "<p>block 0</p>");
    let flush = "PURGE / HTTP/1.1\r\nHost: a\r\nX-Magento-Tags-Pattern: .*\r\n\r\n";
    assert_eq!(exchange(fleet.clearcoat.purge, flush).expect("an answer").status, 200);
    fleet.seals();
    shows_no_old_block(&fleet, &block);
}

#[test]
fn what_a_post_was_answered_is_not_stored_and_its_tags_stay_sealed() {
    /// Stores what a POST was answered.
    fn stores(vcl: &str, _: &str, _: &Path) -> String {
        let recv = "sub vcl_recv {\n    if (req.method == \"POST\") {\n        set req.http.X-Post = \"1\";\n        \
            return (hash);\n    }\n";
        let fetch =
            "sub vcl_backend_fetch {\n    if (bereq.http.X-Post) {\n        set bereq.method = \"POST\";\n    }\n}\n";
        vcl.replacen("sub vcl_recv {\n", &format!("{fetch}{recv}"), 1)
    }
    let post = "POST /p/1 HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 0\r\n\r\n";
    let unsealed = "[edge]\nlisten = [\"127.0.0.1:0\"]\nseal = false\n";
    let fleet = Fleet::start(&Plan { vcl: stores, ..lazy(1, unsealed) });
    exchange(fleet.clearcoat.edge, post).expect("an answer");
    assert_eq!(
        said(&exchange(fleet.clearcoat.edge, post).expect("an answer")),
        (200, "HIT", "0"),
        "without seals it is"
    );
    let fleet = sealing(&Plan { vcl: stores, ..lazy(1, "") });
    for version in 0..3 {
        fleet.shop.set(1, version);
        let answer = fleet.purge_tag("cat_p_1").json();
        assert_eq!(answer["pending"], serde_json::json!(["varnish-1"]), "{answer}");
        for _ in 0..2 {
            let answer = exchange(fleet.clearcoat.edge, post).expect("an answer");
            assert_eq!((answer.status, answer.text()), (200, &*version.to_string()), "{answer:?}");
        }
    }
}

#[test]
fn over_http2_nobody_gets_an_old_page_either() {
    let folder = tempfile::tempdir().expect("a folder");
    let table = Issued::for_names(&["shop.test"]).write(folder.path(), "shop").toml("127.0.0.1:0");
    let fleet = sealing(&lazy(1, &format!("[edge]\nlisten = [\"127.0.0.1:0\"]\n{table}")));
    let client = Http2::open(fleet.clearcoat.edge_tls[0]);
    let head = |method: &str| request(method, "/p/1").body(()).expect("a request");
    for version in 1..=3 {
        client.get("/p/1").expect("an answer");
        let before = client.get("/p/1").expect("an answer");
        assert_eq!(before.header("x-magento-cache-debug"), Some("HIT"));
        fleet.shop.set(1, version);
        assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
        let answer = match version {
            1 => client.get("/p/1"),
            2 => client.ask(head("HEAD"), true).answer(),
            _ => client.exchange(head("GET"), b"body"),
        };
        let answer = answer.expect("an answer");
        // The body is gone by then. The next one gets the new page.
        assert_eq!(answer.status, if version == 3 { 503 } else { 200 }, "{answer:?}");
        let next = client.get("/p/1").expect("an answer");
        let cached = if version == 3 { "MISS" } else { "HIT" };
        assert_eq!((next.header("x-magento-cache-debug"), next.text()), (Some(cached), &*version.to_string()));
    }
}
