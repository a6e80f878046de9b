//! Traces: what a collector is told of requests, purges and deliveries, what nodes are told, and who decides.

use std::io::Read;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::data_path::rig::{Rig, always, get_request};
use crate::support::clearcoat::run;
use crate::support::client::{Connection, exchange, tag};
use crate::support::collector::{Collected, Collector};
use crate::support::fleet::{Fleet, Plan};
use crate::support::tls::Issued;
use crate::support::upstream::{Call, Seen, Then, Upstream};
use crate::support::{PATIENCE, eventually};

const PAGE: &str = "HTTP/1.1 200 OK\r\nX-Varnish: 32773 5\r\nContent-Length: 4\r\n\r\npage";

/// An edge that trusts 127.0.0.2.
const TRUSTS: &str = "[edge]\nlisten = [\"127.0.0.1:0\"]\nseal = false\ntrusted_proxies = [\"127.0.0.2\"]\n";

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SENDER: &str = "00f067aa0ba902b7";

/// A `traceparent` of the sender of a request.
fn sender(flags: &str) -> String {
    format!("00-{TRACE}-{SENDER}-{flags}")
}

fn span_id(span: &Collected) -> String {
    span.span.span_id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a node was told: the trace, the span, the flags.
fn told(seen: &Seen) -> [String; 3] {
    let value = seen.header("traceparent").unwrap_or_else(|| panic!("no traceparent: {}", seen.head));
    let parts: Vec<_> = value.split('-').map(str::to_owned).collect();
    let [version, trace, span, flags] = parts.try_into().unwrap_or_else(|parts| panic!("{parts:?}"));
    assert_eq!(version, "00");
    [trace, span, flags]
}

#[test]
fn a_request_from_edge_to_web_node_is_one_trace_and_tells_no_secret() {
    let collector = Collector::start();
    let config = collector.config(1.0).leak();
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, config, ..Plan::default() });
    let ask = || {
        let head =
            "GET /p/1?token=geheim HTTP/1.1\r\nHost: shop.test\r\nCookie: SID=geheim\r\nAuthorization: geheim\r\n\r\n";
        assert_eq!(exchange(fleet.clearcoat.edge, head).unwrap().status, 200);
    };
    ask();
    let edge = collector.request("edge", "/p/1");
    assert!(edge.span.parent_span_id.is_empty() && edge.service == "shop", "{edge:?}");
    for (key, expected) in [
        ("http.request.method", "GET"),
        ("url.scheme", "http"),
        ("http.response.status_code", "200"),
        ("network.peer.address", "127.0.0.1"),
        ("clearcoat.cache", "miss"),
        ("clearcoat.node", "varnish-1"),
        ("clearcoat.termination", "--"),
    ] {
        assert_eq!(edge.get(key), expected, "{key} of {edge:?}");
    }
    let to_varnish = collector.within(&edge, 1).remove(0);
    assert!(to_varnish.is_client(), "{to_varnish:?}");
    assert_eq!(to_varnish.get("server.port"), fleet.varnish[0].address.port().to_string());
    let origin = collector.request("origin", "/p/1");
    assert!(origin.is_within(&to_varnish), "{origin:?} is not within {to_varnish:?}");
    let to_web = collector.within(&origin, 1).remove(0);
    assert_eq!((&*to_web.get("clearcoat.node"), &*to_web.get("http.response.status_code")), ("web-1", "200"));
    let times = |of: &Collected| (of.span.start_time_unix_nano, of.span.end_time_unix_nano);
    let (outer, inner) = (times(&edge), times(&to_web));
    // Who has written the last byte notes the end after that, and the reader may have it by then.
    assert!(outer.0 <= inner.0 && inner.0 <= inner.1 && inner.0 <= outer.1, "{outer:?} {inner:?}");
    // A hit ends at the Varnish.
    ask();
    let hit = collector.eventually("the span of a hit", |spans| {
        spans.iter().find(|span| span.get("clearcoat.cache") == "hit").cloned()
    });
    assert_ne!(hit.trace_id(), edge.trace_id());
    let of_hit = collector.within(&hit, 1);
    assert!(!collector.spans().iter().any(|span| span.is_within(&of_hit[0])));
    let all = format!("{:?}", collector.spans());
    assert!(!all.contains("geheim") && !all.contains("token"), "{all}");
}

#[test]
fn each_of_two_tries_has_a_span_and_its_node_was_told_that() {
    let collector = Collector::start();
    let has_failed = Arc::new(AtomicBool::new(false));
    let node = || {
        let has_failed = Arc::clone(&has_failed);
        Upstream::start(move |call: &mut Call<'_>| {
            if has_failed.swap(true, Ordering::SeqCst) { call.send_then(PAGE, Then::KeepAlive) } else { Then::Close }
        })
    };
    let rig = Rig::start(&collector.config(1.0), vec![node(), node()], vec![]);
    let mut client = rig.edge();
    client.send(get_request("/twice")).unwrap();
    assert_eq!(client.answer(false).unwrap().status, 200);
    let edge = collector.request("edge", "/twice");
    let tries = collector.within(&edge, 2);
    let facts = |a_try: &Collected| {
        ["error.type", "http.response.status_code", "http.request.resend_count"].map(|key| a_try.get(key))
    };
    assert_eq!(facts(&tries[0]), ["no_answer", "", ""]);
    assert_eq!(facts(&tries[1]), ["", "200", "1"]);
    assert_eq!((tries.len(), edge.get("clearcoat.node")), (2, tries[1].get("clearcoat.node")));
    for a_try in &tries {
        let number: usize = a_try.get("clearcoat.node").trim_start_matches("varnish-").parse().unwrap();
        let seen = rig.varnish[number - 1].calls().pop().unwrap();
        assert_eq!(told(&seen), [edge.trace_id(), span_id(a_try), "01".to_owned()]);
    }
}

#[test]
fn a_sampled_flag_counts_from_a_trusted_proxy_and_from_nobody_else() {
    let collector = Collector::start();
    let rig = Rig::start(&format!("{TRUSTS}{}", collector.config(0.0)), vec![always(PAGE, Then::KeepAlive)], vec![]);
    let ask = |from: [u8; 4], path: &str, fields: &str| {
        let mut client = Connection::open_from(from, rig.clearcoat.edge).unwrap();
        client.send(format!("GET {path} HTTP/1.1\r\nHost: shop.test\r\n{fields}\r\n")).unwrap();
        assert_eq!(client.answer(false).unwrap().status, 200);
        rig.varnish[0].calls().pop().unwrap()
    };
    let state = "tracestate: vendor=1\r\n";
    let sampled = format!("traceparent: {}\r\n{state}", sender("01"));
    let seen = ask([127, 0, 0, 1], "/stranger", &sampled);
    let [trace, span, flags] = told(&seen);
    assert_eq!((&*trace, &*flags, seen.header("tracestate")), (TRACE, "00", Some("vendor=1")));
    assert_ne!(span, SENDER);
    // What is not valid begins a new trace, of which the old state says nothing.
    for bad in [&*format!("traceparent: {}\r\n{state}", sender("0g")), &format!("{sampled}{sampled}"), state] {
        let seen = ask([127, 0, 0, 2], "/invalid", bad);
        assert_ne!(told(&seen)[0], TRACE);
        assert_eq!((&*told(&seen)[2], seen.header("tracestate")), ("00", None), "{bad}");
        assert_eq!(seen.head.to_lowercase().matches("traceparent").count(), 1, "{}", seen.head);
    }
    let seen = ask([127, 0, 0, 2], "/trusted", &sampled);
    let edge = collector.request("edge", "/trusted");
    let a_try = collector.within(&edge, 1).remove(0);
    assert_eq!(told(&seen), [TRACE.to_owned(), span_id(&a_try), "01".to_owned()]);
    let parent: String = edge.span.parent_span_id.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(parent, SENDER);
    // They are exported in the order in which requests end, so those before it are not.
    let paths: Vec<String> = collector.spans().iter().map(|span| span.get("url.path")).collect();
    assert!(!paths.iter().any(|path| path == "/stranger" || path == "/invalid"), "{paths:?}");
}

#[test]
fn a_purge_is_a_trace_with_its_deliveries() {
    let collector = Collector::start();
    let config = collector.config(0.0).leak();
    let fleet = Fleet::start(&Plan { varnish: 2, web: 1, config, ..Plan::default() });
    fleet.get("/p/7");
    let pattern = tag("cat_p_7");
    let head = "PURGE / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n";
    let traced = format!("{head}X-Magento-Tags-Pattern: {pattern}\r\ntraceparent: {}\r\n\r\n", sender("01"));
    let answer = exchange(fleet.clearcoat.purge, traced).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    let purge = collector
        .eventually("the span of the purge", |spans| spans.iter().find(|span| span.span.name == "purge").cloned());
    assert_eq!(purge.trace_id(), TRACE);
    assert_eq!(purge.get("clearcoat.purge.position"), answer.json()["position"].to_string());
    let facts = ["kind", "targets", "tags"].map(|key| purge.get(&format!("clearcoat.purge.{key}")));
    assert_eq!(facts, ["tags", "1", "1"]);
    let result = purge.get("clearcoat.purge.result");
    assert!(["applied", "pending"].contains(&&*result), "{purge:?}");
    for node in ["varnish-1", "varnish-2"] {
        collector.eventually(&format!("its delivery to {node}"), |spans| {
            let is_it = |span: &&Collected| {
                let facts = ["clearcoat.delivery.kind", "clearcoat.delivery.ok"].map(|key| span.get(key));
                span.is_within(&purge) && span.get("clearcoat.node") == node && facts == ["new", "true"]
            };
            spans.iter().find(is_it).map(|span| assert_ne!(span.get("clearcoat.delivery.bans"), "0"))
        });
    }
    assert!(!format!("{:?}", collector.spans()).contains("cat_p_7"));
}

#[test]
fn what_a_replica_does_with_a_told_purge_is_a_part_of_its_trace() {
    for (etcd, journal) in [(0, "disk"), (1, "etcd")] {
        let collector = Collector::start();
        let config = collector.config(0.0).leak();
        let plan =
            Plan { varnish: 1, web: 1, replicas: 2, etcd, journal, ack_timeout: "10s", config, ..Plan::default() };
        let fleet = Fleet::start(&plan);
        let head = "PURGE / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n";
        let pattern = tag("cat_p_7");
        // One after the other, so that some of them are told before their trace is known and some after.
        for number in 0..8 {
            let trace = TRACE.replace("4bf9", &format!("{:04x}", 0x1000 + number));
            let traceparent = format!("00-{trace}-{SENDER}-01");
            let traced = format!("{head}X-Magento-Tags-Pattern: {pattern}\r\ntraceparent: {traceparent}\r\n\r\n");
            let answer = exchange(fleet.clearcoat.purge, traced).unwrap();
            assert_eq!(answer.status, 200, "{answer:?}");
            let named = |spans: &[Collected], name: &str| {
                spans.iter().find(|span| span.trace_id() == trace && span.span.name == name).cloned()
            };
            let purge = collector.eventually("the span of the purge", |spans| named(spans, "purge"));
            let told = collector.eventually("the span at the other one", |spans| named(spans, "told"));
            assert!(told.is_within(&purge), "{told:?}");
            let facts = ["clearcoat.replica", "clearcoat.purge.kind", "clearcoat.purge.tags"].map(|key| told.get(key));
            assert_eq!(facts, [fleet.clearcoat.fleet()["replicas"][0]["id"].as_str().unwrap(), "tags", "1"]);
            // Its own delivery to the same Varnish.
            collector.eventually("its delivery there", |spans| {
                let is_it = |span: &&Collected| span.is_within(&told) && span.span.name == "delivery";
                spans.iter().find(is_it).map(|span| assert_eq!(span.get("clearcoat.node"), "varnish-1"))
            });
        }
        // Not traced: nothing is told of it.
        let untraced = format!("{head}X-Magento-Tags-Pattern: {pattern}\r\ntraceparent: {}\r\n\r\n", sender("00"));
        assert_eq!(exchange(fleet.clearcoat.purge, untraced).unwrap().status, 200);
        assert!(collector.spans().iter().all(|span| span.trace_id() != TRACE));
        let tellings = collector.spans().iter().filter(|span| span.span.name == "told").count();
        assert_eq!(tellings, 8);
    }
}

/// A section that exports to this address by TLS. `more` are keys.
fn by_tls(host_port: &str, more: &str) -> String {
    format!("[traces]\nendpoint = \"https://{host_port}\"\n{more}\n")
}

#[test]
fn a_collector_that_wants_tls_and_a_key_has_them_and_the_key_is_secret() {
    let collector = Collector::start();
    let folder = tempfile::tempdir().unwrap();
    let issued = Issued::for_names(&["127.0.0.1"]);
    let (address, _tls) = collector.by_tls(&issued);
    let (ca, key) = (issued.write(folder.path(), "ca").cert, folder.path().join("key"));
    std::fs::write(&key, "Bearer geheim-1\n").unwrap();
    let headers = format!("ca = {ca:?}\nheaders = {{ Authorization = {{ file = {key:?} }} }}");
    let section = by_tls(&address.to_string(), &headers);
    let rig = Rig::start(
        &format!("{section}[log]\nlevel = \"trace\"\nformat = \"json\"\n"),
        vec![always(PAGE, Then::KeepAlive)],
        vec![],
    );
    let mut client = rig.edge();
    let mut ask = |path: &str| {
        client.send(get_request(path)).unwrap();
        assert_eq!(client.answer(false).unwrap().status, 200);
    };
    ask("/first");
    collector.request("edge", "/first");
    assert_eq!(collector.keys(), ["Bearer geheim-1"]);
    // The key is changed at both sides, without a restart.
    std::fs::write(&key, "Bearer geheim-2").unwrap();
    ask("/second");
    collector.request("edge", "/second");
    assert_eq!(collector.keys().last().unwrap(), "Bearer geheim-2");
    collector.refuse(401);
    ask("/refused");
    rig.clearcoat.log().waits_for("the collector answers 401 Unauthorized: see traces.headers");
    // In text, too: it is hidden wherever the configuration is shown.
    let config = folder.path().join("clearcoat.toml");
    let text = by_tls("otlp.example", "headers = { Authorization = \"Bearer geheim-3\", Host = \"geheim-4\" }");
    let wrong = (std::fs::write(&config, &text), run(&["check", "--config", config.to_str().unwrap()])).1;
    assert!(!wrong.status.success());
    std::fs::write(&config, text.replace(", Host = \"geheim-4\"", "")).unwrap();
    let right = run(&["check", "--show", "--config", config.to_str().unwrap()]);
    assert!(right.status.success(), "{right:?}");
    let shown = format!("{wrong:?}{right:?}{}", rig.clearcoat.log().text());
    assert!(shown.contains("(hidden)") && !shown.contains("geheim"), "{shown}");
}

#[test]
fn a_certificate_that_is_not_accepted_is_named_with_its_setting() {
    let collector = Collector::start();
    let folder = tempfile::tempdir().unwrap();
    let issued = Issued::for_names(&["127.0.0.1"]);
    let (address, _tls) = collector.by_tls(&issued);
    let right = issued.write(folder.path(), "right").cert;
    let other = Issued::for_names(&["127.0.0.1"]).write(folder.path(), "other").cert;
    let expired = Issued::ended_in(&["127.0.0.1"], Some(2020));
    let (ended, _ended) = collector.by_tls(&expired);
    let expired = expired.write(folder.path(), "expired").cert;
    let ca = |file: &std::path::Path| format!("ca = {file:?}");
    for (host_port, more, named) in [
        (address.to_string(), ca(&other), format!("its certificate is of no CA in traces.ca = {}", other.display())),
        (address.to_string(), String::new(), "name its CA in traces.ca".to_owned()),
        (format!("localhost:{}", address.port()), ca(&right), "its certificate is not for localhost".to_owned()),
        (ended.to_string(), ca(&expired), "its certificate has expired".to_owned()),
        (collector.address.to_string(), ca(&right), "what answers there speaks no TLS".to_owned()),
    ] {
        let rig = Rig::start(&by_tls(&host_port, &more), vec![always(PAGE, Then::KeepAlive)], vec![]);
        let mut client = rig.edge();
        let mut ask = |path: &str| {
            client.send(get_request(path)).unwrap();
            assert_eq!(client.answer(false).unwrap().status, 200);
        };
        ask("/lost");
        let log = rig.clearcoat.log();
        log.waits_for("spans are not exported");
        assert!(log.text().contains(&named), "{named}: {}", log.text());
        if more == ca(&other) {
            // The file is read again.
            std::fs::copy(&right, &other).unwrap();
            eventually("spans are exported", || {
                ask("/taken");
                log.has("spans are exported").then_some(())
            });
            collector.request("edge", "/taken");
        }
    }
    assert!(!collector.spans().iter().any(|span| span.get("url.path") == "/lost"));
}

#[test]
fn a_hanging_collector_delays_no_request_and_what_is_lost_is_counted() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = format!("[traces]\nendpoint = \"http://{}\"\n", silent.local_addr().unwrap());
    let rig = Rig::start(&config, vec![always(PAGE, Then::KeepAlive)], vec![]);
    let dropped = || rig.counter("clearcoat_spans_dropped_total");
    assert_eq!(dropped(), 0.0);
    let mut client = rig.edge();
    let mut ask = || {
        client.send(get_request("/p")).unwrap();
        assert_eq!(client.answer(false).unwrap().status, 200);
    };
    ask();
    // It has the first batch now, and says nothing.
    silent.set_nonblocking(true).unwrap();
    let (mut held, _) = eventually("the exporter connects", || silent.accept().ok());
    held.set_nonblocking(false).unwrap();
    held.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(held.read(&mut [0; 16]).unwrap() > 0);
    // More than the queue has room for: all are answered, while the collector holds the exporter.
    (0..5000).for_each(|_| ask());
    eventually("spans are dropped", || (dropped() > 0.0).then_some(()));
    ask();
}

#[test]
fn a_collector_that_is_away_is_said_once_and_so_is_its_return() {
    let collector = Collector::start();
    collector.refuse(503);
    let rig = Rig::start(&collector.config(1.0), vec![always(PAGE, Then::KeepAlive)], vec![]);
    let log = rig.clearcoat.log();
    let mut client = rig.edge();
    let mut ask = |path: &str| {
        client.send(get_request(path)).unwrap();
        assert_eq!(client.answer(false).unwrap().status, 200);
    };
    for batch in 1..=2_u8 {
        ask("/lost");
        // Of the request, and of its try.
        let lost = f64::from(batch) * 2.0;
        eventually("a batch is lost", || (rig.counter("clearcoat_spans_dropped_total") == lost).then_some(()));
    }
    log.waits_for("spans are not exported");
    collector.accept();
    ask("/taken");
    collector.request("edge", "/taken");
    log.waits_for("spans are exported");
    assert_eq!(["spans are not exported", "spans are exported"].map(|text| log.count(text)), [1, 1]);
    assert!(!collector.spans().iter().any(|span| span.get("url.path") == "/lost"));
}

#[test]
fn without_traces_nodes_are_told_what_the_client_says_and_nothing_else() {
    let rig = Rig::start("", vec![always(PAGE, Then::KeepAlive)], vec![]);
    let mut client = rig.edge();
    let value = sender("01");
    for (fields, expected) in [(format!("traceparent: {value}\r\n"), Some(&*value)), (String::new(), None)] {
        client.send(format!("GET /p HTTP/1.1\r\nHost: shop.test\r\n{fields}\r\n")).unwrap();
        assert_eq!(client.answer(false).unwrap().status, 200);
        assert_eq!(rig.varnish[0].calls().pop().unwrap().header("traceparent"), expected);
    }
}

#[test]
fn spans_that_are_not_sent_yet_are_sent_at_the_end_of_the_process() {
    let collector = Collector::start();
    let mut rig = Rig::start(&collector.config(1.0), vec![always(PAGE, Then::Close)], vec![]);
    let mut client = rig.edge();
    client.send(get_request("/last")).unwrap();
    assert_eq!(client.answer(false).unwrap().status, 200);
    drop(client);
    rig.clearcoat.terminate();
    assert!(rig.clearcoat.wait().success());
    collector.request("edge", "/last");
}
