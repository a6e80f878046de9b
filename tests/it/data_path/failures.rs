//! Failing nodes: which requests are retried, and that half an answer never looks complete.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::data_path::rig::{Rig, always, get_request};
use crate::support::client::{Connection, Ending, get};
use crate::support::eventually;
use crate::support::upstream::{Checks, Gate, Then, Upstream};

/// Two nodes: the first one asked for a path closes the connection without an answer, and the other one answers. They
/// do not keep connections alive, so that it is always a new one that fails.
fn first_one_fails(then: Then) -> [Upstream; 2] {
    let failed: Arc<std::sync::Mutex<Vec<String>>> = Arc::default();
    [0, 1].map(|number| {
        let failed = Arc::clone(&failed);
        Upstream::start(move |call| {
            let path = call.path().to_owned();
            if !failed.lock().unwrap().contains(&path) {
                failed.lock().unwrap().push(path);
                return then;
            }
            if call.body().is_err() {
                return Then::Close;
            }
            let length = "Content-Length: 6\r\nConnection: close";
            call.send_then(format!("HTTP/1.1 200 OK\r\n{length}\r\n\r\nnode {number}"), Then::Close)
        })
    })
}

#[test]
fn only_a_safe_request_without_a_byte_of_answer_is_retried_once() {
    for (then, ends) in [(Then::Close, "closes"), (Then::Reset, "resets")] {
        let rig = Rig::web(first_one_fails(then));
        let attempts = |path: &str| -> Vec<usize> {
            let calls = rig.web.iter().map(|node| node.calls());
            calls.map(|calls| calls.iter().filter(|call| call.head.contains(&format!(" {path} "))).count()).collect()
        };
        for (number, method) in ["GET", "HEAD", "OPTIONS"].into_iter().enumerate() {
            let mut client = rig.origin();
            client.send(format!("{method} /{number} HTTP/1.1\r\nHost: a\r\n\r\n")).unwrap();
            assert_eq!(client.answer(method == "HEAD").unwrap().status, 200, "a node that {ends}, {method}");
            assert_eq!(attempts(&format!("/{number}")), [1, 1], "a node that {ends}, {method}");
            assert_eq!(rig.retries("web", "no_answer"), (number + 1) as f64, "a node that {ends}, {method}");
        }
        // A body that is still in memory can be sent again.
        let mut client = rig.origin();
        client.send("OPTIONS /body HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello").unwrap();
        assert_eq!(client.answer(false).unwrap().status, 200, "a node that {ends}, with a body");
        let retries = rig.retries("web", "no_answer");
        // PUT and DELETE are idempotent by RFC 9110, but not in a shop: Magento places an order by PUT.
        for (number, method) in ["POST", "PUT", "DELETE", "PATCH", "brew"].into_iter().enumerate() {
            let mut client = rig.origin();
            client
                .send(format!("{method} /post{number} HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"))
                .unwrap();
            let answer = client.answer(false).unwrap();
            assert_eq!(answer.status, 502, "a node that {ends}, {method}: {answer:?}");
            assert_eq!(attempts(&format!("/post{number}")).iter().sum::<usize>(), 1, "a node that {ends}, {method}");
            assert_eq!(client.rest().1, Ending::Clean);
        }
        assert_eq!(rig.retries("web", "no_answer"), retries, "a node that {ends}");
        rig.becomes_idle();
    }
}

#[test]
fn a_request_is_tried_on_two_nodes_and_not_on_all() {
    let nodes = [0, 1, 2, 3].map(|_| Upstream::start(|_| Then::Close));
    let rig = Rig::web(nodes);
    let answer = get(rig.clearcoat.origin, "/").unwrap();
    assert_eq!(answer.status, 502, "{answer:?}");
    let tried: Vec<_> = rig.web.iter().map(|node| node.calls().len()).collect();
    assert_eq!((tried.iter().sum::<usize>(), tried.iter().max()), (2, Some(&1)), "{tried:?}");
}

/// A node that answers, and then closes the idle connection.
fn forgetful(closed: &Arc<AtomicUsize>) -> Upstream {
    let closed = Arc::clone(closed);
    Upstream::start(move |call| {
        let path = call.path().to_owned();
        if call.body().is_err() {
            return Then::Close;
        }
        if path == "/warm" {
            _ = call.answer(&path);
            closed.fetch_add(1, Ordering::SeqCst);
            return Then::Close;
        }
        call.answer(&path)
    })
}

#[test]
fn a_kept_connection_that_the_node_closed_is_replaced_and_nobody_notices() {
    let closed = Arc::default();
    let rig = Rig::web([forgetful(&closed)]);
    for method in ["GET", "POST", "PUT", "DELETE"] {
        for round in 0..10 {
            let already = closed.load(Ordering::SeqCst);
            assert_eq!(get(rig.clearcoat.origin, "/warm").unwrap().status, 200);
            eventually("the node has closed", || (closed.load(Ordering::SeqCst) > already).then_some(()));
            eventually("the end has arrived", || (rig.web[0].established() == 0).then_some(()));
            let mut client = rig.origin();
            client.send(format!("{method} /next HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nok")).unwrap();
            let answer = client.answer(false).unwrap();
            assert_eq!((answer.status, answer.text()), (200, "/next"), "{method}, round {round}: {answer:?}");
        }
    }
}

#[test]
fn a_burst_onto_connections_that_the_node_closed_is_answered_whole() {
    const BURST: usize = 50;
    // All requests are held until all have arrived, so that there are as many connections; then the node closes them
    // all at once.
    let (arrived, go_on, close, closed) =
        (Arc::new(AtomicUsize::new(0)), Gate::default(), Gate::default(), Arc::new(AtomicUsize::new(0)));
    let rig = Rig::web([Upstream::start({
        let (arrived, go_on, close, closed) = (Arc::clone(&arrived), go_on.clone(), close.clone(), Arc::clone(&closed));
        move |call| {
            let path = call.path().to_owned();
            if path != "/warm" {
                return call.answer(&path);
            }
            arrived.fetch_add(1, Ordering::SeqCst);
            if !call.wait(&go_on) || call.answer(&path) != Then::KeepAlive || !call.wait(&close) {
                return Then::Close;
            }
            closed.fetch_add(1, Ordering::SeqCst);
            Then::Close
        }
    })]);
    let mut clients: Vec<Connection> = (0..BURST).map(|_| rig.origin()).collect();
    for client in &mut clients {
        client.send(get_request("/warm")).unwrap();
    }
    eventually("all requests are at the node", || (arrived.load(Ordering::SeqCst) == BURST).then_some(()));
    go_on.open();
    for client in &mut clients {
        assert_eq!(client.answer(false).unwrap().status, 200);
    }
    close.open();
    eventually("the node has closed all", || (closed.load(Ordering::SeqCst) == BURST).then_some(()));
    for (number, client) in clients.iter_mut().enumerate() {
        client.send(get_request(&format!("/{number}"))).unwrap();
    }
    for (number, client) in clients.iter_mut().enumerate() {
        let answer = client.answer(false).unwrap();
        assert_eq!((answer.status, answer.text()), (200, format!("/{number}").as_str()), "{answer:?}");
    }
    rig.becomes_idle();
}

#[test]
fn a_refused_connection_sends_any_method_to_the_next_node() {
    // Health checks that tolerate the dead node, so that requests are sent to it.
    let checks = "[health.web]\ninterval = \"60s\"\nfall = 1000";
    let mut rig = Rig::start(checks, Vec::new(), vec![Upstream::echo(), Upstream::echo()]);
    // Kept connections are closed with the node; new ones are refused.
    drop(rig.web.remove(0));
    for number in 0..20 {
        for method in ["GET", "POST", "PATCH"] {
            let mut client = rig.origin();
            let path = format!("/{method}{number}");
            client.send(format!("{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello")).unwrap();
            let answer = client.answer(false).unwrap();
            assert_eq!((answer.status, answer.text()), (200, path.as_str()), "{answer:?}");
        }
    }
    assert_eq!(rig.web[0].calls().len(), 60);
    // On average half of them try the dead node first.
    let (retries, errors) = (
        rig.retries("web", "connect"),
        rig.counter("clearcoat_upstream_connect_errors_total{node=\"web-1\",role=\"web\"}"),
    );
    assert!(retries > 0.0 && retries == errors, "{retries} retries, {errors} errors");
}

/// How a cut answer looks to a client.
#[derive(Debug, PartialEq, Eq)]
enum Looks {
    Whole,
    Cut(Ending),
}

fn looks(bytes: &[u8], ending: Ending, version: &str) -> Looks {
    let text = String::from_utf8_lossy(bytes);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return Looks::Cut(ending) };
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let whole = match length {
        Some(length) => body.len() == length.parse::<usize>().expect("a length"),
        None if head.contains("Transfer-Encoding: chunked") => body.ends_with("0\r\n\r\n"),
        None => version == "HTTP/1.0" && ending == Ending::Clean,
    };
    if whole { Looks::Whole } else { Looks::Cut(ending) }
}

#[test]
fn an_answer_that_the_node_cuts_never_looks_whole() {
    let length = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello";
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
    let in_chunk = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhello";
    let no_blank_line = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n";
    let open = "HTTP/1.1 200 OK\r\n\r\nhello";
    for (part, then, complete) in [
        (length, Then::Close, false),
        (length, Then::Reset, false),
        (chunked, Then::Close, false),
        (chunked, Then::Reset, false),
        (in_chunk, Then::Close, false),
        (no_blank_line, Then::Close, false),
        // The end of the connection is the end of the body; a reset is not.
        (open, Then::Close, true),
        (open, Then::Reset, false),
    ] {
        for version in ["HTTP/1.1", "HTTP/1.0"] {
            let end = Gate::default();
            let rig = Rig::web([Upstream::start({
                let end = end.clone();
                move |call| {
                    if call.path() == "/next" {
                        return call.answer("next");
                    }
                    if call.send(part).is_err() || !call.wait(&end) { Then::Close } else { then }
                }
            })]);
            let what = format!("{version}, {then:?} after {part:?}");
            let mut client = rig.origin();
            client.send(format!("GET / {version}\r\nHost: a\r\nConnection: close\r\n\r\n")).unwrap();
            let mut got = Vec::new();
            while !String::from_utf8_lossy(&got).contains("hello") {
                let more = client.some();
                assert!(!more.is_empty(), "{what}: the connection ended early");
                got.extend(more);
            }
            end.open();
            let (rest, ending) = client.rest();
            got.extend(rest);
            let expected = if complete { Looks::Whole } else { Looks::Cut(Ending::Reset) };
            assert_eq!(looks(&got, ending, version), expected, "{what}: {:?}", String::from_utf8_lossy(&got));
            assert_eq!(get(rig.clearcoat.origin, "/next").unwrap().text(), "next", "{what}");
            let calls = rig.web[0].calls();
            assert_eq!(calls.len(), 2, "{what}: tried again after a part of the answer: {calls:?}");
            rig.becomes_idle();
        }
    }
}

/// Answers whose end or kind is ambiguous.
fn hostile_heads() -> Vec<String> {
    let ok = |fields: &str| format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n5\r\nhello\r\n0\r\n\r\n");
    let long = "b".repeat(129 * 1024);
    let many = vec!["A: b"; 101].join("\r\n");
    let mut heads = vec![
        "HTTP/1.1 200 OK\nContent-Length: 5\n\nhello".into(),
        "HTTP/1.1 200 OK\r\nContent-Length: 5\n\r\nhello".into(),
        "HTTP/1.1 999 Odd\r\nContent-Length: 5\r\n\r\nhello".into(),
        "HTTP/1.1 099 Odd\r\nContent-Length: 5\r\n\r\nhello".into(),
        "HTTP/1.1 20 OK\r\nContent-Length: 5\r\n\r\nhello".into(),
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhello".into(),
        "HTTP/2.0 200 OK\r\nContent-Length: 5\r\n\r\nhello".into(),
        "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".into(),
        "hello\r\n\r\n".into(),
        "\r\n\r\n\r\n\r\n".into(),
        ok(&format!("A: {long}")),
    ];
    heads.extend(
        [
            "Content-Length: 15\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: chunked\r\nContent-Length: 15",
            "Content-Length: 15\r\nContent-Length: 15",
            "Content-Length: 15\r\nContent-Length: 16",
            "Content-Length: 15, 15",
            "Content-Length: +15",
            "Content-Length:",
            "Transfer-Encoding: gzip, chunked",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: identity",
            "Content-Length : 15",
            "Content-Length: 15\r\n folded",
            "Content-Length: 15\r\nA: b\0",
            "Content-Length: 15\r\nA: b\rC: d",
            "Content-Length: 15\r\nno colon",
            many.as_str(),
        ]
        .map(ok),
    );
    heads
}

/// A node that answers `/` with these bytes and keeps the connection, and any other path with `next`.
fn hostile(bytes: String) -> Upstream {
    Upstream::start(move |call| {
        if call.path() == "/next" {
            return call.answer("next");
        }
        call.send_then(&bytes, Then::KeepAlive)
    })
}

#[test]
fn an_answer_in_doubt_becomes_a_502_and_its_connection_is_not_used_again() {
    for bytes in hostile_heads() {
        let shown: String = bytes.chars().take(120).collect();
        let rig = Rig::web([hostile(bytes)]);
        let mut client = rig.origin();
        client.send(get_request("/")).unwrap();
        let answer = client.answer(false).unwrap_or_else(|error| panic!("{shown:?}: {error}"));
        assert_eq!((answer.status, answer.text()), (502, "the server failed to answer\n"), "{shown:?}");
        assert_eq!(client.rest(), (Vec::new(), Ending::Clean), "{shown:?}");
        assert_eq!(get(rig.clearcoat.origin, "/next").unwrap().text(), "next", "{shown:?}");
        let calls = rig.web[0].calls();
        assert_eq!(calls.len(), 2, "{shown:?}: {calls:?}");
        assert_ne!(calls[0].connection, calls[1].connection, "{shown:?}");
        rig.becomes_idle();
    }
}

#[test]
fn an_answer_with_malformed_chunks_is_cut_and_its_connection_not_reused() {
    for (version, chunks) in
        ["zz\r\nhello\r\n", "5\nhello\r\n", "5\r\nhello0\r\n\r\n", "fffffffffffffffff\r\nhello", "0\r\n\n"]
            .into_iter()
            .flat_map(|chunks| [("HTTP/1.1", chunks), ("HTTP/1.0", chunks)])
    {
        // Together with the head, and separately once the client has seen the beginning.
        for at_once in [true, false] {
            let go_on = Gate::default();
            let rig = Rig::web([Upstream::start({
                let go_on = go_on.clone();
                move |call| {
                    let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
                    match call.path() {
                        "/next" => call.answer("next"),
                        _ if at_once => call.send_then(format!("{head}{chunks}"), Then::KeepAlive),
                        _ => {
                            let begun = call.send(format!("{head}5\r\nhello\r\n")).is_ok() && call.wait(&go_on);
                            if begun { call.send_then(chunks, Then::KeepAlive) } else { Then::Close }
                        }
                    }
                }
            })]);
            let what = format!("{version}, {chunks:?}, at once: {at_once}");
            let mut client = rig.origin();
            client.send(format!("GET / {version}\r\nHost: a\r\n\r\n")).unwrap();
            let mut got = Vec::new();
            while !at_once && !String::from_utf8_lossy(&got).contains("hello") {
                let more = client.some();
                assert!(!more.is_empty(), "{what}: the connection ended early");
                got.extend(more);
            }
            go_on.open();
            let (rest, ending) = client.rest();
            got.extend(rest);
            let looks = looks(&got, ending, version);
            assert_eq!(looks, Looks::Cut(Ending::Reset), "{what}: {:?}", String::from_utf8_lossy(&got));
            assert_eq!(get(rig.clearcoat.origin, "/next").unwrap().text(), "next", "{what}");
            let calls = rig.web[0].calls();
            assert_eq!(calls.len(), 2, "{what}: {calls:?}");
            assert_ne!(calls[0].connection, calls[1].connection, "{what}");
            rig.becomes_idle();
        }
    }
}

#[test]
fn what_a_node_sends_beyond_its_answer_reaches_nobody() {
    let smuggled = "HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nsmuggled";
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        "HTTP/1.1 304 Not Modified\r\nContent-Length: 8\r\n\r\n",
        "HTTP/1.1 204 No Content\r\nContent-Length: 8\r\n\r\n",
    ] {
        // With the answer, in mid-body, and separately after the complete answer.
        for cut in [answer.len(), answer.len() - 1, 0] {
            let (go_on, sent) = (Gate::default(), Gate::default());
            let rig = Rig::web([Upstream::start({
                let (go_on, sent) = (go_on.clone(), sent.clone());
                move |call| {
                    if call.path() == "/next" {
                        return call.answer("next");
                    }
                    let begun = match cut {
                        0 => call.send(answer),
                        cut => call.send(&answer[..cut]),
                    };
                    if begun.is_err() || (cut != answer.len() && !call.wait(&go_on)) {
                        return Then::Close;
                    }
                    let rest = format!("{}{smuggled}", if cut == 0 { "" } else { &answer[cut..] });
                    let then = call.send_then(if cut == answer.len() { smuggled } else { &rest }, Then::KeepAlive);
                    sent.open();
                    then
                }
            })]);
            let what = format!("{answer:?}, cut at {cut}");
            let mut client = rig.origin();
            client.send(get_request("/")).unwrap();
            if cut > 0 {
                go_on.open();
            }
            let first = client.answer(false).unwrap();
            assert!([200, 204, 304].contains(&first.status), "{what}: {first:?}");
            go_on.open();
            sent.wait("the node has sent its surplus");
            client.send(get_request("/next")).unwrap();
            let next = client.answer(false).unwrap();
            assert_eq!((next.status, next.text()), (200, "next"), "{what}");
            let calls = rig.web[0].calls();
            assert_ne!(calls[0].connection, calls.last().unwrap().connection, "{what}");
        }
    }
}

#[test]
fn while_all_nodes_are_down_the_answer_says_when_to_ask_again() {
    let checks = "[health.web]\ninterval = \"50ms\"\ntimeout = \"50ms\"\npanic_threshold = 0\n\
        [health.varnish]\ntrial = false\ninterval = \"50ms\"\ntimeout = \"50ms\"";
    let rig = Rig::start(checks, vec![Upstream::echo()], vec![Upstream::echo()]);
    rig.varnish[0].set_checks(Checks::Fail);
    rig.web[0].set_checks(Checks::Fail);
    eventually("both nodes are down", || {
        rig.clearcoat.nodes().iter().all(|node| node["health"] == "down").then_some(())
    });
    for listener in [rig.clearcoat.edge, rig.clearcoat.origin] {
        let answer = get(listener, "/").unwrap();
        assert_eq!((answer.status, answer.header("Retry-After")), (503, Some("1")), "{answer:?}");
        assert_eq!(answer.header("Cache-Control"), Some("no-store"), "{answer:?}");
    }
    assert_eq!(rig.web[0].calls(), []);
    rig.web[0].set_checks(Checks::Pass);
    eventually("the web node is back", || (get(rig.clearcoat.origin, "/back").unwrap().status == 200).then_some(()));
    // And the edge goes past the caches.
    assert_eq!(get(rig.clearcoat.edge, "/past").unwrap().text(), "/past");
    let head = rig.web[0].calls().pop().unwrap().head;
    assert!(head.starts_with("GET /past "), "{head}");
}

#[test]
fn a_bad_answer_is_counted_and_logged_with_node_path_and_reason() {
    let rig = Rig::web([Upstream::start(|call| {
        let path = call.path().split('?').next().expect("a path").to_owned();
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n";
        let answer = match path.as_str() {
            "/large" => format!("HTTP/1.1 200 OK\r\nX-Magento-Tags: {}\r\n\r\n", "t".repeat(200_000)),
            "/fields" => format!("HTTP/1.1 200 OK\r\n{}\r\n", "A: b\r\n".repeat(300)),
            "/malformed" => "HTTP/1.1 200 OK\r\nContent-Length: 1, 1\r\n\r\na".to_owned(),
            "/chunk" => format!("{chunked}no size\r\n"),
            "/cut" => return call.send_then(chunked, Then::Close),
            "/nothing" => return Then::Close,
            _ => return call.answer("good"),
        };
        call.send_then(answer, Then::Close)
    })]);
    for (path, reason, text) in [
        ("/large", "head_too_large", "the head is too large (limits.max_answer_head)"),
        ("/fields", "head_too_large", "too many header fields (limits.max_fields)"),
        ("/malformed", "bad_head", "Content-Length is repeated or not a number"),
        ("/chunk", "bad_body", "a chunk size is malformed"),
        ("/cut", "cut", "the answer was cut off"),
        ("/nothing", "no_answer", "no answer"),
    ] {
        let series = format!("clearcoat_upstream_failures_total{{reason=\"{reason}\",role=\"web\"}}");
        let before = rig.counter(&series);
        let mut client = rig.origin();
        client.send(get_request(&format!("{path}?token=secret"))).unwrap();
        // Nothing, a 502, or a cut answer: other tests check which.
        _ = client.rest();
        assert_eq!(rig.counter(&series), before + 1.0, "{path}");
        let is_told = |line: &&str| line.contains(&format!("\"path\":\"{path}\"")) && line.contains(text);
        let log = rig.clearcoat.log();
        let line = eventually("it is logged", || log.text().lines().find(is_told).map(str::to_owned));
        assert!(line.contains("\"level\":\"INFO\"") && line.contains("\"node\":\"web-1\""), "{line}");
    }
    let told = rig.clearcoat.log().count("got no good answer");
    assert!(!rig.clearcoat.log().has("secret"), "a query is in the log");
    // A good answer, or a client's fault, is not logged.
    let mut client = rig.origin();
    client.send(get_request("/good")).unwrap();
    assert_eq!(client.answer(false).unwrap().text(), "good");
    client.send("GET /p HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(client.answer(false).unwrap().status, 400);
    // A flood is logged in part, and counted in full.
    for _ in 0..200 {
        let mut client = rig.origin();
        client.send(get_request("/malformed")).unwrap();
        assert_eq!(client.answer(false).unwrap().status, 502);
    }
    assert_eq!(rig.counter("clearcoat_upstream_failures_total{reason=\"bad_head\",role=\"web\"}"), 201.0);
    assert!(rig.clearcoat.log().count("got no good answer") < told + 200);
}

#[test]
fn an_answer_that_fails_after_an_interim_one_is_told_apart() {
    let rig = Rig::web([always("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", Then::Close)]);
    let mut client = rig.origin();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").unwrap();
    assert_eq!(client.answer(false).unwrap().status, 502);
    assert_eq!(rig.web[0].calls().len(), 1);
}
