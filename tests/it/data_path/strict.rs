//! The form of a refusal, and its effect on both connections. The refused cases are in `corpus`.

use crate::data_path::rig::{Rig, get_request};
use crate::support::client::{Ending, get};
use crate::support::eventually;
use crate::support::upstream::{Then, Upstream};

#[test]
fn a_method_that_does_not_pass_is_answered_with_those_that_do() {
    let rig = Rig::start("", vec![Upstream::echo()], vec![Upstream::echo()]);
    for mut client in [rig.edge(), rig.origin()] {
        client.send("PURGE / HTTP/1.1\r\nHost: a\r\nX-Magento-Tags-Pattern: .*\r\n\r\n").unwrap();
        let answer = client.answer(false).unwrap();
        assert_eq!((answer.status, answer.header("Connection")), (405, Some("close")), "{answer:?}");
        assert_eq!(answer.header("Allow"), Some("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"));
        assert_eq!(client.rest(), (Vec::new(), Ending::Clean));
    }
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
    // The answer to a refused HEAD has no body.
    let mut client = rig.origin();
    client.send("HEAD / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(client.answer(true).unwrap().status, 400);
    assert_eq!(client.rest(), (Vec::new(), Ending::Clean));
}

/// The continuation of a chunked body.
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
fn a_malformed_chunk_ends_both_connections_and_the_rest_is_no_request() {
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
