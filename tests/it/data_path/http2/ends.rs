//! Requests that end badly on either side, and the end of the process.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use h2::Reason;

use crate::data_path::http2::MIB;
use crate::data_path::rig::at_rest;
use crate::data_path::tls::{CUT_PATHS, Secure, body_of, breaks_off};
use crate::support::eventually;
use crate::support::frames::{
    DATA, END_STREAM, Frames, GOAWAY, HEADERS, PING, WINDOW_UPDATE, frame, get_frame, request_fields,
};
use crate::support::http2::{Begun, Broken, Http2, Stream, request};
use crate::support::upstream::{Gate, Then, Upstream};

/// Reads bodies, and counts completed and cut ones. None may be completed.
struct Uploads {
    received: Arc<AtomicU64>,
    cut: Arc<AtomicU64>,
}

impl Uploads {
    fn node() -> (Self, Upstream) {
        let this = Uploads { received: Arc::default(), cut: Arc::default() };
        let (received, cut) = (Arc::clone(&this.received), Arc::clone(&this.cut));
        let node = Upstream::start(move |call| {
            if call.is("GET") {
                return call.answer("read");
            }
            let body = call.each_piece(|piece| _ = received.fetch_add(piece.len() as u64, Ordering::SeqCst));
            assert!(body.is_err(), "half a body came to a good end");
            cut.fetch_add(1, Ordering::SeqCst);
            Then::Close
        });
        (this, node)
    }

    fn cut(&self) -> u64 {
        self.cut.load(Ordering::SeqCst)
    }
}

fn upload(client: &Http2, length: Option<usize>) -> Stream {
    let mut upload = request("POST", "/");
    if let Some(length) = length {
        upload = upload.header("content-length", length);
    }
    client.ask(upload.body(()).unwrap(), false)
}

#[test]
fn an_aborted_upload_never_looks_complete_to_the_node() {
    let (uploads, node) = Uploads::node();
    let secure = Secure::start("", "", vec![node]);
    let client = Http2::open(secure.address());
    let mut given_up = 0;
    for reason in [Reason::CANCEL, Reason::NO_ERROR, Reason::INTERNAL_ERROR] {
        for length in [Some(1000), None] {
            uploads.received.store(0, Ordering::SeqCst);
            let mut stream = upload(&client, length);
            stream.send(b"hello", false).unwrap();
            let has_half = || (uploads.received.load(Ordering::SeqCst) == 5).then_some(());
            eventually("the node has half the body", has_half);
            stream.reset(reason);
            given_up += 1;
            eventually("the node sees a cut", || (uploads.cut() == given_up).then_some(()));
        }
    }
    // The same if the connection ends.
    for length in [Some(1000), None] {
        let client = Http2::open(secure.address());
        let mut stream = upload(&client, length);
        stream.send(b"hello", false).unwrap();
        eventually("the node has the request", || (secure.rig.inflight() == 1.0).then_some(()));
        client.cut();
        given_up += 1;
        eventually("the node sees a cut", || (uploads.cut() == given_up).then_some(()));
    }
    assert_eq!(client.get("/").unwrap().text(), "read");
    secure.rig.becomes_idle();
}

#[test]
fn a_body_beyond_the_limit_is_answered_413_and_no_node_sees_its_end() {
    let (uploads, node) = Uploads::node();
    let secure = Secure::start("", "[limits]\nmax_body = 100000", vec![node]);
    let client = Http2::open(secure.address());
    let answer =
        client.exchange(request("POST", "/").header("content-length", 100_001).body(()).unwrap(), &[b'x'; 100_001]);
    assert_eq!(answer.unwrap().status, 413);
    assert_eq!(secure.rig.varnish[0].calls().len(), 0, "an announced length is refused before a node has the request");
    let answer = client.exchange(request("POST", "/").body(()).unwrap(), &body_of(MIB));
    assert_eq!(answer.unwrap().status, 413);
    eventually("the node sees a cut", || (uploads.cut() == 1).then_some(()));
    assert!(uploads.received.load(Ordering::SeqCst) <= 100_000);
    assert_eq!(client.get("/").unwrap().text(), "read");
}

#[test]
fn an_answer_before_the_end_of_the_body_is_passed_on_whole() {
    let secure = Secure::start(
        "",
        "",
        vec![Upstream::start(|call| {
            let (head, body) = ("HTTP/1.1 413 Content Too Large\r\nContent-Length: 7\r\n", "too big");
            call.send_then(format!("{head}Connection: close\r\n\r\n{body}"), Then::Linger)
        })],
    );
    let client = Http2::open(secure.address());
    for length in [Some(10 * MIB), None] {
        let mut stream = upload(&client, length);
        stream.send(b"start", false).unwrap();
        let mut head = stream.head().unwrap();
        assert_eq!(head.head.status(), 413);
        assert_eq!(head.piece(true).unwrap().unwrap(), "too big");
        // RFC 9113 section 8.1: with NO_ERROR, so that the client keeps the answer.
        assert_eq!(stream.was_reset(), Reason::NO_ERROR, "{length:?}");
    }
}

#[test]
fn a_cut_answer_resets_its_stream_and_no_other() {
    let secure = Secure::start("", "", vec![breaks_off()]);
    let client = Http2::open(secure.address());
    for path in CUT_PATHS {
        let mut stream = client.ask(request("GET", path).body(()).unwrap(), true);
        // A reset may overtake the data before it.
        let cut = stream.head().and_then(Begun::rest);
        assert!(matches!(cut, Err(Broken::Reset(_))), "{path}: a cut answer looks complete");
        assert_eq!(client.get("/").unwrap().text(), "whole", "{path}");
    }
}

#[test]
fn a_request_ends_with_its_client_before_and_during_its_answer() {
    let never = Gate::default();
    let secure = Secure::start(
        "",
        "",
        vec![Upstream::start(move |call| {
            let begun = match call.path() {
                "/late" => Ok(()),
                "/length" => call.send("HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nhello"),
                "/chunked" => call.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"),
                _ => return call.answer("well"),
            };
            // The node notices the end of its connection only on its next read or write: it counts that clearcoat has
            // closed it.
            if begun.is_ok() {
                _ = call.exactly(1, |_| ());
            }
            call.wait(&never);
            Then::Close
        })],
    );
    let node = &secure.rig.varnish[0];
    for path in ["/late", "/length", "/chunked"] {
        for whole_connection in [false, true] {
            let client = Http2::open(secure.address());
            let mut stream = client.ask(request("GET", path).body(()).unwrap(), true);
            let begun = (path != "/late").then(|| {
                let mut begun = stream.head().unwrap();
                assert_eq!(begun.piece(true).unwrap().unwrap(), "hello");
                begun
            });
            eventually("the node has the request", || (secure.rig.inflight() == 1.0).then_some(()));
            let began = Instant::now();
            if whole_connection {
                client.cut();
            } else {
                stream.reset(Reason::CANCEL);
            }
            secure.rig.becomes_idle();
            eventually("the node's connection ends", || (node.established() == 0).then_some(()));
            let waited = began.elapsed();
            assert!(waited < Duration::from_secs(20), "{path}: {waited:?} after its client had gone");
            drop(begun);
            if !whole_connection {
                assert_eq!(client.get("/").unwrap().text(), "well");
            }
        }
    }
}

#[test]
fn an_upload_that_is_held_up_dies_with_its_client_too() {
    let never = Gate::default();
    let secure = Secure::start(
        "",
        "",
        vec![Upstream::start(move |call| {
            socket2::SockRef::from(call.stream()).set_recv_buffer_size(4096).expect("a socket option");
            call.wait(&never);
            Then::Close
        })],
    );
    let sent = AtomicU64::new(0);
    let client = Http2::open(secure.address());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = upload(&client, None);
            while stream.send(&[b'x'; 16_000], false).is_ok() {
                sent.fetch_add(16_000, Ordering::SeqCst);
            }
        });
        at_rest("the client", || sent.load(Ordering::SeqCst));
        assert_eq!(secure.rig.inflight(), 1.0);
        let began = Instant::now();
        client.cut();
        secure.rig.becomes_idle();
        assert!(began.elapsed() < Duration::from_secs(15), "{:?} after its client had gone", began.elapsed());
    });
}

#[test]
fn failures_are_answered_with_their_status_and_the_connection_goes_on() {
    let secure = Secure::start(
        "",
        "",
        vec![Upstream::start(|call| match call.path() {
            "/closes" => Then::Close,
            "/garbage" => call.send_then("SSH-2.0-OpenSSH\r\n\r\n", Then::Close),
            "/two-lengths" => {
                call.send_then("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", Then::Close)
            }
            "/503" => call.send_then("HTTP/1.1 503 No\r\nContent-Length: 4\r\n\r\nbusy", Then::KeepAlive),
            "/504" => call.send_then("HTTP/1.1 504 No\r\nContent-Length: 4\r\n\r\nlate", Then::KeepAlive),
            _ => call.answer("well"),
        })],
    );
    let client = Http2::open(secure.address());
    for (path, status) in
        [("/closes", 502), ("/garbage", 502), ("/two-lengths", 502), ("/503", 503), ("/504", 504), ("/", 200)]
    {
        let answer = client.get(path).unwrap();
        assert_eq!(answer.status, status, "{path}");
        assert_eq!(answer.header("content-length"), Some(&*answer.body.len().to_string()), "{path}");
        let answer = client.ask(request("HEAD", path).body(()).unwrap(), true).answer();
        // The fake writes bodies to HEAD as well; those after the head do not matter here.
        if status == 502 {
            let answer = answer.unwrap();
            assert_eq!((answer.status, answer.text()), (502, ""), "{path}");
        }
    }
    let nobody = Secure::start("", "", Vec::new());
    let answer = Http2::open(nobody.address()).get("/").unwrap();
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
}

#[test]
fn sigterm_says_goaway_lets_streams_finish_and_ends_connections_at_rest() {
    let rest = Gate::default();
    let mut secure = Secure::start(
        "",
        "",
        vec![Upstream::start({
            let rest = rest.clone();
            move |call| match call.path() {
                "/late" => {
                    if call.wait(&rest) {
                        call.answer("late")
                    } else {
                        Then::Close
                    }
                }
                "/long" => {
                    let begun = call.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 2 * MIB)).is_ok()
                        && call.send(&body_of(2 * MIB)[..MIB]).is_ok();
                    if begun && call.wait(&rest) {
                        call.send_then(&body_of(2 * MIB)[MIB..], Then::KeepAlive)
                    } else {
                        Then::Close
                    }
                }
                _ => match call.body() {
                    Ok(body) => call.answer(&format!("{} bytes", body.len())),
                    Err(_) => Then::Close,
                },
            }
        })],
    );
    let address = secure.address();
    let (silent, idle, busy) = (Http2::open(address), Http2::open(address), Http2::open(address));
    assert_eq!(idle.get("/").unwrap().text(), "0 bytes");
    let late = busy.ask(request("GET", "/late").body(()).unwrap(), true);
    let mut long = busy.ask(request("GET", "/long").body(()).unwrap(), true);
    let long = long.head().unwrap();
    let mut sending = upload(&busy, None);
    sending.send(&body_of(MIB), false).unwrap();
    eventually("all requests are at the node", || (secure.rig.inflight() == 3.0).then_some(()));
    let mut frames = Frames::open(address, &[]);
    assert!(frames.answers_ping(1));

    secure.rig.clearcoat.terminate();
    let ended = [silent.ended(), idle.ended()];
    assert!(ended.iter().all(Result::is_ok), "connections at rest: {ended:?}");
    let goaway = frames.wait_for("GOAWAY", |frame| frame.kind == GOAWAY).unwrap();
    assert_eq!(goaway.reason(), 0, "{goaway:?}");
    // A client that answers the PING has read everything; the end may follow at once.
    let ping = frames.wait_for("PING", |frame| frame.kind == PING && frame.flags == 0).unwrap();
    frames.send(frame(PING, 1, 0, ping.payload));
    assert_eq!(frames.ended("the connection ends"), Some(0));
    eventually("new connections are refused", || TcpStream::connect(address).is_err().then_some(()));
    assert!(
        busy.try_ask(request("GET", "/new").body(()).unwrap(), true).is_err(),
        "a new stream on a connection that goes"
    );
    rest.open();
    assert_eq!(late.answer().unwrap().text(), "late");
    assert!(long.rest().unwrap() == body_of(2 * MIB), "the download is not whole");
    sending.send(b"end", true).unwrap();
    assert_eq!(sending.answer().unwrap().text(), format!("{} bytes", MIB + 3));
    let ended = busy.ended();
    assert!(ended.is_ok(), "{ended:?}");
    let status = secure.rig.clearcoat.wait();
    assert!(status.success(), "{status}");
}

#[test]
fn sigterm_cuts_no_answer_of_a_client_that_speaks_while_it_reads() {
    const SIZE: usize = MIB;
    let (late, sent) = (Gate::default(), Gate::default());
    let mut secure = Secure::start(
        "",
        "",
        vec![Upstream::start({
            let (late, sent) = (late.clone(), sent.clone());
            move |call| {
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n");
                if !call.wait(&late) || call.send([head.into_bytes(), body_of(SIZE)].concat()).is_err() {
                    return Then::Close;
                }
                sent.open();
                Then::KeepAlive
            }
        })],
    );
    // A window for the whole answer (SETTINGS_INITIAL_WINDOW_SIZE, and the connection's own).
    let room = u32::try_from(2 * SIZE).unwrap();
    let mut frames = Frames::open(secure.address(), &[(4, room)]);
    assert!(frames.send([frame(WINDOW_UPDATE, 0, 0, room.to_be_bytes()), get_frame(1, "/late")].concat()));
    eventually("the node has the request", || (secure.rig.inflight() == 1.0).then_some(()));
    secure.rig.clearcoat.terminate();
    let ping = frames.wait_for("it asks who is there", |frame| frame.kind == PING && frame.flags == 0).unwrap();
    assert!(frames.send(frame(PING, 1, 0, ping.payload)));
    late.open();
    sent.wait("the answer is on its way");
    // It reads nothing for a second, but keeps sending window updates.
    for _ in 0..100 {
        frames.send_blindly(&frame(WINDOW_UPDATE, 0, 0, 1_u32.to_be_bytes()), Duration::from_secs(1));
        std::thread::sleep(Duration::from_millis(10));
    }
    let whole = frames.wait_for("the answer is through", |frame| frame.kind == DATA && frame.flags & END_STREAM != 0);
    let body: Vec<u8> =
        frames.received.iter().filter(|frame| frame.kind == DATA).flat_map(|frame| frame.payload.clone()).collect();
    assert!(whole.is_some() && body == body_of(SIZE), "{} bytes of {SIZE} came", body.len());
    assert_eq!(frames.ended("the connection ends"), Some(0));
    assert!(secure.rig.clearcoat.wait().success());
}

#[test]
fn an_unfinished_head_delays_the_shutdown_only_up_to_its_timeout() {
    let mut secure = Secure::start("", "", vec![Upstream::echo()]);
    let mut frames = Frames::open(secure.address(), &[]);
    assert!(frames.answers_ping(1));
    // The first frame of a header block, and no continuation.
    let half = frame(HEADERS, 0, 1, &request_fields("GET", "/")[..20]);
    assert!(frames.send(half));
    assert_eq!(Http2::open(secure.address()).get("/meanwhile").unwrap().text(), "/meanwhile");
    let began = Instant::now();
    secure.rig.clearcoat.terminate();
    let status = secure.rig.clearcoat.wait();
    assert!(status.success(), "{status}");
    // One second to leave, eight to drain, and a tolerance for a busy machine.
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    let (_, calls) = secure.rig.varnish[0].all_traffic();
    assert_eq!(calls.len(), 1, "{calls:?}");
}
