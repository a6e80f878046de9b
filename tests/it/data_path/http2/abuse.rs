//! Attacking clients. Each is cut or held back; the process continues, its memory does not grow, and other clients are
//! not affected.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::data_path::http2::{MAX_STREAMS, MIB};
use crate::data_path::rig::at_rest;
use crate::data_path::tls::{Secure, body_of, endless};
use crate::support::eventually_within;
use crate::support::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, Frames, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS, WINDOW_UPDATE,
    field, frame, get_frame, indexed_field, request_fields,
};
use crate::support::http2::{Http2, request};
use crate::support::upstream::{Gate, Then, Upstream};

// RFC 9113 section 7.
const CANCEL: u32 = 8;
const REFUSED_STREAM: u32 = 7;
const ENHANCE_YOUR_CALM: u32 = 11;

/// The most memory that an attack may leave: buffers of open connections, and allocator overhead.
const GROWTH: usize = 16 * MIB;

/// The longest wait for a page that other clients may see meanwhile, in a debug build on a busy machine.
const UNNOTICED: Duration = Duration::from_secs(5);

/// Answers paths that begin with `/held` only once the gate is open or the client has gone, and others at once.
fn node(held: &Gate) -> Upstream {
    let held = held.clone();
    Upstream::start(move |call| {
        let path = call.path().to_owned();
        if path.starts_with("/half") && call.send("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhello").is_err() {
            return Then::Close;
        }
        if path.starts_with("/h") && !call.wait(&held) {
            return Then::Close;
        }
        match call.body() {
            Ok(_) => call.answer(&path),
            Err(_) => Then::Close,
        }
    })
}

/// Runs an attack while other clients read, and checks that they are not affected.
fn harmlessly<T>(secure: &Secure, what: &str, harm: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    let before = secure.rig.memory();
    let harmed = std::thread::scope(|scope| {
        let readers = [false, true].map(|by_http2| {
            let done = &done;
            scope.spawn(move || read_on(secure, by_http2, done))
        });
        // Both kinds of readers are running before it begins.
        let harmed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(harm));
        done.store(true, Ordering::SeqCst);
        for reader in readers {
            let (pages, slowest) = reader.join().expect("a reader that is served");
            assert!(pages > 0 && slowest < UNNOTICED, "{what}: {pages} pages, the slowest after {slowest:?}");
        }
        harmed
    });
    let harmed = harmed.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let grown = secure.rig.memory().saturating_sub(before);
    assert!(grown < GROWTH, "{what}: {} KiB more memory", grown / 1024);
    assert_eq!(Http2::open(secure.address()).get("/after").unwrap().text(), "/after", "{what}");
    harmed
}

/// Reads pages on its own connection; returns their number, and the time of the slowest.
fn read_on(secure: &Secure, by_http2: bool, done: &AtomicBool) -> (u64, Duration) {
    let (mut pages, mut slowest) = (0, Duration::ZERO);
    let http2 = by_http2.then(|| Http2::open(secure.address()));
    let mut http1 = secure.session();
    while pages == 0 || !done.load(Ordering::SeqCst) {
        let began = Instant::now();
        match &http2 {
            Some(http2) => assert_eq!(http2.get("/page").unwrap().text(), "/page"),
            None => assert_eq!(http1.get("/page").unwrap().text(), "/page"),
        }
        pages += 1;
        slowest = slowest.max(began.elapsed());
        // A pace that leaves the machine to the code under test.
        std::thread::sleep(Duration::from_millis(2));
    }
    (pages, slowest)
}

/// The number of requests for this path that the node has seen.
fn seen(secure: &Secure, path: &str) -> usize {
    let start = format!("GET {path} ");
    secure.rig.varnish[0].calls().iter().filter(|call| call.head.starts_with(&start)).count()
}

fn stream_id(number: usize) -> u32 {
    u32::try_from(2 * number + 1).expect("a stream")
}

#[test]
fn who_opens_streams_only_to_reset_them_is_cut_soon() {
    let held = Gate::default();
    let secure = Secure::start("", "", vec![node(&held)]);
    // All at once, as in CVE-2023-44487.
    let reset = |stream| frame(RST_STREAM, 0, stream, CANCEL.to_be_bytes());
    let burst: Vec<u8> =
        (0..10_000).map(stream_id).flat_map(|stream| [get_frame(stream, "/held"), reset(stream)].concat()).collect();
    let reason = harmlessly(&secure, "a burst", || {
        let mut frames = Frames::open(secure.address(), &[]);
        frames.send(&burst);
        frames.ended("the connection is cut")
    });
    assert_eq!(reason, Some(ENHANCE_YOUR_CALM));
    // One at a time, each reset once it is in flight: indistinguishable from an impatient reader.
    for path in ["/held", "/half"] {
        let streams = harmlessly(&secure, path, || {
            let mut frames = Frames::open(secure.address(), &[]);
            (0..10_000).position(|number| {
                let stream = stream_id(number);
                let begun = frames.send(get_frame(stream, path))
                    && match path {
                        "/held" => frames.answers_ping(u64::from(stream)),
                        _ => frames.wait_for("the answer begins", |frame| frame.stream == stream).is_some(),
                    };
                frames.received.clear();
                !begun || !frames.send(reset(stream))
            })
        });
        assert!(streams.is_some_and(|streams| streams <= 300), "{path}: {streams:?} streams");
        let seen = seen(&secure, path);
        assert!(seen <= 400, "{path}: {seen} requests at the node");
    }
    secure.rig.becomes_idle();
    held.open();
}

#[test]
fn who_asks_for_a_thousand_streams_at_once_gets_a_hundred() {
    let held = Gate::default();
    let secure = Secure::start("", "", vec![node(&held)]);
    let mut frames = Frames::open(secure.address(), &[]);
    harmlessly(&secure, "a thousand streams", || {
        let all: Vec<u8> = (0..1000).map(stream_id).flat_map(|stream| get_frame(stream, "/held")).collect();
        assert!(frames.send(all) && frames.answers_ping(1));
        let refused =
            frames.received.iter().filter(|frame| frame.kind == RST_STREAM && frame.reason() == REFUSED_STREAM);
        assert_eq!(refused.count(), 1000 - MAX_STREAMS);
        eventually_within(UNNOTICED, "a hundred are at the node", || {
            (seen(&secure, "/held") == MAX_STREAMS).then_some(())
        });
    });
    held.open();
    let whole = |frames: &Frames| {
        frames.received.iter().filter(|frame| frame.kind == DATA && frame.flags & END_STREAM != 0).count()
    };
    eventually_within(UNNOTICED, "each of them is answered", || {
        (frames.answers_ping(2) && whole(&frames) == MAX_STREAMS).then_some(())
    });
    assert_eq!(seen(&secure, "/held"), MAX_STREAMS);
}

#[test]
fn heads_without_an_end_are_cut() {
    let secure = Secure::start("", "", vec![Upstream::echo()]);
    for (what, piece) in [("small", field("x", "y")), ("large", vec![0; 16_000]), ("empty", Vec::new())] {
        let start = frame(HEADERS, 0, 1, request_fields("GET", "/flood"));
        let flood = [start, frame(CONTINUATION, 0, 1, piece).repeat(5000)].concat();
        harmlessly(&secure, what, || {
            let mut frames = Frames::open(secure.address(), &[]);
            frames.send(&flood);
            assert_eq!(frames.ended("the flood is cut"), Some(ENHANCE_YOUR_CALM), "{what}");
        });
    }
    assert_eq!(seen(&secure, "/flood"), 0);
}

#[test]
fn a_head_that_unpacks_to_far_more_than_was_sent_is_refused() {
    let secure = Secure::start("", "", vec![Upstream::echo()]);
    for references in [100, 4000, 12_000] {
        harmlessly(&secure, "a bomb", || {
            let mut frames = Frames::open(secure.address(), &[]);
            // One field of 3.9 KB in the table, and then one byte for each reference to it (index 62).
            let fields =
                [request_fields("GET", "/bomb"), indexed_field("x", &"y".repeat(3900)), vec![0xbe; references]]
                    .concat();
            frames.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, fields));
            let end = frames.wait_for("it is refused", |frame| matches!(frame.kind, HEADERS | RST_STREAM | GOAWAY));
            // 431 is not in the static table: its digits are literal, or Huffman coded.
            assert!(end.is_none_or(|frame| frame.kind != HEADERS || frame.payload[0] != 0x88), "{references}");
        });
    }
    assert_eq!(seen(&secure, "/bomb"), 0);
}

#[test]
fn floods_of_cheap_frames_are_answered_or_cut_and_hold_nothing() {
    let secure = Secure::start("", "", vec![Upstream::echo()]);
    let opened = frame(HEADERS, END_HEADERS, 1, request_fields("POST", "/flood"));
    let floods = [
        ("PING", Vec::new(), frame(PING, 0, 0, [7; 8]), false),
        ("PING answers", Vec::new(), frame(PING, 1, 0, [7; 8]), false),
        ("SETTINGS", Vec::new(), frame(SETTINGS, 0, 0, [0, 4, 0, 0, 255, 255]), false),
        ("WINDOW_UPDATE", Vec::new(), frame(WINDOW_UPDATE, 0, 0, [0, 0, 0, 1]), false),
        ("PRIORITY", Vec::new(), frame(2, 0, 1, [0, 0, 0, 0, 16]), false),
        ("unknown frames", Vec::new(), frame(0xbe, 0, 0, [0; 8]), false),
        ("empty DATA", opened.clone(), frame(DATA, 0, 1, []), true),
        ("one byte of DATA", opened, frame(DATA, 0, 1, "x"), false),
    ];
    for (what, start, piece, is_cut) in floods {
        let flood = [start, piece.repeat(50_000)].concat();
        harmlessly(&secure, what, || {
            let mut frames = Frames::open(secure.address(), &[]);
            let taken = frames.send(&flood);
            assert!(!is_cut || !taken || frames.ended("the flood is cut") == Some(ENHANCE_YOUR_CALM), "{what}");
        });
        // The same by a client that does not read the answers.
        harmlessly(&secure, what, || {
            let mut frames = Frames::open(secure.address(), &[]);
            frames.send_blindly(&flood, Duration::from_secs(3));
        });
    }
    secure.rig.becomes_idle();
}

#[test]
fn who_never_opens_its_window_is_cut_and_costs_no_memory() {
    let sent = Arc::new(AtomicU64::new(0));
    let secure = Secure::start("", "[limits]\nmin_body_rate = 100000000", vec![endless(&sent)]);
    let before = secure.rig.memory();
    let began = Instant::now();
    // SETTINGS_INITIAL_WINDOW_SIZE: no byte of any answer.
    let mut frames = Frames::open(secure.address(), &[(4, 0)]);
    for number in 0..MAX_STREAMS {
        assert!(frames.send(get_frame(stream_id(number), "/endless")));
    }
    eventually_within(UNNOTICED, "all are at the node", || (secure.rig.inflight() == MAX_STREAMS as f64).then_some(()));
    let at_rest = at_rest("the node", || sent.load(Ordering::SeqCst));
    // The memory of a stream: a piece being written, one queued, and a read beyond them.
    let grown = secure.rig.memory().saturating_sub(before);
    assert!(grown < MAX_STREAMS * 256 * 1024, "{} KiB for {at_rest} bytes that nobody takes", grown / 1024);
    // A body that is 20 s old has to keep the minimum pace. The requests end, and then the connection accepts no new
    // ones, though its client keeps it busy.
    let mut asked = MAX_STREAMS;
    eventually_within(Duration::from_secs(55), "the client is sent away", || {
        assert!(frames.send(frame(
            HEADERS,
            END_HEADERS | END_STREAM,
            stream_id(asked),
            request_fields("HEAD", "/busy")
        )));
        asked += 1;
        std::thread::sleep(Duration::from_millis(50));
        frames.received.iter().any(|frame| frame.kind == GOAWAY).then_some(())
    });
    assert!(began.elapsed() > Duration::from_secs(15), "sent away at once: {:?}", began.elapsed());
    secure.rig.becomes_idle();
    eventually_within(UNNOTICED, "the node's connections end", || {
        (secure.rig.varnish[0].open_connections() == 0).then_some(())
    });
}

#[test]
fn a_client_that_reads_one_stream_gets_it_whole_beside_unread_ones() {
    let secure = Secure::start(
        "",
        "",
        vec![Upstream::start(|call| {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 4 * MIB);
            call.send_then([head.into_bytes(), body_of(4 * MIB)].concat(), Then::KeepAlive)
        })],
    );
    let client = Http2::open(secure.address());
    let ask = || client.ask(request("GET", "/").body(()).unwrap(), true).head().unwrap();
    let left: Vec<_> = (0..20).map(|_| ask()).collect();
    for _ in 0..3 {
        assert!(ask().rest().unwrap() == body_of(4 * MIB));
    }
    // Backpressure did not cut them.
    for stream in left {
        assert!(stream.rest().unwrap() == body_of(4 * MIB));
    }
}
