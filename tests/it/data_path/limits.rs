//! Limits per client or node: sizes of heads and bodies here, connections and time in the modules below. And no
//! resources are held for a client that has gone.

mod connections;
pub(super) mod slow;

use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::data_path::rig::{Rig, get_request};
use crate::support::client::{Connection, Ending, get};
use crate::support::eventually;
use crate::support::upstream::{Gate, Then, Upstream};

const SMALL_HEADS: &str = "[limits]\nmax_head = 2048\nmax_answer_head = 1500\nmax_fields = 16";

/// A head of this length with this start.
fn head_of(length: usize, start: &str) -> String {
    let start = format!("{start}\r\nX-Padding: ");
    format!("{start}{}\r\n\r\n", "x".repeat(length - start.len() - 4))
}

#[test]
fn a_requests_head_is_limited_exactly_in_bytes_and_fields() {
    let rig = Rig::start(SMALL_HEADS, vec![Upstream::echo()], vec![Upstream::echo()]);
    let fields = |count: usize| format!("GET /fields HTTP/1.1\r\nHost: a\r\n{}\r\n", "A: b\r\n".repeat(count - 1));
    for (address, node) in [(rig.clearcoat.edge, &rig.varnish[0]), (rig.clearcoat.origin, &rig.web[0])] {
        let start = "GET /bytes HTTP/1.1\r\nHost: a";
        let unfinished = head_of(2049 + 4, start)[..2049].to_owned();
        for (what, wire, status) in [
            ("the longest head", head_of(2048, start), 200),
            ("a byte more", head_of(2049, start), 431),
            ("a byte more, and no end yet", unfinished, 431),
            ("as many fields", fields(16), 200),
            ("a field more", fields(17), 431),
        ] {
            for step in [wire.len(), 1] {
                let mut client = Connection::open(address).unwrap();
                for piece in wire.as_bytes().chunks(step) {
                    client.send(piece).unwrap_or_else(|error| panic!("{what}: {error}"));
                }
                let answer = client.answer(false).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(answer.status, status, "{what}: {answer:?}");
                if status == 431 {
                    assert_eq!(client.rest(), (Vec::new(), Ending::Clean), "{what}");
                }
            }
        }
        let (bytes, calls) = node.all_traffic();
        let heads: usize = calls.iter().map(|call| call.head.len()).sum();
        assert_eq!((calls.len(), bytes), (4, heads as u64), "{calls:?}");
    }
}

#[test]
fn an_answers_head_is_limited_exactly_and_the_node_blamed_for_more() {
    let fields = |count: usize| format!("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n{}\r\n", "A: b\r\n".repeat(count - 1));
    let start = "HTTP/1.1 200 OK\r\nContent-Length: 0";
    let interim = format!("HTTP/1.1 103 Early Hints\r\n{}\r\n", "A: b\r\n".repeat(17));
    let interim = format!("{interim}HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    for (what, answer, status) in [
        ("the longest head", head_of(1500, start), 200),
        ("a byte more", head_of(1501, start), 502),
        ("a byte more, and no end yet", head_of(1501 + 4, start)[..1501].to_owned(), 502),
        ("as many fields", fields(16), 200),
        ("a field more", fields(17), 502),
        ("a field more in an interim head", interim, 502),
    ] {
        for step in [answer.len(), 1] {
            let bytes = answer.clone().into_bytes();
            let node = Upstream::start(move |call| {
                let sent = bytes.chunks(step).try_for_each(|piece| call.send(piece));
                if sent.is_ok() { Then::Linger } else { Then::Close }
            });
            let rig = Rig::start(SMALL_HEADS, Vec::new(), vec![node]);
            assert_eq!(get(rig.clearcoat.origin, "/").unwrap().status, status, "{what}");
            rig.becomes_idle();
            let blamed = || rig.clearcoat.log().has("node failed a request");
            if status == 502 {
                eventually("the node is blamed", || blamed().then_some(()));
            } else {
                assert!(!blamed(), "{what}");
            }
        }
    }
}

/// A node that answers with the length of the body, and counts cut bodies.
fn measuring(cut: &Arc<AtomicUsize>) -> Upstream {
    let cut = Arc::clone(cut);
    Upstream::start(move |call| match call.body() {
        Ok(body) => call.answer(&body.len().to_string()),
        Err(_) => {
            cut.fetch_add(1, Ordering::SeqCst);
            Then::Close
        }
    })
}

#[test]
fn a_body_that_is_announced_too_long_reaches_no_node() {
    let cut = Arc::default();
    let limits = "[limits]\nmax_body = 1000";
    let rig = Rig::start(limits, vec![measuring(&cut)], vec![measuring(&cut)]);
    for (address, node) in [(rig.clearcoat.edge, &rig.varnish[0]), (rig.clearcoat.origin, &rig.web[0])] {
        let post = |fields: &str, length: usize, sent: usize| {
            let head = format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}Content-Length: {length}\r\n\r\n");
            let mut client = Connection::open(address).unwrap();
            client.send(format!("{head}{}", "x".repeat(sent))).unwrap();
            client.answer(false).unwrap_or_else(|error| panic!("{length}, {sent} sent: {error}"))
        };
        assert_eq!(post("", 1000, 1000).text(), "1000");
        // Refused without waiting for it, even if all of it arrives at once.
        for (length, sent) in [(1001, 0), (1001, 1001), (usize::MAX, 5), (5 << 20, 5 << 20)] {
            assert_eq!(post("", length, sent).status, 413, "{length}, {sent} sent");
        }
        assert_eq!(post("Expect: 100-continue\r\n", 1001, 0).status, 413);
        let (_, calls) = node.all_traffic();
        assert_eq!(calls.len(), 1, "{calls:?}");
    }
    assert_eq!(cut.load(Ordering::SeqCst), 0);
}

#[test]
fn a_body_that_proves_too_long_is_cut_upstream_and_answered_413() {
    let cut = Arc::default();
    let rig = Rig::start("[limits]\nmax_body = 1000", Vec::new(), vec![measuring(&cut)]);
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let hundred = format!("64;extensions=do-not-count\r\n{}\r\n", "x".repeat(100));
    let full = format!("{head}{}0\r\n\r\n", hundred.repeat(10));
    let mut client = rig.origin();
    for _ in 0..2 {
        client.send(&full).unwrap();
        assert_eq!(client.answer(false).unwrap().text(), "1000");
    }
    let before = rig.web[0].calls().len();
    // One byte too many, together with the head: nothing is sent to the node.
    client.send(format!("{head}{}1\r\nx\r\n0\r\n\r\n{}", hundred.repeat(10), get_request("/behind"))).unwrap();
    assert_eq!(client.answer(false).unwrap().status, 413);
    assert_eq!(client.rest(), (Vec::new(), Ending::Clean));
    assert_eq!((rig.web[0].calls().len(), cut.load(Ordering::SeqCst)), (before, 0));

    // The same after the node has the beginning.
    for (number, more) in ["1\r\nx\r\n0\r\n\r\n", "fffffff\r\nx"].into_iter().enumerate() {
        let mut client = rig.origin();
        client.send(head).unwrap();
        eventually("the node has the head", || (rig.web[0].calls().len() == before + number + 1).then_some(()));
        client.send(format!("{}{more}{}", hundred.repeat(10), get_request("/behind"))).unwrap();
        let answer = client.answer(false).unwrap();
        assert_eq!((answer.status, answer.header("Connection")), (413, Some("close")), "{answer:?}");
        assert_eq!(client.rest(), (Vec::new(), Ending::Clean));
        eventually("the node sees a cut", || (cut.load(Ordering::SeqCst) == number + 1).then_some(()));
    }
    assert!(rig.web[0].calls().iter().all(|call| !call.head.contains("/behind")));
    assert_not_blamed(&rig, "the body of the request is longer than it may be");
    rig.becomes_idle();
}

/// Checks that the failure was logged without blaming a node, which would have been logged before.
pub(super) fn assert_not_blamed(rig: &Rig, failure: &str) {
    eventually("the failure is logged", || rig.clearcoat.log().has(failure).then_some(()));
    assert!(!rig.clearcoat.log().has("node failed a request"), "a node is blamed");
}

#[test]
fn trailers_are_read_over_in_both_directions() {
    let trailers = "X-Checksum: 1a2b\r\nHost: b\r\nServer-Timing: db;dur=5\r\nX-Magento-Tags: cat_p_1\r\n";
    let rig = Rig::web([Upstream::start(move |call| {
        assert_eq!(call.body().expect("a body"), b"hello");
        assert!(call.trailers.is_empty(), "{:?}", call.trailers);
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n";
        call.send_then(format!("{chunked}{trailers}\r\n"), Then::KeepAlive)
    })]);
    let wire =
        format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n{trailers}\r\n");
    for step in [wire.len(), 1, 17] {
        let mut client = rig.origin();
        for _ in 0..2 {
            wire.as_bytes().chunks(step).for_each(|piece| client.send(piece).unwrap());
            let answer = client.answer(false).unwrap();
            assert_eq!((answer.text(), answer.trailers.as_str()), ("ok", ""), "steps of {step}");
        }
    }
}

#[test]
fn trailers_that_are_malformed_or_too_many_end_the_message_in_failure() {
    let many = "A: b\r\n".repeat(33);
    let long = format!("A: {}\r\n", "b".repeat(17 * 1024));
    for bad in ["A : b\r\n", "A\r\n", ": b\r\n", "A: b\r\n folded\r\n", "A: b\0\r\n", &many, &long] {
        let body = format!("5\r\nhello\r\n0\r\n{bad}\r\n");
        let answer = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
        let rig = Rig::web([Upstream::start(move |call| {
            if call.is("POST") {
                assert!(call.body().is_err(), "the body came to a good end");
                return Then::Close;
            }
            call.send_then(&answer, Then::KeepAlive)
        })]);
        let mut client = rig.origin();
        client.send(get_request("/")).unwrap();
        // A cut, or an answer of our own if nothing of the node's has been sent yet.
        let (bytes, ending) = client.rest();
        let is_cut = ending == Ending::Reset && !bytes.ends_with(b"0\r\n\r\n");
        let is_ours = bytes.starts_with(b"HTTP/1.1 502 ");
        assert!(is_cut || is_ours, "{bad:?}: {ending:?} {}", bytes.escape_ascii());

        let mut client = rig.origin();
        client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
        eventually("the node has the head", || (rig.web[0].calls().len() == 2).then_some(()));
        client.send(format!("{body}{}", get_request("/behind"))).unwrap();
        assert_eq!(client.answer(false).unwrap().status, 400, "{bad:?}");
        assert_eq!(client.rest(), (Vec::new(), Ending::Clean), "{bad:?}");
        rig.becomes_idle();
        assert_eq!(rig.web[0].calls().len(), 2, "{bad:?}");
    }
}

#[test]
fn a_reset_ends_the_waiting_connection_and_a_half_close_gets_its_answer() {
    let answer = Gate::default();
    let rig = Rig::web([Upstream::start({
        let answer = answer.clone();
        move |call| {
            if call.body().is_err() {
                return Then::Close;
            }
            if call.path() == "/half-closed" {
                return if call.wait(&answer) { call.answer("patience") } else { Then::Close };
            }
            let (more, _) = call.rest();
            assert!(more.is_empty(), "{}", more.escape_ascii());
            Then::Close
        }
    })]);
    let mut patient = rig.origin();
    patient.send(get_request("/half-closed")).unwrap();
    patient.stream.shutdown(Shutdown::Write).unwrap();
    let post = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello";
    for (number, request) in [get_request("/"), post.to_owned()].into_iter().enumerate() {
        let mut client = rig.origin();
        client.send(request).unwrap();
        eventually("the node has the request", || (rig.web[0].calls().len() == number + 2).then_some(()));
        socket2::SockRef::from(&client.stream).set_linger(Some(Duration::ZERO)).unwrap();
        let began = Instant::now();
        drop(client);
        eventually("the node's connection ends", || {
            (rig.inflight() == 1.0 && rig.web[0].open_connections() == 1).then_some(())
        });
        assert!(began.elapsed() < Duration::from_secs(10), "after {:?}", began.elapsed());
    }
    answer.open();
    assert_eq!(patient.answer(false).unwrap().text(), "patience");
    assert_eq!(patient.rest(), (Vec::new(), Ending::Clean));
    assert_not_blamed(&rig, "the client went away");
    assert_eq!(rig.retries("web", "no_answer"), 0.0);
    rig.becomes_idle();
}
