//! Slow clients, malicious or not, and slow nodes: each has its time limit, and only the side that causes the wait is
//! cut.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::data_path::limits::assert_not_blamed;
use crate::data_path::rig::{Rig, get_request};
use crate::support::client::{Connection, Ending};
use crate::support::eventually;
use crate::support::upstream::{Call, Gate, Then, Upstream};

/// The pace of dripping clients: five bytes at a time, fifty a second.
const DRIP: [u8; 5] = *b"drip.";
const BETWEEN: Duration = Duration::from_millis(100);

/// Writes a drop repeatedly, until stopped or cut.
fn drip(stream: &mut TcpStream, piece: &[u8], goes_on: impl Fn() -> bool) {
    while goes_on() && stream.write_all(piece).is_ok() {
        // The pace of this peer, not a synchronisation.
        std::thread::sleep(BETWEEN);
    }
}

#[test]
fn a_head_has_its_time_from_its_first_byte_and_drips_do_not_extend_it() {
    let limits = "[timeouts]\nclient_header = \"1s\"";
    let rig = Rig::start(limits, vec![Upstream::echo()], vec![Upstream::echo()]);
    for (address, node) in [(rig.clearcoat.edge, &rig.varnish[0]), (rig.clearcoat.origin, &rig.web[0])] {
        let (mut silent, mut used) = (Connection::open(address).unwrap(), Connection::open(address).unwrap());
        used.send(get_request("/before")).unwrap();
        assert_eq!(used.answer(false).unwrap().text(), "/before");
        let began = Instant::now();
        let slow = ["stalled", "dripping", "dripping behind a request"].map(|what| {
            let mut client = Connection::open(address).unwrap();
            if what.ends_with("request") {
                client.send(get_request("/before")).unwrap();
                assert_eq!(client.answer(false).unwrap().text(), "/before");
            }
            client.send("GET /half HTTP/1.1\r\nHost: a\r\nX: ").unwrap();
            let mut stream = client.stream.try_clone().unwrap();
            let dripping = what != "stalled";
            let writer = std::thread::spawn(move || drip(&mut stream, b"x", || dripping));
            (what, client, writer)
        });
        for (what, mut client, writer) in slow {
            let answer = client.answer(false).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!((answer.status, answer.header("Connection")), (408, Some("close")), "{what}: {answer:?}");
            let waited = began.elapsed();
            assert!(waited > Duration::from_millis(800) && waited < Duration::from_secs(8), "{what}: {waited:?}");
            assert_ne!(client.rest().1, Ending::Open, "{what}");
            writer.join().unwrap();
        }
        // These have been idle for longer than the head timeout.
        for client in [&mut silent, &mut used] {
            client.send(get_request("/after")).unwrap();
            assert_eq!(client.answer(false).unwrap().text(), "/after");
        }
        let (_, calls) = node.all_traffic();
        assert!(calls.len() == 4 && calls.iter().all(|call| !call.head.contains("/half")), "{calls:?}");
    }
}

/// Whether the slow clients were cut, and the node's behaviour meanwhile.
struct Slowness {
    cut: Arc<AtomicBool>,
}

impl Slowness {
    /// Answers `/drips` slowly until the slow clients are cut, reads `/reads-late` only then, and answers anything else
    /// at once.
    fn node(&self) -> Upstream {
        let cut = Arc::clone(&self.cut);
        Upstream::start(move |call: &mut Call<'_>| {
            match call.path() {
                "/drips" => {
                    if call.send("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").is_err() {
                        return Then::Close;
                    }
                    let mut stream = call.stream().try_clone().unwrap();
                    drip(&mut stream, &DRIP, || !cut.load(Ordering::SeqCst));
                    return call.send_then("end", Then::Close);
                }
                "/reads-late" => {
                    while !cut.load(Ordering::SeqCst) {
                        // The pace of this node.
                        std::thread::sleep(BETWEEN);
                    }
                }
                "/endless" => {
                    let piece = [b'x'; 64 * 1024];
                    if call.send("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").is_err() {
                        return Then::Close;
                    }
                    while call.send(piece).is_ok() {}
                    return Then::Close;
                }
                _ => {}
            }
            match call.body() {
                Ok(body) => call.answer(&body.len().to_string()),
                Err(_) => Then::Close,
            }
        })
    }
}

const UPLOAD: &str = "POST /upload HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n";
const CHUNKED_UPLOAD: &str = "POST /upload HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";

/// Drips an upload until it is cut, after the grace period and with an answer.
fn drips_an_upload(rig: &Rig, head: &str, piece: &[u8]) {
    let mut client = rig.edge();
    let began = Instant::now();
    client.send(head).unwrap();
    let mut stream = client.stream.try_clone().unwrap();
    drip(&mut stream, piece, || is_quiet(&client.stream));
    let answer = client.answer(false).expect("an answer");
    assert_eq!((answer.status, answer.header("Connection")), (408, Some("close")), "{answer:?}");
    assert_cut_after_the_grace(began);
}

/// Whether no bytes have arrived.
pub(in crate::data_path) fn is_quiet(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let looked = stream.peek(&mut [0]).map_err(|error| error.kind());
    stream.set_nonblocking(false).unwrap();
    looked == Err(std::io::ErrorKind::WouldBlock)
}

/// The grace period is 20 s; after a minute without a byte any client would be cut.
fn assert_cut_after_the_grace(began: Instant) {
    let waited = began.elapsed();
    assert!(waited > Duration::from_secs(19) && waited < Duration::from_secs(40), "cut after {waited:?}");
}

/// Takes an answer at fifty bytes a second until it is cut.
fn drips_a_download(rig: &Rig) {
    let mut client = rig.edge();
    let began = Instant::now();
    client.send(get_request("/endless")).unwrap();
    assert_eq!(client.head().unwrap().status, 200);
    let mut stream = &client.stream;
    while stream.read_exact(&mut [0; 5]).is_ok() && began.elapsed() < Duration::from_secs(25) {
        std::thread::sleep(BETWEEN);
    }
    eventually("the client is cut", || (rig.counter("clearcoat_edge_connections") == 0.0).then_some(()));
    assert_cut_after_the_grace(began);
}

#[test]
fn who_is_waited_for_and_slower_than_wanted_is_cut_and_nobody_else() {
    let slowness = Slowness { cut: Arc::default() };
    let rig = Rig::start("[limits]\nmin_body_rate = 500", vec![slowness.node()], vec![slowness.node()]);
    // Bytes buffered by the kernel for a client that does not read count as taken: a rate that the kernel alone cannot
    // reach.
    let demanding = Rig::start("[limits]\nmin_body_rate = 10000000", vec![slowness.node()], Vec::new());
    let is_cut = || slowness.cut.load(Ordering::SeqCst);
    std::thread::scope(|scope| {
        let cut = [
            scope.spawn(|| drips_an_upload(&rig, UPLOAD, &DRIP)),
            scope.spawn(|| drips_an_upload(&rig, CHUNKED_UPLOAD, b"5\r\ndrip.\r\n")),
            scope.spawn(|| drips_a_download(&demanding)),
        ];
        let others = [
            scope.spawn(|| {
                let mut waiting = rig.edge();
                waiting.send(get_request("/drips")).unwrap();
                let answer = waiting.answer(false).expect("a slow node is not its client's fault");
                assert!(answer.text().starts_with("drip.") && answer.text().ends_with("drip.end"), "{answer:?}");
            }),
            scope.spawn(|| {
                let mut client = rig.edge();
                client
                    .send(format!("POST /reads-late HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", 32 << 20))
                    .unwrap();
                client.send(vec![b'x'; 32 << 20]).expect("a node that reads late is not its client's fault");
                assert_eq!(client.answer(false).unwrap().text(), (32 << 20).to_string());
            }),
            scope.spawn(|| {
                let mut steady = rig.edge();
                steady.send(CHUNKED_UPLOAD).unwrap();
                // A thousand bytes a second.
                drip(
                    &mut steady.stream.try_clone().unwrap(),
                    format!("64\r\n{}\r\n", "x".repeat(100)).as_bytes(),
                    || !is_cut(),
                );
                steady.send("0\r\n\r\n").unwrap();
                assert_eq!(steady.answer(false).expect("who is fast enough is served").status, 200);
            }),
            scope.spawn(|| {
                // The origin's clients are Varnish nodes, as slow as their own clients.
                let mut varnish = rig.origin();
                varnish.send(CHUNKED_UPLOAD).unwrap();
                drip(&mut varnish.stream.try_clone().unwrap(), b"5\r\ndrip.\r\n", || !is_cut());
                varnish.send("0\r\n\r\n").unwrap();
                assert_eq!(varnish.answer(false).expect("a Varnish is not cut").status, 200);
            }),
        ];
        let failed = cut.into_iter().map(|client| client.join()).filter(Result::is_err).count();
        slowness.cut.store(true, Ordering::SeqCst);
        let failed = failed + others.into_iter().map(|client| client.join()).filter(Result::is_err).count();
        assert_eq!(failed, 0, "clients whose fate was another");
    });
    rig.becomes_idle();
    demanding.becomes_idle();
    assert_not_blamed(&rig, "the request took too long to arrive");
    assert_not_blamed(&demanding, "the client went away");
}

#[test]
#[ignore = "waits for more than the minute that a body is given; `cargo test --test it -- --ignored` runs it"]
fn an_event_stream_may_pause_and_who_leaves_it_is_noticed() {
    let goes_on = Gate::default();
    let rig = Rig::start(
        "",
        vec![Upstream::start({
            let goes_on = goes_on.clone();
            move |call| {
                let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
                if call.send(format!("{head}3\r\n1\n\n\r\n")).is_err() {
                    return Then::Close;
                }
                // Longer than one wait of a fake.
                if !(0..3).any(|_| call.wait(&goes_on)) {
                    return Then::Close;
                }
                call.send_then("3\r\n2\n\n\r\n0\r\n\r\n", Then::KeepAlive)
            }
        })],
        Vec::new(),
    );
    let began = Instant::now();
    let [mut stays, mut leaves, half] = [(); 3].map(|()| {
        let mut client = rig.edge();
        client.stream.set_read_timeout(Some(Duration::from_secs(90))).unwrap();
        client.send("GET /events HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        assert_eq!(client.head().unwrap().status, 200);
        client
    });
    assert_eq!(rig.inflight(), 3.0);
    // A reset is noticed at once; a half-open client, which may be gone, has as long as any body.
    socket2::SockRef::from(&leaves.stream).set_linger(Some(Duration::ZERO)).unwrap();
    leaves.take(8).unwrap();
    drop(leaves);
    eventually("the request is given up", || (rig.inflight() == 2.0).then_some(()));
    half.stream.shutdown(std::net::Shutdown::Write).unwrap();
    crate::support::eventually_within(Duration::from_secs(80), "the other one is given up", || {
        (rig.inflight() == 1.0).then_some(())
    });
    assert!(began.elapsed() > Duration::from_secs(59), "after {:?}", began.elapsed());
    eventually("the minute is over for all", || (began.elapsed() > Duration::from_secs(66)).then_some(()));
    goes_on.open();
    assert_eq!(stays.take(21).unwrap(), b"3\r\n1\n\n\r\n3\r\n2\n\n\r\n0\r\n\r\n");
}
