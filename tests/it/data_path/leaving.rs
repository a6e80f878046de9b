//! Interrupted exchanges: early answers, half-closed connections, clients that disconnect.

use std::io::Write;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::data_path::rig::{Rig, get_request};
use crate::support::client::{Connection, Ending};
use crate::support::eventually;
use crate::support::upstream::{Gate, Then, Upstream};

const MIB: usize = 1024 * 1024;

const TOO_LARGE: &str = "HTTP/1.1 413 Content Too Large\r\nContent-Length: 7\r\n\r\ntoo big";

#[test]
fn an_early_answer_arrives_even_if_the_client_sends_its_body_first() {
    let answered = Gate::default();
    let rig = Rig::web([Upstream::start({
        let answered = answered.clone();
        move |call| match call.path() {
            // Reads nothing of the body, and does not close either.
            "/stops" => {
                if call.send(TOO_LARGE).is_ok() {
                    call.wait(&answered);
                }
                Then::Close
            }
            _ => call.send_then(TOO_LARGE.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n"), Then::Linger),
        }
    })]);
    for path in ["/stops", "/lingers"] {
        for framing in ["Content-Length: 20971520", "Transfer-Encoding: chunked"] {
            let what = format!("{path}, {framing}");
            let mut client = rig.origin();
            client.send(format!("POST {path} HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n")).unwrap();
            let piece = [&b"10000\r\n"[..], &[b'x'; 65_536], b"\r\n"].concat();
            let piece = if framing.starts_with('T') { &piece[..] } else { &piece[7..7 + 65_536] };
            for sent in 0..20 * MIB / 65_536 {
                let sending = client.send(piece);
                sending.unwrap_or_else(|error| panic!("{what}: {error} after {sent} of 320 pieces"));
            }
            let answer = client.answer(false).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!((answer.status, answer.text()), (413, "too big"), "{what}");
            // A node that discards the refused body may have read all of it when its answer was forwarded; then the
            // connection is fine.
            if path == "/stops" || answer.header("Connection").is_some() {
                assert_eq!(answer.header("Connection"), Some("close"), "{what}");
                assert_eq!(client.rest(), (Vec::new(), Ending::Clean), "{what}");
            }
        }
    }
    answered.open();
    let calls = rig.web[0].calls();
    let mut used: Vec<_> = calls.iter().map(|call| call.connection).collect();
    used.dedup();
    assert_eq!(used.len(), 4, "a connection was used again after half a body: {calls:?}");
    rig.becomes_idle();
}

#[test]
fn an_early_answer_is_there_while_the_client_still_holds_its_body_back() {
    let rig = Rig::web([Upstream::start(|call| call.send_then(TOO_LARGE, Then::Linger))]);
    let mut client = rig.origin();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nstart").unwrap();
    let answer = client.answer(false).unwrap();
    assert_eq!((answer.status, answer.text(), answer.header("Connection")), (413, "too big", Some("close")));
    assert_eq!(client.rest(), (Vec::new(), Ending::Clean));
}

#[test]
fn a_client_that_closes_its_side_still_gets_its_answers() {
    let half_closed = Gate::default();
    let rig = Rig::web([Upstream::start({
        let half_closed = half_closed.clone();
        move |call| {
            let Ok(body) = call.body() else { return Then::Close };
            if !call.wait(&half_closed) {
                return Then::Close;
            }
            let answer = format!("{} {}", call.path(), String::from_utf8_lossy(&body));
            call.answer(&answer)
        }
    })]);
    let requests = [
        get_request("/1"),
        "POST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello".into(),
        "POST /3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".into(),
        format!("{}{}", get_request("/4"), get_request("/5")),
    ];
    let expected: [&[&str]; 4] = [&["/1 "], &["/2 hello"], &["/3 hello"], &["/4 ", "/5 "]];
    let mut clients: Vec<_> = requests
        .iter()
        .map(|request| {
            let mut client = rig.origin();
            client.send(request).unwrap();
            client.stream.shutdown(Shutdown::Write).unwrap();
            client
        })
        .collect();
    eventually("the requests are at the node", || (rig.web[0].calls().len() == 4).then_some(()));
    half_closed.open();
    for (client, expected) in clients.iter_mut().zip(expected) {
        for text in expected {
            let answer = client.answer(false).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!((answer.status, answer.text()), (200, *text));
        }
        assert_eq!(client.rest(), (Vec::new(), Ending::Clean));
    }
    rig.becomes_idle();
}

/// Disconnects with a FIN, or with a reset.
fn leave(client: Connection, reset: bool) {
    if reset {
        socket2::SockRef::from(&client.stream).set_linger(Some(Duration::ZERO)).expect("a socket option");
    }
    drop(client);
}

#[test]
fn a_client_that_leaves_in_mid_download_ends_its_connection_to_the_node() {
    for reset in [false, true] {
        for framing in ["Content-Length: 99999999999", "Transfer-Encoding: chunked", "X: until close"] {
            let rig = Rig::web([Upstream::start(move |call| {
                if call.send(format!("HTTP/1.1 200 OK\r\n{framing}\r\n\r\n")).is_err() {
                    return Then::Close;
                }
                let chunk = [&b"1000\r\n"[..], &[b'x'; 4096], b"\r\n"].concat();
                while call.send(&chunk).is_ok() {}
                Then::Close
            })]);
            let mut client = rig.origin();
            client.send(get_request("/")).unwrap();
            assert_eq!(client.head().unwrap().status, 200);
            assert!(!client.some().is_empty());
            assert_eq!(rig.inflight(), 1.0);
            leave(client, reset);
            rig.becomes_idle();
            eventually("the node's connection ends", || (rig.web[0].open_connections() == 0).then_some(()));
        }
    }
}

#[test]
fn a_client_that_leaves_in_mid_upload_ends_its_connection_to_the_node() {
    let (received, cut) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let rig = Rig::web([Upstream::start({
        let (received, cut) = (Arc::clone(&received), Arc::clone(&cut));
        move |call| {
            let body = call.each_piece(|piece| _ = received.fetch_add(piece.len() as u64, Ordering::SeqCst));
            assert!(body.is_err(), "half a body came to a good end");
            cut.fetch_add(1, Ordering::SeqCst);
            Then::Close
        }
    })]);
    let mut gone = 0;
    for reset in [false, true] {
        for framing in ["Content-Length: 1000000", "Transfer-Encoding: chunked"] {
            // One half ends within a chunk, the other between two.
            for half in ["fffff\r\nhello", "5\r\nhello\r\n"] {
                let half = if framing.starts_with('C') { "hello" } else { half };
                received.store(0, Ordering::SeqCst);
                let mut client = rig.origin();
                client.send(format!("PUT / HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n{half}")).unwrap();
                eventually("the node has half the body", || (received.load(Ordering::SeqCst) == 5).then_some(()));
                assert_eq!(rig.inflight(), 1.0);
                leave(client, reset);
                gone += 1;
                eventually("the node sees a cut", || (cut.load(Ordering::SeqCst) == gone).then_some(()));
                rig.becomes_idle();
            }
        }
    }
    // No node is blamed, and no request is retried.
    assert_eq!(rig.web[0].calls().len() as u64, gone);
    assert_eq!(rig.retries("web", "no_answer"), 0.0);
}

#[test]
fn a_client_that_leaves_in_mid_head_reaches_no_node() {
    let rig = Rig::web([Upstream::echo()]);
    for reset in [false, true] {
        let mut client = rig.origin();
        client.stream.write_all(b"GET /half HTTP/1.1\r\nHo").unwrap();
        leave(client, reset);
    }
    let mut client = rig.origin();
    client.send(get_request("/whole")).unwrap();
    assert_eq!(client.answer(false).unwrap().text(), "/whole");
    let (_, calls) = rig.web[0].all_traffic();
    assert_eq!(calls.len(), 1, "{calls:?}");
}

#[test]
fn a_client_that_says_more_than_it_should_still_gets_the_whole_answer() {
    let rig = Rig::web([Upstream::start(|call| {
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 4 * MIB);
        call.send_then([answer.into_bytes(), vec![b'x'; 4 * MIB]].concat(), Then::KeepAlive)
    })]);
    for (version, more) in [("HTTP/1.1", "\r\n"), ("HTTP/1.1", "GET / HTTP/1.1\r\n\r\n"), ("HTTP/1.0", "\r\n")] {
        let mut client = rig.origin();
        client.send(format!("GET / {version}\r\nHost: a\r\nConnection: close\r\n\r\n")).unwrap();
        let head = client.head().unwrap();
        // Arrives while the answer is in progress, and is not read.
        client.send(more).unwrap();
        let mut length = 0;
        let body = client.body_in_pieces(&head, |piece| length += piece.len());
        body.unwrap_or_else(|error| panic!("{version}, {more:?}: {error} after {length} bytes"));
        assert_eq!(client.rest(), (Vec::new(), Ending::Clean), "{version}, {more:?}");
    }
}
