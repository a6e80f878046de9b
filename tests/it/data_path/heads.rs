//! The exact bytes of a request that the node behind clearcoat receives.

use std::net::SocketAddr;

use crate::data_path::rig::Rig;
use crate::support::client::Connection;
use crate::support::upstream::Upstream;

/// Sends a request from this address and returns the head that the node got.
fn forwarded(source: [u8; 4], listener: SocketAddr, node: &Upstream, request: &str) -> String {
    let before = node.calls().len();
    let mut client = Connection::open_from(source, listener).expect("clearcoat accepts");
    client.send(request).expect("clearcoat reads");
    let answer = client.answer(false).expect("an answer");
    assert_eq!(answer.status, 200, "{answer:?}");
    let calls = node.calls();
    assert_eq!(calls.len(), before + 1);
    calls[before].head.clone()
}

/// Everything that a proxy must not forward unchanged.
const FORGED: &str = "GET /p?q=1 HTTP/1.1\r\n\
    accept: */*\r\n\
    X-Forwarded-For: 1.1.1.1\r\n\
    Host: Shop.test:8080\r\n\
    x-forwarded-for: 2.2.2.2, 3.3.3.3\r\n\
    X-Forwarded-Proto: https\r\n\
    X-Forwarded-Host: evil.test\r\n\
    X_Forwarded_For: 4.4.4.4\r\n\
    X-Forwarded_Proto: https\r\n\
    Connection: X-Secret, keep-alive\r\n\
    X-Secret: s\r\n\
    connection: ,x-other,, host, content-length, x-forwarded-for\r\n\
    X-Other: o\r\n\
    Keep-Alive: timeout=5\r\n\
    Proxy-Connection: keep-alive\r\n\
    Proxy-Authorization: Basic eA==\r\n\
    Upgrade: websocket\r\n\
    HTTP2-Settings: AAMAAABk\r\n\
    TE: trailers\r\n\
    Trailer: X-T\r\n\
    Via: 1.0 before\r\n\
    Cookie:   a=b;  c \t\r\n\
    X-Empty:\r\n\
    X-Twice: 1\r\n\
    X-Twice: 2\r\n\
    X-Bytes: \u{e4}\r\n\r\n";

/// The fields that pass through unchanged, in their order.
const KEPT: &str = "Via: 1.0 before\r\nCookie: a=b;  c\r\nX-Empty: \r\nX-Twice: 1\r\nX-Twice: 2\r\n";

/// A fake records bytes as characters, one for each byte.
const BYTES: &str = "X-Bytes: \u{c3}\u{a4}\r\n";

#[test]
fn a_strangers_request_goes_on_without_what_is_not_his_to_say() {
    let rig = Rig::start("", vec![Upstream::echo()], vec![Upstream::echo()]);
    assert_eq!(
        forwarded([127, 0, 0, 1], rig.clearcoat.edge, &rig.varnish[0], FORGED),
        format!(
            "GET /p?q=1 HTTP/1.1\r\nHost: Shop.test:8080\r\naccept: */*\r\n{KEPT}{BYTES}X-Forwarded-For: 127.0.0.1\r\n\
             X-Forwarded-Proto: http\r\nX-Forwarded-Host: Shop.test:8080\r\nVia: 1.1 clearcoat\r\n\r\n"
        )
    );
    // The same at the origin, from an address that is not a Varnish's.
    assert_eq!(
        forwarded([127, 0, 0, 9], rig.clearcoat.origin, &rig.web[0], FORGED),
        format!(
            "GET /p?q=1 HTTP/1.1\r\nHost: Shop.test:8080\r\naccept: */*\r\n{KEPT}{BYTES}X-Forwarded-For: 127.0.0.9\r\n\
             X-Forwarded-Proto: http\r\nX-Forwarded-Host: Shop.test:8080\r\nVia: 1.1 clearcoat\r\n\r\n"
        )
    );
}

#[test]
fn who_is_trusted_is_believed_and_continued() {
    let edge = "[edge]\nlisten = [\"127.0.0.1:0\"]\ntrusted_proxies = [\"127.0.0.8/32\"]";
    let rig = Rig::start(edge, vec![Upstream::echo()], vec![Upstream::echo()]);
    let believed = |source: &str| {
        format!(
            "GET /p?q=1 HTTP/1.1\r\nHost: Shop.test:8080\r\naccept: */*\r\nX-Forwarded-Proto: https\r\n\
             X-Forwarded-Host: evil.test\r\n{KEPT}{BYTES}X-Forwarded-For: 1.1.1.1, 2.2.2.2, 3.3.3.3, {source}\r\n\
             Via: 1.1 clearcoat\r\n\r\n"
        )
    };
    let node = &rig.varnish[0];
    assert_eq!(forwarded([127, 0, 0, 8], rig.clearcoat.edge, node, FORGED), believed("127.0.0.8"));
    // The origin trusts the addresses of registered Varnish nodes, not the edge's proxies.
    let node = &rig.web[0];
    assert_eq!(forwarded([127, 0, 0, 1], rig.clearcoat.origin, node, FORGED), believed("127.0.0.1"));
    let head = forwarded([127, 0, 0, 8], rig.clearcoat.origin, node, FORGED);
    assert!(head.contains("\r\nX-Forwarded-For: 127.0.0.8\r\n"), "{head}");
    // Fields that a trusted peer leaves out are filled in by clearcoat.
    let plain = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    assert_eq!(
        forwarded([127, 0, 0, 8], rig.clearcoat.edge, &rig.varnish[0], plain),
        "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 127.0.0.8\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Host: a\r\n\
         Via: 1.1 clearcoat\r\n\r\n"
    );
}

#[test]
fn every_form_of_a_request_goes_on_in_one() {
    let rig = Rig::web([Upstream::echo()]);
    let node = &rig.web[0];
    let tail = |host: &str, version: &str| {
        format!(
            "X-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Host: {host}\r\n\
             Via: {version} clearcoat\r\n"
        )
    };
    let a = tail("a", "1.1");
    let address = node.address.to_string();
    let cases = [
        ("GET http://a/p?q HTTP/1.1\r\nHost: a\r\n\r\n", format!("GET /p?q HTTP/1.1\r\nHost: a\r\n{a}\r\n")),
        ("GET http://a HTTP/1.1\r\nHost: a\r\n\r\n", format!("GET / HTTP/1.1\r\nHost: a\r\n{a}\r\n")),
        ("GET http://a?q HTTP/1.1\r\nHost: a:80\r\n\r\n", format!("GET /?q HTTP/1.1\r\nHost: a\r\n{a}\r\n")),
        ("GET http://a:80/p HTTP/1.1\r\nHost: a\r\n\r\n", format!("GET /p HTTP/1.1\r\nHost: a\r\n{a}\r\n")),
        ("GET https://a:443 HTTP/1.1\r\nHost: a\r\n\r\n", format!("GET / HTTP/1.1\r\nHost: a\r\n{a}\r\n")),
        ("GET http://a HTTP/1.0\r\n\r\n", format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", tail("a", "1.0"))),
        ("OPTIONS http://a HTTP/1.1\r\nHost: a\r\n\r\n", format!("OPTIONS * HTTP/1.1\r\nHost: a\r\n{a}\r\n")),
        ("OPTIONS http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", format!("OPTIONS / HTTP/1.1\r\nHost: a\r\n{a}\r\n")),
        ("GET HTTP://A/p HTTP/1.1\r\nHost: a\r\n\r\n", format!("GET /p HTTP/1.1\r\nHost: a\r\n{a}\r\n")),
        ("GET http://a/ HTTP/1.0\r\n\r\n", format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", tail("a", "1.0"))),
        ("GET / HTTP/1.0\r\nHost: a\r\n\r\n", format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", tail("a", "1.0"))),
        ("GET / HTTP/1.0\r\n\r\n", format!("GET / HTTP/1.1\r\nHost: {address}\r\n{}\r\n", tail(&address, "1.0"))),
        ("\r\nGET //b/../%2e HTTP/1.1\r\nHost: a\r\n\r\n", format!("GET //b/../%2e HTTP/1.1\r\nHost: a\r\n{a}\r\n")),
        ("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", format!("OPTIONS * HTTP/1.1\r\nHost: a\r\n{a}\r\n")),
        (
            "brew /pot HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
            format!("brew /pot HTTP/1.1\r\nHost: [::1]:80\r\n{}\r\n", tail("[::1]:80", "1.1")),
        ),
        (
            "POST / HTTP/1.1\r\nContent-Length: 005\r\nHost: a\r\nExpect: x\r\n\r\nhello",
            format!("POST / HTTP/1.1\r\nHost: a\r\nExpect: x\r\n{a}Content-Length: 5\r\n\r\n"),
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: CHUNKED\r\n\r\n5;x=y\r\nhello\r\n0\r\nT: t\r\n\r\n",
            format!("POST / HTTP/1.1\r\nHost: a\r\n{a}Transfer-Encoding: chunked\r\n\r\n"),
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
            format!("POST / HTTP/1.1\r\nHost: a\r\n{a}Content-Length: 0\r\n\r\n"),
        ),
    ];
    for (request, expected) in cases {
        assert_eq!(forwarded([127, 0, 0, 1], rig.clearcoat.origin, node, request), expected, "{request:?}");
    }
}

#[test]
fn the_largest_heads_that_are_allowed_pass() {
    let rig = Rig::web([Upstream::echo()]);
    let node = &rig.web[0];
    let rest = "GET / HTTP/1.1\r\nHost: a\r\nA: \r\n\r\n".len();
    let value = "b".repeat(32 * 1024 - rest);
    let head = forwarded(
        [127, 0, 0, 1],
        rig.clearcoat.origin,
        node,
        &format!("GET / HTTP/1.1\r\nHost: a\r\nA: {value}\r\n\r\n"),
    );
    assert!(head.contains(&format!("\r\nA: {value}\r\n")), "{} bytes", head.len());
    let fields = "A: b\r\n".repeat(99);
    let head =
        forwarded([127, 0, 0, 1], rig.clearcoat.origin, node, &format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n"));
    assert_eq!(head.matches("\r\nA: b").count(), 99);
}

#[test]
fn a_head_that_comes_byte_by_byte_is_the_same_request() {
    let rig = Rig::web([Upstream::echo()]);
    let mut client = rig.origin();
    for byte in b"\r\nGET /slow HTTP/1.1\r\nHost: a\r\n\r\n" {
        client.send([*byte]).unwrap();
    }
    assert_eq!(client.answer(false).unwrap().text(), "/slow");
}
