//! HTTP/2 at the edge: bodies and streams. Refusals are in `http2/heads.rs`, early ends in `http2/ends.rs`, and attacks
//! in `http2/abuse.rs`.

mod abuse;
mod ends;
mod heads;
mod malformed;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use rustls::version::{TLS12, TLS13};

use crate::data_path::tls::{SIZES, Secure, body_of, mirror};
use crate::support::eventually;
use crate::support::http2::{Http2, request};
use crate::support::tls::Client;
use crate::support::upstream::{Gate, Then, Upstream};

const MIB: usize = 1024 * 1024;

/// How many streams may be open at once.
const MAX_STREAMS: usize = 100;

#[test]
fn bodies_of_every_size_pass_whole_in_both_directions() {
    let secure = Secure::start("", "", vec![mirror()]);
    let client = Http2::open(secure.address());
    for size in SIZES {
        let body = body_of(size);
        for kind in ["length", "chunked", "close"] {
            let answer = client.get(&format!("/{kind}/{size}")).unwrap();
            assert!(answer.status == 200 && answer.body == body, "{kind} {size}: {} bytes", answer.body.len());
            let length = (kind == "length").then(|| size.to_string());
            assert_eq!(answer.header("content-length").map(str::to_owned), length, "{kind}");
        }
        let announced = request("POST", "/").header("content-length", size).body(()).unwrap();
        let open = request("POST", "/").body(()).unwrap();
        for (upload, framing) in [(announced, "Content-Length"), (open, "Transfer-Encoding")] {
            assert_eq!(client.exchange(upload, &body).unwrap().text(), format!("{size} whole"), "{framing}");
            let seen = secure.rig.varnish[0].calls().pop().unwrap();
            assert!(seen.header(framing).is_some(), "{framing}: {}", seen.head);
        }
    }
    let calls = secure.rig.varnish[0].calls();
    let proto = |call: &crate::support::upstream::Seen| call.header("X-Forwarded-Proto") == Some("https");
    assert!(calls.iter().all(proto), "{calls:?}");
    assert!(calls.iter().all(|call| call.header("Via") == Some("2.0 clearcoat")), "{calls:?}");
}

#[test]
fn alpn_offers_http_2_unless_it_is_switched_off() {
    for (edge, chosen, version) in [("", "h2", "2"), ("http2 = false", "http/1.1", "1.1")] {
        let secure = Secure::start(edge, "", vec![Upstream::echo()]);
        for tls in [&TLS12, &TLS13] {
            let session = Client::of(tls, &[b"h2", b"http/1.1"]).connect(secure.address(), "shop.test").unwrap();
            assert_eq!(session.tls.conn.alpn_protocol(), Some(chosen.as_bytes()), "{edge}");
        }
        let output = secure.curl(&["--http2", "--write-out", " %{http_version}"], "/page");
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("/page {version}"), "{edge}");
    }
    // A client that offers only HTTP/2 where it is disabled is refused, not answered in another protocol.
    let secure = Secure::start("http2 = false", "", vec![Upstream::echo()]);
    assert!(Client::of(&TLS13, &[b"h2"]).connect(secure.address(), "shop.test").is_err());
}

#[test]
fn streams_that_stall_delay_no_other() {
    let held = Gate::default();
    let secure = Secure::start(
        "",
        "",
        vec![Upstream::start({
            let held = held.clone();
            move |call| {
                let path = call.path().to_owned();
                match path.as_str() {
                    // A page that is slow to begin, one that stalls in the middle, and an unread upload.
                    "/late" | "/upload" if !call.wait(&held) => Then::Close,
                    "/half" => {
                        let begun = call.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {MIB}\r\n\r\n")).is_ok()
                            && call.send(&body_of(MIB)[..MIB / 2]).is_ok();
                        if begun && call.wait(&held) {
                            call.send_then(&body_of(MIB)[MIB / 2..], Then::KeepAlive)
                        } else {
                            Then::Close
                        }
                    }
                    "/large" => {
                        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {MIB}\r\n\r\n");
                        call.send_then([head.into_bytes(), body_of(MIB)].concat(), Then::KeepAlive)
                    }
                    _ => match call.body() {
                        Ok(body) if body == body_of(body.len()) => call.answer(&format!("{path} {}", body.len())),
                        _ => Then::Close,
                    },
                }
            }
        })],
    );
    let client = Http2::open(secure.address());
    let ask = |path: &str| client.ask(request("GET", path).body(()).unwrap(), true);
    let stalled: Vec<_> = ["/late", "/half", "/late", "/half"].map(ask).into();
    let mut upload = client.ask(request("POST", "/upload").header("content-length", MIB).body(()).unwrap(), false);
    upload.send(&body_of(MIB)[..MIB / 16], false).unwrap();
    // And one whose client reads only its head.
    let mut unread = ask("/large").head().unwrap();

    let began = Instant::now();
    let answered = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..100 {
                    assert_eq!(client.get("/quick").unwrap().text(), "/quick 0");
                    let body = body_of(3 * MIB / 16);
                    let sent = client.exchange(request("POST", "/sent").body(()).unwrap(), &body).unwrap();
                    assert_eq!(sent.text(), format!("/sent {}", body.len()));
                    answered.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
    });
    assert_eq!(answered.into_inner(), 400, "in {:?}", began.elapsed());

    held.open();
    for (stream, whole) in stalled.into_iter().zip([b"/late 0".to_vec(), body_of(MIB)].into_iter().cycle()) {
        assert!(stream.answer().unwrap().body == whole);
    }
    upload.send(&body_of(MIB)[MIB / 16..], true).unwrap();
    assert_eq!(upload.answer().unwrap().text(), format!("/upload {MIB}"));
    assert!(unread.piece(true).is_some_and(|piece| piece.is_ok()));
    assert!(unread.rest().is_ok());
    secure.rig.becomes_idle();
}

#[test]
fn a_hundred_streams_at_once_are_each_answered_with_their_own_page() {
    let (all, arrived) = (Gate::default(), Arc::new(AtomicU64::new(0)));
    let secure = Secure::start(
        "",
        "",
        vec![Upstream::start({
            let (all, arrived) = (all.clone(), Arc::clone(&arrived));
            move |call| {
                arrived.fetch_add(1, Ordering::SeqCst);
                let path = call.path().to_owned();
                if call.wait(&all) { call.answer(&path.repeat(2000)) } else { Then::Close }
            }
        })],
    );
    let client = Http2::open(secure.address());
    let streams: Vec<_> = (0..MAX_STREAMS)
        .map(|number| client.ask(request("GET", &format!("/{number}")).body(()).unwrap(), true))
        .collect();
    eventually("all are at the node at once", || (arrived.load(Ordering::SeqCst) == MAX_STREAMS as u64).then_some(()));
    all.open();
    for (number, stream) in streams.into_iter().enumerate() {
        assert_eq!(stream.answer().unwrap().text(), format!("/{number}").repeat(2000));
    }
    secure.rig.becomes_idle();
}
