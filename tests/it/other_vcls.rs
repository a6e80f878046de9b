//! Varnish nodes with VCLs other than ours or Magento's: other headers, other methods, authorisation by a key.

use std::path::Path;

use clearcoat::fleet::PurgeDialect;

use crate::support::clearcoat::run;
use crate::support::client::{Answer, exchange, get};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};

/// A VCL with these subroutines and our backend and ACL (`purge`). Pages say whether they were hits, as with ours.
fn vcl_of(ours: &str, subroutines: &str) -> String {
    let block = |begin: &str| {
        let from = &ours[ours.find(begin).expect("it is in our VCL")..];
        &from[..from.find("\n}\n").expect("its end") + 3]
    };
    let (backend, acl) = (block("backend origin"), block("acl purge"));
    let deliver = "sub vcl_deliver { if (obj.hits > 0) { set resp.http.X-Magento-Cache-Debug = \"HIT\"; } else { set \
         resp.http.X-Magento-Cache-Debug = \"MISS\"; } }\n";
    format!("vcl 4.1;\nimport std;\n{backend}{acl}{subroutines}{deliver}")
}

/// In the style of FOSHttpCache: `BAN` by its own headers, `PURGEKEYS` by vmod_xkey, `URIBAN` by path, `PURGE` by URL.
fn many_methods(ours: &str, _: &str, _: &Path) -> String {
    let subroutines = r#"
import xkey;
sub vcl_recv {
  if (req.method == "PURGEKEYS" || req.method == "BAN" || req.method == "URIBAN" || req.method == "PURGE") {
    if (client.ip !~ purge) { return (synth(405)); }
  }
  if (req.method == "PURGEKEYS") {
    if (!req.http.xkey-purge) { return (synth(400)); }
    set req.http.n = xkey.purge(req.http.xkey-purge);
    return (synth(200, "Purged " + req.http.n));
  }
  if (req.method == "BAN") { ban("obj.http.X-Host == " + req.http.Host + " && obj.http.X-Url ~ " + req.url); return (synth(200)); }
  if (req.method == "URIBAN") { ban("obj.http.X-Url == " + req.url); return (synth(200)); }
  if (req.method == "PURGE") { return (purge); }
}
sub vcl_backend_response {
  set beresp.http.X-Url = bereq.url; set beresp.http.X-Host = bereq.http.host;
  set beresp.http.xkey = regsuball(beresp.http.X-Magento-Tags, ",", " ");
}
"#;
    vcl_of(ours, subroutines)
}

/// With vmod_purge, as in Varnish's manual: an uncached page is a 404.
fn says_not_in_cache(ours: &str, _: &str, _: &Path) -> String {
    let subroutines = r#"
import purge;
sub vcl_recv { if (req.method == "PURGE") { if (client.ip !~ purge) { return (synth(405)); } return (hash); } }
sub gone { if (req.method == "PURGE") { set req.http.n = purge.hard(); if (req.http.n == "0") { return (synth(404, "Not in cache")); } return (synth(200, "Purged")); } }
sub vcl_hit { call gone; }
sub vcl_miss { call gone; }
"#;
    // A backend, an ACL and a vmod share one namespace.
    vcl_of(ours, subroutines)
        .replace("acl purge", "acl purgers")
        .replace("client.ip !~ purge)", "client.ip !~ purgers)")
}

fn asked(fleet: &Fleet, request: &str) -> Answer {
    exchange(fleet.clearcoat.purge, request.as_bytes()).expect("an answer")
}

#[track_caller]
fn assert_gone(fleet: &Fleet, request: &str, gone: &[&str], stay: &[&str]) {
    gone.iter().chain(stay).for_each(|page| fleet.warm(page));
    let answer = asked(fleet, request);
    assert_eq!(answer.status, 200, "{request}: {answer:?}");
    for (pages, expected) in [(gone, "MISS"), (stay, "HIT")] {
        for page in pages {
            assert!(fleet.cached(page).iter().all(|cache| cache == expected), "{request}: {page} is no {expected}");
        }
    }
}

#[test]
fn custom_purge_methods_reach_every_varnish_unchanged_and_pass_no_edge() {
    let config = "[purge]\nlisten = [\"127.0.0.1:0\"]\nack_timeout = \"20s\"\n\
                  methods = [\"PURGE\", \"BAN\", \"PURGEKEYS\", \"URIBAN\", \"FLUSHPATH\"]\n";
    let fleet = Fleet::start(&Plan { varnish: 2, web: 1, config, vcl: many_methods, ..Plan::default() });
    // The harness reads pages under the address of each Varnish.
    let pages = ["/p/1", "/p/2"];
    let keys = "PURGEKEYS / HTTP/1.1\r\nHost: shop.test\r\nxkey-purge: cat_p_1\r\n\r\n";
    assert_gone(&fleet, keys, &pages[..1], &pages[1..]);
    assert_gone(&fleet, "URIBAN /p/2 HTTP/1.1\r\nHost: shop.test\r\n\r\n", &pages[1..], &pages[..1]);
    // With no other header, and with none at all.
    assert_gone(&fleet, "URIBAN /p/2 HTTP/1.0\r\n\r\n", &pages[1..], &pages[..1]);

    // A VCL's refusal is passed on to the sender.
    let refused = asked(&fleet, "PURGEKEYS / HTTP/1.1\r\nHost: a\r\nX-Other: 1\r\n\r\n");
    assert_eq!(refused.status, 400, "{refused:?}");
    let unknown = asked(&fleet, "REFRESH / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!((unknown.status, unknown.header("Allow")), (405, Some("PURGE, BAN, PURGEKEYS, URIBAN, FLUSHPATH")));
    for method in ["PURGEKEYS", "uriban", "FLUSHPATH", "FlushPath", "BAN"] {
        for listener in [fleet.clearcoat.edge, fleet.clearcoat.origin] {
            let request = format!("{method} /p/1 HTTP/1.1\r\nHost: a\r\nxkey-purge: cat_p_1\r\n\r\n");
            assert_eq!(exchange(listener, request).expect("an answer").status, 405, "{method}");
        }
    }
    // Unknown methods may be anything.
    let request = "FLUSHPATHS /p/1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    assert_ne!(exchange(fleet.clearcoat.edge, request).expect("an answer").status, 405);
}

#[test]
fn the_host_of_a_purge_reaches_every_varnish_as_it_was_sent() {
    let fleet = Fleet::start(&Plan { varnish: 2, web: 1, vcl: many_methods, ..Plan::default() });
    let page = |host: &str, varnish: usize| {
        let request = format!("GET /p/1 HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        exchange(fleet.varnish[varnish].address, request).expect("an answer").cache().to_owned()
    };
    let hosts = ["shop.test", "shop.test:8080", "other.test"];
    for purged in hosts {
        hosts.iter().for_each(|host| _ = (page(host, 0), page(host, 1)));
        let answer = asked(&fleet, &format!("BAN /p/1 HTTP/1.1\r\nHost: {purged}\r\n\r\n"));
        assert_eq!(answer.status, 200, "{answer:?}");
        for host in hosts {
            let expected = if host == purged { "MISS" } else { "HIT" };
            assert_eq!([page(host, 0), page(host, 1)], [expected, expected], "{host} when {purged} was purged");
        }
    }
}

#[test]
fn a_page_that_is_not_in_a_cache_is_gone() {
    let config = "[edge]\nlisten = [\"127.0.0.1:0\"]\n";
    let fleet = Fleet::start(&Plan { varnish: 2, web: 1, config, vcl: says_not_in_cache, ..Plan::default() });
    let get = |varnish: usize| {
        let request = "GET /p/1 HTTP/1.1\r\nHost: shop.test\r\nConnection: close\r\n\r\n";
        exchange(fleet.varnish[varnish].address, request).expect("an answer").cache().to_owned()
    };
    // Only one of two has it, like a page that the edge keeps on one node.
    assert_eq!((get(0).as_str(), get(0).as_str()), ("MISS", "HIT"));
    let answer = asked(&fleet, "PURGE /p/1 HTTP/1.1\r\nHost: shop.test\r\n\r\n");
    assert_eq!((answer.status, answer.json()["applied"].as_array().map(Vec::len)), (200, Some(2)), "{answer:?}");
    assert_eq!((get(0).as_str(), get(1).as_str()), ("MISS", "MISS"));
}

/// Magento's own VCL: our backend and ACL, its subroutines. Pages have no pool.
fn stock(ours: &str, _: &str, _: &Path) -> String {
    let (before, _) = ours.split_once("sub vcl_recv").expect("a backend and an ACL before the subroutines");
    before.to_owned()
        + &include_str!("data/magento-stock.vcl")
            .replace("set beresp.grace = 3d;", "set beresp.grace = 3d; unset beresp.http.X-Pool;")
}

#[test]
fn a_purge_of_everything_includes_untagged_pages_or_says_it_cannot() {
    for knows in [true, false] {
        let vcl = if knows { |ours: &str, _: &str, _: &Path| ours.to_owned() } else { stock };
        let fleet = Fleet::start(&Plan { varnish: 2, web: 1, vcl, ..Plan::default() });
        fleet.shop.set_tags(1, "");
        ["/p/1", "/p/2"].iter().for_each(|page| fleet.warm(page));
        let endpoint = format!("http://{}", fleet.clearcoat.purge);
        let output = run(&["purge", "--endpoint", &endpoint, "--all"]);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(fleet.cached("/p/2"), ["MISS", "MISS"]);
        let untagged = if knows { "MISS" } else { "HIT" };
        assert_eq!(fleet.cached("/p/1"), [untagged, untagged]);
        let said = fleet.clearcoat.log().count("does not know X-Clearcoat-Flush");
        assert_eq!(said, if knows { 0 } else { 2 });
    }
}

/// Purges are authorised by a key, not by an address.
fn known_by_key(ours: &str, _: &str, _: &Path) -> String {
    let guarded = "if (req.method == \"PURGE\") { if (req.http.X-Purge-Key != \"s3cret 1\") { return (synth(405)); }";
    stock(&ours.replace("client.ip", "server.ip"), "", Path::new("")).replace("if (req.method == \"PURGE\") {", guarded)
}

#[test]
fn a_vcl_that_wants_a_key_gets_it_from_a_file_and_it_stays_secret() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "old\n").expect("written");
    let config = format!(
        "[purge]\nlisten = [\"127.0.0.1:0\"]\nack_timeout = \"20s\"\n\
         [purge.headers]\nX-Purge-Key = {{ file = {:?} }}\nX-Plain = \"pl4in\"\n",
        file.path()
    );
    let plan = Plan { varnish: 2, web: 1, config: config.leak(), vcl: known_by_key, ..Plan::default() };
    let fleet = Fleet::launch(&plan);
    eventually("the nodes refuse the old key", || {
        let nodes = fleet.clearcoat.nodes();
        let mut varnish = nodes.iter().filter(|node| node["role"] == "varnish");
        varnish.all(|node| node["reason"].as_str().is_some_and(|reason| reason.contains("405"))).then_some(())
    });
    // Changed without a restart.
    std::fs::write(file.path(), "s3cret 1\n").expect("written");
    fleet.clearcoat.ready();
    fleet.clearcoat.current();
    fleet.warm("/p/1");
    // A key sent by the client has no effect, and is not forwarded.
    let request =
        "PURGE / HTTP/1.1\r\nHost: a\r\nX-Magento-Tags-Pattern: ((^|,)cat_p_1(,|$))\r\nX-Purge-Key: guess\r\n\r\n";
    assert_eq!(asked(&fleet, request).json()["applied"].as_array().map(Vec::len), Some(2));
    assert_eq!(fleet.cached("/p/1"), ["MISS", "MISS"]);

    let check =
        run(&["check", "--show", "--config", fleet.folder.path().join("clearcoat.toml").to_str().expect("a path")]);
    let checked = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(check.status.success() && checked.contains("X-Purge-Key"), "{check:?}");
    let metrics = get(fleet.clearcoat.admin, "/metrics").expect("metrics").text().to_owned();
    for shown in [checked, metrics, fleet.clearcoat.fleet().to_string(), fleet.clearcoat.log().text()] {
        assert!(!["s3cret", "pl4in", "guess"].iter().any(|secret| shown.contains(secret)), "{shown}");
    }
}

/// Parses Magento's pattern and purges by key, as elgentos/magento2-varnish-extended does: it finds no tag in a pattern
/// written differently, and reports success.
fn takes_words(ours: &str, _: &str, _: &Path) -> String {
    let subroutines = r#"
import xkey;
sub vcl_recv {
  if (req.method == "PURGE") {
    if (client.ip !~ purge) { return (synth(405)); }
    if (!req.http.X-Magento-Tags-Pattern) { return (purge); }
    set req.http.words = regsuball(req.http.X-Magento-Tags-Pattern, "[^a-zA-Z0-9_-]+", " ");
    set req.http.gone = xkey.purge(req.http.words);
    return (synth(200, req.http.gone));
  }
}
sub vcl_backend_response { set beresp.http.xkey = regsuball(beresp.http.X-Magento-Tags, ",", " "); unset beresp.http.X-Magento-Tags; }
sub vcl_synth { if (req.method == "PURGE") { synthetic({"{"invalidated": 1}"}); return (deliver); } }
"#;
    vcl_of(ours, subroutines)
}

/// Caches nothing.
fn passes(ours: &str, _: &str, _: &Path) -> String {
    stock(ours, "", Path::new("")).replace("return (hash);", "return (pass);")
}

fn tried(fleet: &Fleet, state: &str) -> Vec<serde_json::Value> {
    let varnish = || {
        let nodes = fleet.clearcoat.nodes().into_iter();
        nodes.filter(|node| node["role"] == "varnish").collect::<Vec<_>>()
    };
    eventually(state, || varnish().iter().all(|node| node["trial"] == state).then(varnish))
}

#[test]
fn a_varnish_with_the_wrong_delivery_is_detected_and_does_not_serve() {
    for configured in [PurgeDialect::Magento, PurgeDialect::Xkey] {
        let plan = Plan { varnish: 2, web: 1, vcl: takes_words, delivery: configured, ..Plan::default() };
        let fleet = Fleet::start(&plan);
        for node in tried(&fleet, "failed") {
            let finding = node["trial_finding"].as_str().expect("words");
            assert!(finding.contains(&format!("delivery = \"{configured}\"")), "{finding}");
            assert!(finding.contains("\"magento-plain\"") && node["trial_fenced"] == true, "{node}");
            let metric = format!("clearcoat_node_trial_failed{{node={}}}", node["id"]);
            assert!((fleet.clearcoat.metric(&metric) - 1.0).abs() < f64::EPSILON);
        }
        // Past the caches: no Varnish has handled it.
        assert_eq!(fleet.get("/p/1").header("X-Magento-Cache-Debug"), None);
        assert_eq!(fleet.clearcoat.log().count("purges do not take pages out of this Varnish"), 2);
        let config =
            fleet.clearcoat.config().replace(&format!("delivery = \"{configured}\""), "delivery = \"magento-plain\"");
        fleet.clearcoat.configure(&config);
        fleet.clearcoat.reload();
        tried(&fleet, "passed");
        eventually("it serves", || fleet.get("/p/1").header("X-Magento-Cache-Debug").map(drop));
        fleet.warm("/p/7");
        assert_eq!(fleet.purge_tag("cat_p_7").status, 200);
        assert_eq!(fleet.cached("/p/7"), ["MISS", "MISS"]);
    }
}

#[test]
fn a_varnish_that_carries_out_purges_passes_its_trial() {
    let ours: fn(&str, &str, &Path) -> String = |vcl, _, _| vcl.to_owned();
    for (vcl, delivery) in [
        (ours, PurgeDialect::Magento),
        (ours, PurgeDialect::MagentoPlain),
        (ours, PurgeDialect::Xkey),
        (stock, PurgeDialect::Magento),
    ] {
        let fleet = Fleet::start(&Plan { varnish: 1, web: 1, vcl, delivery, ..Plan::default() });
        let head = fleet.clearcoat.fleet()["head"].clone();
        let nodes = tried(&fleet, "passed");
        assert_eq!((&nodes[0]["trial_finding"], &nodes[0]["trial_fenced"]), (&"".into(), &false.into()));
        // The trial bypassed the journal and the shop.
        assert_eq!(fleet.clearcoat.fleet()["head"], head);
    }
}

#[test]
fn a_trial_that_proves_nothing_keeps_nobody_out() {
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, vcl: passes, ..Plan::default() });
    let nodes = tried(&fleet, "inconclusive");
    assert!(nodes[0]["trial_finding"].as_str().is_some_and(|finding| finding.contains("does not keep our page")));
    assert_eq!(fleet.get("/p/1").header("X-Magento-Cache-Debug"), Some("UNCACHEABLE"));
    assert!(
        fleet.clearcoat.log().text().lines().all(|line| !line.contains("could not be tried") || line.contains("INFO"))
    );
}

#[test]
fn a_vcl_that_purges_by_url_alone_serves_until_somebody_purges_by_tags() {
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, vcl: many_methods, ..Plan::default() });
    tried(&fleet, "without-tags");
    let served = || fleet.get("/p/1").header("X-Magento-Cache-Debug").is_some();
    assert!(served());
    assert_eq!(asked(&fleet, "PURGE /p/1 HTTP/1.1\r\nHost: shop.test\r\n\r\n").status, 200);
    assert!(served());
    assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
    assert!(!served());
}

#[test]
fn a_page_under_trial_is_nothing_that_a_stranger_can_ask_for() {
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, ..Plan::default() });
    let renders = || fleet.shop.renders.load(std::sync::atomic::Ordering::SeqCst);
    let before = renders();
    for path in ["/.clearcoat", "/.clearcoat/", "/.clearcoat/trial/0", "/.clearcoat/trial/0?a=b", "/.clearcoat/probe"] {
        for listener in [fleet.clearcoat.edge, fleet.clearcoat.origin] {
            assert_eq!(get(listener, path).expect("an answer").status, 404, "{path}");
        }
    }
    assert_eq!(renders(), before);
}
