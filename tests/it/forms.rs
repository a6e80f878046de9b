//! The three forms of purges, against real varnishd: purged pages are gone, all others stay.

use std::collections::BTreeSet;
use std::path::Path;

use clearcoat::fleet::PurgeDialect;

use crate::support::client::{Connection, tag};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};

const PAGES: u64 = 40;
const ROUNDS: usize = 6;

/// Tags as in shops, many of which are similar.
fn plain_tag(random: &mut fastrand::Rng) -> String {
    let kind = random.choice(["cat_p", "cat_c", "cat_c_p", "cms_b", "store"]).expect("a kind");
    match random.u8(..8) {
        0 => kind.to_owned(),
        1 => format!("{kind}_{}", random.u32(..60_000)),
        2 => format!("{kind}-{}", random.u32(..9)),
        _ => format!("{kind}_{}", random.u32(..60)),
    }
}

/// And a few unusual ones, which are valid all the same.
fn any_tag(random: &mut fastrand::Rng) -> String {
    match random.u8(..12) {
        0 => format!("cms b {}", random.u32(..4)),
        1 => format!("größe:{}", random.u32(..4)),
        2 => format!("b#'{}=/", random.u32(..4)),
        // Each is a prefix of the next.
        3 => "a".repeat(random.usize(1..60)),
        _ => plain_tag(random),
    }
}

fn some_tags(random: &mut fastrand::Rng, most: usize, a_tag: fn(&mut fastrand::Rng) -> String) -> BTreeSet<String> {
    (0..random.usize(..=most)).map(|_| a_tag(random)).collect()
}

fn joined(tags: &BTreeSet<String>, between: &str) -> String {
    tags.iter().cloned().collect::<Vec<_>>().join(between)
}

/// Fills a fleet with pages of random tags, purges random sets of tags, and checks every page on every Varnish.
fn purge_at_random(plan: &Plan, a_tag: fn(&mut fastrand::Rng) -> String) -> Fleet {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let fleet = Fleet::start(plan);
    let pages: Vec<BTreeSet<String>> = (0..PAGES).map(|_| some_tags(&mut random, 12, a_tag)).collect();
    let path = |page: usize| format!("/p/{page}");
    for (page, tags) in pages.iter().enumerate() {
        fleet.shop.set_tags(page as u64, &joined(tags, ","));
        fleet.warm(&path(page));
    }
    for round in 0..ROUNDS {
        // All pages are cached. A page is served a moment before vmod_xkey has it in its index; by the time that the
        // others have been read once more, it has.
        for page in 0..pages.len() {
            fleet.warm(&path(page));
        }
        // Sent without waiting for answers, so that some of them are batched.
        let purges: Vec<BTreeSet<String>> =
            (0..3).map(|_| some_tags(&mut random, 80, a_tag)).filter(|tags| !tags.is_empty()).collect();
        let mut connection = Connection::open(fleet.clearcoat.purge).expect("a connection");
        for tags in &purges {
            let pattern = tags.iter().map(|name| tag(name)).collect::<Vec<_>>().join("|");
            let request = format!("PURGE / HTTP/1.1\r\nHost: a\r\nX-Magento-Tags-Pattern: {pattern}\r\n\r\n");
            connection.send(request).expect("sent");
        }
        for tags in &purges {
            let answer = connection.answer(false).expect("an answer");
            assert_eq!(
                (answer.status, &answer.json()["fenced"]),
                (200, &serde_json::json!([])),
                "{tags:?}: {answer:?}"
            );
        }
        for (page, tags) in pages.iter().enumerate() {
            let expected = if purges.iter().any(|purged| !purged.is_disjoint(tags)) { "MISS" } else { "HIT" };
            let cached = fleet.cached(&path(page));
            assert!(
                cached.iter().all(|cache| cache == expected),
                "seed {seed}, round {round}: {cached:?} and not {expected} for {tags:?} after {purges:?}"
            );
        }
    }
    fleet
}

/// Each cache is looked at as soon as a purge is answered.
const WAITS: &str = "[purge]\nlisten = [\"127.0.0.1:0\"]\nack_timeout = \"20s\"\nwait_for = \"varnish\"\n";

fn plan(delivery: PurgeDialect) -> Plan {
    // A small limit, so that the sets are split.
    Plan { varnish: 2, web: 1, config: WAITS, delivery, header_limit: 512, ..Plan::default() }
}

#[test]
fn a_trie_drops_the_pages_with_a_purged_tag_and_no_others() {
    let fleet = purge_at_random(&plan(PurgeDialect::Magento), any_tag);
    assert!(fleet.clearcoat.metric("clearcoat_bans_sent_total{node=\"varnish-1\"}") > ROUNDS as f64);
}

#[test]
fn keys_drop_the_pages_with_a_purged_tag_and_no_others() {
    let fleet = purge_at_random(&plan(PurgeDialect::Xkey), any_tag);
    // The answer knows how many, which no ban does. The page is a new one: a page without tags outlives every purge of tags.
    fleet.shop.set_tags(PAGES, "the_only_one");
    // A page is served a moment before it is in the index of keys, so the first count can be too low.
    eventually("each Varnish says that it dropped one page", || {
        fleet.warm(&format!("/p/{PAGES}"));
        (fleet.purge_tag("the_only_one").json()["invalidated"] == fleet.varnish.len()).then_some(())
    });
}

/// Parses Magento's pattern as elgentos/magento2-varnish-extended does: words, for vmod_xkey.
fn takes_the_pattern_apart(vcl: &str, _: &str, _: &Path) -> String {
    let addition = r#"
import std;
import xkey;
sub vcl_recv {
    if (req.method == "PURGE" && req.http.X-Magento-Tags-Pattern && req.http.X-Magento-Tags-Pattern != ".*") {
        set req.http.X-Keys = regsuball(req.http.X-Magento-Tags-Pattern, "[^a-zA-Z0-9_-]+", ",");
        set req.http.X-Gone = xkey.purge(req.http.X-Keys);
        return (synth(200, "OK"));
    }
}
sub vcl_backend_response {
    set beresp.http.xkey = beresp.http.X-Magento-Tags;
}
sub vcl_synth {
    if (req.http.X-Gone) {
        synthetic({"{ "invalidated": "} + req.http.X-Gone + " }");
        return (deliver);
    }
}
"#;
    vcl.replacen("\nimport std;\n", addition, 1)
}

#[test]
fn a_vcl_that_parses_magentos_pattern_drops_exactly_the_purged_pages() {
    purge_at_random(&Plan { vcl: takes_the_pattern_apart, ..plan(PurgeDialect::MagentoPlain) }, plain_tag);
}

#[test]
fn magentos_pattern_as_a_ban_drops_exactly_the_purged_pages() {
    purge_at_random(&plan(PurgeDialect::MagentoPlain), any_tag);
}

#[test]
fn a_node_whose_vcl_lacks_xkey_gets_no_traffic_and_the_fix_is_logged() {
    // It treats the purge as one of the URL `/`, and reports success.
    let vcl: fn(&str, &str, &Path) -> String = |vcl, _, _| {
        let recv = "import std;\nsub vcl_recv { if (req.method == \"PURGE\" && !req.http.X-Magento-Tags-Pattern \
                    && req.url == \"/\" && req.http.xkey-purge) { return (synth(200, \"Purged\")); } }\n";
        let start = vcl.find("import xkey;").expect("the addition");
        let end = vcl.find("backend origin").expect("the template");
        format!("{}{}", &vcl[..start], &vcl[end..]).replacen("import std;\n", recv, 1)
    };
    let fleet = Fleet::start(&Plan { varnish: 1, vcl, config: "", ack_timeout: "1s", ..plan(PurgeDialect::Xkey) });
    let answer = fleet.purge_tag("cat_p_1").json();
    assert_eq!(answer["fenced"], serde_json::json!(["varnish-1"]), "{answer}");
    let error = fleet.clearcoat.node("varnish-1")["delivery_error"].as_str().expect("a text").to_owned();
    assert!(error.contains("xkey-purge") && error.contains("--delivery xkey"), "{error}");
}
