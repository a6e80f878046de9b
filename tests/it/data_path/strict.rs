//! What is refused on the socket: an answer, the end of the connection, and not a byte for the node behind it.

use crate::data_path::rig::{Rig, get_request};
use crate::support::client::{Connection, Ending, get};
use crate::support::eventually;
use crate::support::upstream::{Then, Upstream};

/// What is wrong, the bytes, and the status of the refusal.
type Case = (String, Vec<u8>, u16);

fn case(what: impl Into<String>, bytes: impl Into<Vec<u8>>, status: u16) -> Case {
    (what.into(), bytes.into(), status)
}

fn bad_line_ends() -> Vec<Case> {
    vec![
        case("LF alone behind the request line", "GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
        case("LF alone behind a field", "GET / HTTP/1.1\r\nHost: a\n\r\n", 400),
        case("LF alone as the blank line", "GET / HTTP/1.1\r\nHost: a\r\n\n", 400),
        case("LF alone everywhere", "GET / HTTP/1.1\nHost: a\n\n", 400),
        case("LF alone first", "\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        case("two CR", "GET / HTTP/1.1\r\nHost: a\r\r\n\r\n", 400),
        case("CR alone in a value", "GET / HTTP/1.1\r\nHost: a\r\nA: b\rC: d\r\n\r\n", 400),
        case("CR alone in the request line", "GET /\r HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        case("two blank lines before the head", "\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ]
}

fn bad_framing() -> Vec<Case> {
    let post = |what: &str, fields: &str| {
        let body = "5\r\nhello\r\n0\r\n\r\n";
        case(what, format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n{body}"), 400)
    };
    let te = |value: &str| post(value, &format!("Transfer-Encoding: {value}\r\n"));
    let length = |value: &str| post(value, &format!("Content-Length: {value}\r\n"));
    let mut cases = vec![
        post("CL then TE", "Content-Length: 15\r\nTransfer-Encoding: chunked\r\n"),
        post("TE then CL", "Transfer-Encoding: chunked\r\nContent-Length: 15\r\n"),
        post("CL 0 and TE", "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n"),
        post("two equal CL", "Content-Length: 15\r\nContent-Length: 15\r\n"),
        post("two different CL", "Content-Length: 15\r\nContent-Length: 5\r\n"),
        post("two TE", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"),
        post("two TE, one odd", "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n"),
        post("TE in another case, and CL", "tRANSFER-eNCODING: chunked\r\nContent-Length: 15\r\n"),
        case("TE with HTTP/1.0", "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ];
    cases.extend(
        ["15, 15", "15,15", "+15", "-15", "", "0x0f", "1 5", "15;", "15.0", "\"15\"", "99999999999999999999"]
            .map(length),
    );
    cases.extend(
        [
            "chunked, chunked",
            "identity, chunked",
            "chunked, identity",
            "gzip, chunked",
            "identity",
            "xchunked",
            "chunked;q=1",
            "\"chunked\"",
            "",
            ",chunked",
            "\u{b}chunked",
        ]
        .map(te),
    );
    cases
}

fn bad_hosts() -> Vec<Case> {
    let mut cases = vec![
        case("no Host", "GET / HTTP/1.1\r\nAccept: */*\r\n\r\n", 400),
        case("two Hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        case("one Host twice", "GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n", 400),
        case("Host with an 8-bit byte", &b"GET / HTTP/1.1\r\nHost: a\xfc\r\n\r\n"[..], 400),
    ];
    for host in ["", "a b", "a/../b", "a/", "u@a", "a:http", "a:123456", "a%20b", "[]", "[::1", "::1", "a#b", "a?b"] {
        cases.push(case(format!("Host: {host}"), format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"), 400));
    }
    for target in ["http://b/", "http://a:81/", "http://u@a/", "http:///", "ftp://a/", "http://a#/", "http:/a/"] {
        cases.push(case(target, format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n"), 400));
    }
    cases
}

fn bad_request_lines() -> Vec<Case> {
    let mut cases = vec![
        case("HTTP/0.9", "GET /\r\n\r\n", 400),
        case("the preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        case("no target", "GET HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        case("two blanks", "GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        case("a tab between", "GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        case("a blank first", " GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        case("a raw umlaut in the target", "GET /\u{fc} HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        case("an 8-bit byte in the target", &b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n"[..], 400),
        case("CONNECT to an authority", "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 405),
        case("an odd method", "GE(T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ];
    for target in ["/a#b", "/a b", "/a\tb", "/a\u{7f}b", "/a\0b", "p", "*", "a:80", "?q", "#"] {
        cases.push(case(format!("{target:?}"), format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n"), 400));
    }
    for version in ["HTTP/0.9", "HTTP/1.2", "HTTP/2.0", "HTTP/3", "http/1.1", "HTTP/1.1 ", "HTTP/01.1", "HTTP/1.10"] {
        cases.push(case(version, format!("GET / {version}\r\nHost: a\r\n\r\n"), 400));
    }
    cases
}

fn bad_fields() -> Vec<Case> {
    let fields =
        ["A : b", " A: b", "\tA: b", "A: b\r\n c", "A: b\r\n\tc", "A: b\0", "A\0: b", ": b", "A", "A\u{fc}: b"];
    let head = |fields: &str| format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n");
    let mut cases: Vec<Case> = fields.iter().map(|field| case(format!("{field:?}"), head(field), 400)).collect();
    // Before the first field, where some parsers take it for a part of the request line.
    cases.push(case("a fold before any field", "GET / HTTP/1.1\r\n A: b\r\nHost: a\r\n\r\n", 400));
    cases.push(case("a head over 32 KiB", head(&format!("A: {}", "b".repeat(33 * 1024))), 431));
    cases.push(case("a target over 32 KiB", format!("GET /{} HTTP/1.1\r\n\r\n", "b".repeat(33 * 1024)), 431));
    cases.push(case("101 fields", head(&vec!["A: b"; 100].join("\r\n")), 431));
    cases
}

fn methods_that_do_not_pass() -> Vec<Case> {
    let methods =
        ["PURGE", "purge", "Purge", "BAN", "ban", "PURGEKEYS", "SOFTPURGE", "XKEY", "REFRESH", "TRACE", "CONNECT"];
    let request = |method| format!("{method} / HTTP/1.1\r\nHost: a\r\nX-Magento-Tags-Pattern: .*\r\n\r\n");
    let mut cases: Vec<Case> = methods.iter().map(|method| case(*method, request(method), 405)).collect();
    cases.push(case("PURGE with HTTP/1.0", "PURGE / HTTP/1.0\r\n\r\n", 405));
    cases.push(case("PURGE with a body", "PURGE / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", 405));
    cases.push(case("PURGE in absolute form", "PURGE http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 405));
    cases
}

#[test]
fn what_is_not_strictly_right_is_refused_and_not_a_byte_of_it_goes_on() {
    let rig = Rig::start("", vec![Upstream::echo()], vec![Upstream::echo()]);
    let cases =
        [bad_line_ends(), bad_framing(), bad_hosts(), bad_request_lines(), bad_fields(), methods_that_do_not_pass()];
    for (listener, address, node) in
        [("edge", rig.clearcoat.edge, &rig.varnish[0]), ("origin", rig.clearcoat.origin, &rig.web[0])]
    {
        for (what, bytes, status) in cases.iter().flatten() {
            let mut client = Connection::open(address).expect("clearcoat accepts");
            client.send(bytes).and_then(|()| client.send(get_request("/smuggled"))).expect("clearcoat reads");
            let answer = client.answer(false).unwrap_or_else(|error| panic!("{listener}, {what}: {error}"));
            assert_eq!(answer.status, *status, "{listener}, {what}: {answer:?}");
            assert_eq!(answer.header("Connection"), Some("close"), "{listener}, {what}: {answer:?}");
            assert_eq!(answer.header("Allow").is_some(), *status == 405, "{listener}, {what}: {answer:?}");
            assert_eq!(client.rest(), (Vec::new(), Ending::Clean), "{listener}, {what}");
        }
        let good = get(address, "/good").expect("an answer");
        assert_eq!((good.status, good.text()), (200, "/good"));
        let (bytes, calls) = node.all_traffic();
        assert_eq!(calls.len(), 1, "{listener}: requests went on: {calls:?}");
        assert_eq!(bytes, calls[0].head.len() as u64, "{listener}: other bytes went on");
    }
}

#[test]
fn a_pipelined_request_behind_a_good_one_is_looked_at_as_strictly() {
    let rig = Rig::web([Upstream::echo()]);
    let mut client = rig.origin();
    client.send(format!("{}GET /b HTTP/1.1\nHost: a\n\n{}", get_request("/a"), get_request("/c"))).unwrap();
    assert_eq!(client.answer(false).unwrap().text(), "/a");
    assert_eq!(client.answer(false).unwrap().status, 400);
    assert_eq!(client.rest(), (Vec::new(), Ending::Clean));
    let (_, calls) = rig.web[0].all_traffic();
    assert_eq!(calls.len(), 1, "{calls:?}");
}

#[test]
fn a_refusal_has_the_body_it_announces_also_after_a_head_request() {
    let rig = Rig::web([Upstream::start(|call| {
        call.send_then("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", Then::KeepAlive)
    })]);
    let mut client = rig.origin();
    client.send("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(client.answer(true).unwrap().status, 200);
    client.send("GET /a b HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let refusal = client.answer(false).expect("a whole answer");
    assert_eq!(refusal.status, 400);
    assert!(refusal.text().starts_with("bad request"), "{refusal:?}");
    // And the answer to a refused HEAD has none.
    let mut client = rig.origin();
    client.send("HEAD / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(client.answer(true).unwrap().status, 400);
    assert_eq!(client.rest(), (Vec::new(), Ending::Clean));
}

/// The bytes that a chunked body goes on with.
const BAD_CHUNKS: [(&str, &str); 16] = [
    ("no hexadecimal size", "zz\r\nhello\r\n"),
    ("a size behind a blank", " 5\r\nhello\r\n"),
    ("no size", "\r\nhello\r\n"),
    ("no size, an extension", ";a=b\r\nhello\r\n"),
    ("a plus", "+5\r\nhello\r\n"),
    ("a minus", "-5\r\nhello\r\n"),
    ("0x", "0x5\r\nhello\r\n"),
    ("17 digits", "fffffffffffffffff\r\nhello\r\n"),
    ("17 digits that wrap to 5", "10000000000000005\r\nhello\r\n"),
    ("LF alone behind the size", "5\nhello\r\n"),
    ("LF alone in an extension", "5;a\nhello\r\n"),
    ("CR alone behind the size", "5\rhello\r\n"),
    ("no line end behind the data", "5\r\nhello0\r\n\r\n"),
    ("LF alone behind the data", "5\r\nhello\n0\r\n\r\n"),
    ("LF alone at the end", "0\r\n\n"),
    ("LF alone in the trailers", "0\r\nA: b\n\r\n"),
];

#[test]
fn a_malformed_chunk_ends_both_connections_and_nothing_behind_it_is_a_request() {
    let rig = Rig::web([Upstream::start(|call| {
        if call.is("GET") {
            let path = call.path().to_owned();
            return call.answer(&path);
        }
        assert!(call.body().is_err(), "the body {} came to a good end", call.path());
        Then::Close
    })]);
    for (number, (what, bytes)) in BAD_CHUNKS.iter().enumerate() {
        let mut client = rig.origin();
        client
            .send(format!("POST /{number} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"))
            .unwrap();
        eventually("the node has the head", || {
            rig.web[0].calls().iter().any(|call| call.head.starts_with(&format!("POST /{number} "))).then_some(())
        });
        client.send(format!("{bytes}{}", get_request("/smuggled"))).unwrap();
        let answer = client.answer(false).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(answer.status, 400, "{what}: {answer:?}");
        assert_eq!(client.rest(), (Vec::new(), Ending::Clean), "{what}");
        assert_eq!(get(rig.clearcoat.origin, "/next").unwrap().text(), "/next", "{what}");
    }
    let (_, calls) = rig.web[0].all_traffic();
    for (at, call) in calls.iter().enumerate().filter(|(_, call)| call.head.starts_with("POST")) {
        let behind: Vec<_> = calls[at + 1..].iter().filter(|later| later.connection == call.connection).collect();
        assert!(behind.is_empty(), "a connection was used again after half a body: {behind:?}");
    }
    let gets = calls.iter().filter(|call| call.head.starts_with("GET"));
    assert!(gets.clone().all(|call| call.head.starts_with("GET /next ")), "{calls:?}");
    rig.becomes_idle();
}

#[test]
fn a_malformed_chunk_that_comes_with_the_head_reaches_no_node() {
    let rig = Rig::web([Upstream::echo()]);
    for (what, bytes) in BAD_CHUNKS {
        let mut client = rig.origin();
        let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        client.send(format!("{head}{bytes}{}", get_request("/smuggled"))).unwrap();
        let answer = client.answer(false).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(answer.status, 400, "{what}: {answer:?}");
        assert_eq!(client.rest(), (Vec::new(), Ending::Clean), "{what}");
    }
    let (bytes, calls) = rig.web[0].all_traffic();
    assert_eq!((bytes, calls), (0, Vec::new()));
}
