//! Each limit of `[timeouts]` by its effect, by HTTP/1.1 and by HTTP/2: what the client sees, what the access log says, and
//! that nobody else is ended. All other limits of a test are far away, so that it can only be this one.

mod request;
mod silence;

use std::io::Write;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use crate::data_path::access_log::{AccessFile, ended, log_in};
use crate::data_path::limits::assert_not_blamed;
use crate::data_path::limits::slow::is_quiet;
use crate::data_path::reload::{reloaded, set};
use crate::data_path::rig::{Rig, get_request};
use crate::data_path::tls::Secure;
use crate::data_path::upgrade::websocket::{ASK, SWITCH};
use crate::support::client::{Answer, Connection, Ending};
use crate::support::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, Frames, GOAWAY, HEADERS, frame, get_frame, request_fields,
};
use crate::support::http2::{Begun, Broken, Http2, request};
use crate::support::upstream::{Gate, Then, Upstream};
use crate::support::{eventually, eventually_within};

/// The limit that ends a wait in these tests; and how long a client or a node may go on that is well, which is longer.
const SHORT: Duration = Duration::from_secs(2);
const LONGER: Duration = Duration::from_secs(4);

/// The pace of those who are slow and well.
const PACE: Duration = Duration::from_millis(200);

/// Long enough that no test meets it.
const FAR: [(&str, &str); 8] = [
    ("client_header", "10m"),
    ("client_body", "1h"),
    ("client_fin", "30s"),
    ("connect", "10m"),
    ("first_byte", "1h"),
    ("between_bytes", "1h"),
    ("keep_alive", "1h"),
    ("tunnel", "1h"),
];

/// Only these limits are near. A client has no least pace.
fn only(near: &[(&str, &str)]) -> String {
    let far = FAR.iter().filter(|(key, _)| near.iter().all(|(near, _)| near != key));
    let lines: Vec<String> = near.iter().chain(far).map(|(key, value)| format!("{key} = \"{value}\"\n")).collect();
    format!("[limits]\nmin_body_rate = 0\n[timeouts]\n{}", lines.concat())
}

/// A clearcoat before one node at the edge, with TLS, without, and an access log.
struct Timed {
    secure: Secure,
    log: AccessFile,
    _folder: tempfile::TempDir,
}

impl Timed {
    fn start(near: &[(&str, &str)], node: Upstream) -> Self {
        Timed::start_with(near, "", node)
    }

    fn start_with(near: &[(&str, &str)], more: &str, node: Upstream) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (config, log) = log_in(folder.path(), "");
        let secure = Secure::start("seal = false", &format!("{config}{}{more}", only(near)), vec![node]);
        Timed { secure, log, _folder: folder }
    }

    fn edge(&self) -> Connection {
        self.secure.rig.edge()
    }

    fn http2(&self) -> Http2 {
        Http2::open(self.secure.address())
    }

    /// The status, the termination code and the reason in the line of this path.
    fn ended(&self, path: &str) -> (u64, String, String) {
        let line = self.log.of(path);
        let (status, code, reason) = ended(&line);
        (status, code.to_owned(), reason.to_owned())
    }
}

fn as_told(status: u64, code: &str, reason: &str) -> (u64, String, String) {
    (status, code.to_owned(), reason.to_owned())
}

/// Not before the limit (a sweep may come a little early by the client's clock), and long before any other.
fn assert_by_the_limit(began: Instant) {
    let waited = began.elapsed();
    assert!(waited > SHORT * 8 / 10 && waited < Duration::from_secs(30), "after {waited:?}");
}

/// A node that does what the path says. What it withholds comes when the gate opens.
fn node(gate: &Gate) -> Upstream {
    let gate = gate.clone();
    Upstream::start(move |call| {
        let path = call.path().to_owned();
        match path.split('?').next().expect("a path") {
            "/silent" if !call.wait(&gate) => Then::Close,
            "/half" => {
                let begun = call.send("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf");
                if begun.is_ok() && call.wait(&gate) { call.send_then("half", Then::KeepAlive) } else { Then::Close }
            }
            "/drips" => {
                let mut begun = call.send("HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n");
                while begun.is_ok() {
                    begun = call.send("d");
                    std::thread::sleep(PACE);
                }
                Then::Close
            }
            "/events" => {
                let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
                if call.send(format!("{head}3\r\n1\n\n\r\n")).is_ok() && call.wait(&gate) {
                    call.send_then("3\r\n2\n\n\r\n0\r\n\r\n", Then::KeepAlive)
                } else {
                    Then::Close
                }
            }
            "/endless" => {
                let mut begun = call.send("HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n");
                while begun.is_ok() {
                    begun = call.send([b'x'; 64 * 1024]);
                }
                Then::Close
            }
            "/unread" => {
                call.wait(&gate);
                Then::Close
            }
            "/socket" => {
                if call.send(SWITCH).is_err() {
                    return Then::Close;
                }
                while call.exactly(1, |_| ()).is_ok() && call.send("e").is_ok() {}
                Then::Close
            }
            _ => match call.body() {
                Ok(body) => call.answer(&format!("{path} {}", body.len())),
                Err(_) => Then::Close,
            },
        }
    })
}

fn ask(client: &mut Connection, path: &str) -> Answer {
    client.send(get_request(path)).expect("clearcoat reads");
    client.answer(false).expect("an answer")
}

#[test]
fn a_node_that_takes_no_connection_is_given_up_after_connect() {
    let checks = "[health.varnish]\ntrial = false\ninterval = \"1h\"\nfall = 100\n";
    let timed = Timed::start_with(&[("connect", "2s")], checks, node(&Gate::opened()));
    let _queue = timed.secure.rig.varnish[0].becomes_deaf();
    let began = Instant::now();
    assert_eq!(ask(&mut timed.edge(), "/plain").status, 502);
    assert_by_the_limit(began);
    let began = Instant::now();
    assert_eq!(timed.http2().get("/http2").expect("an answer").status, 502);
    assert_by_the_limit(began);
    for path in ["/plain", "/http2"] {
        assert_eq!(timed.ended(path), as_told(502, "sC", "connect"), "{path}");
    }
}

#[test]
fn a_node_that_takes_no_connection_costs_a_reader_no_more_than_connect() {
    let checks = "[health.web]\ninterval = \"1h\"\ntimeout = \"1s\"\nfall = 100\n";
    let config = format!(
        "{}{checks}[origin]\nlisten = [\"127.0.0.1:0\"]\npolicy = \"round_robin\"\n",
        only(&[("connect", "2s")])
    );
    let gate = Gate::opened();
    let rig = Rig::start(&config, Vec::new(), vec![node(&gate), node(&gate)]);
    let _queue = rig.web[0].becomes_deaf();
    let mut client = rig.origin();
    // A POST may be sent elsewhere: nothing of it was sent.
    for path in ["/1", "/2"] {
        client.send(format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")).unwrap();
        assert_eq!(client.answer(false).unwrap().text(), format!("{path} 2"));
    }
    assert_eq!(rig.retries("web", "connect"), 1.0, "one of two began at the other node");
}

#[test]
fn a_node_that_does_not_begin_its_answer_is_given_up_after_first_byte() {
    let gate = Gate::default();
    let timed = Timed::start(&[("first_byte", "2s")], node(&gate));
    let began = Instant::now();
    assert_eq!(ask(&mut timed.edge(), "/silent?1").status, 504);
    assert_by_the_limit(began);
    let began = Instant::now();
    assert_eq!(timed.http2().get("/silent?2").expect("an answer").status, 504);
    assert_by_the_limit(began);
    for path in ["/silent?1", "/silent?2"] {
        assert_eq!(timed.ended(path), as_told(504, "sH", "timeout"), "{path}");
    }
    assert_eq!(timed.secure.rig.varnish[0].calls().len(), 2, "each was asked for once");
    // What has begun has its own limit.
    let mut client = timed.edge();
    client.send(get_request("/half?late")).unwrap();
    assert_eq!(client.head().unwrap().status, 200);
    std::thread::sleep(LONGER);
    gate.open();
    assert_eq!(client.take(8).unwrap(), b"halfhalf");
}

#[test]
fn a_node_that_stops_in_mid_answer_is_cut_off_after_between_bytes() {
    let gate = Gate::default();
    let timed = Timed::start(&[("between_bytes", "2s")], node(&gate));
    let mut drips = timed.edge();
    drips.send(get_request("/drips")).unwrap();
    let began = Instant::now();
    let mut client = timed.edge();
    client.send(get_request("/half?1")).unwrap();
    assert_eq!(client.head().unwrap().status, 200);
    assert_eq!(client.rest(), (b"half".to_vec(), Ending::Reset));
    assert_by_the_limit(began);
    let began = Instant::now();
    let http2 = timed.http2();
    let mut stream = http2.ask(request("GET", "/half?2").body(()).unwrap(), true);
    let cut = stream.head().and_then(Begun::rest);
    assert!(matches!(cut, Err(Broken::Reset(_))), "{cut:?}");
    assert_by_the_limit(began);
    for path in ["/half?1", "/half?2"] {
        assert_eq!(timed.ended(path), as_told(200, "sD", "stalled"), "{path}");
    }
    // It ends neither what is slow, nor what waits for its first byte.
    let mut late = timed.edge();
    late.send(get_request("/silent?late")).unwrap();
    let began = Instant::now();
    while began.elapsed() < LONGER {
        drips.take(1).expect("it comes slowly, and does not stop");
    }
    gate.open();
    assert_eq!(late.answer(false).unwrap().status, 200);
}

#[test]
fn a_node_that_takes_no_more_of_an_upload_is_given_up_after_between_bytes() {
    let timed = Timed::start(&[("between_bytes", "2s")], node(&Gate::default()));
    let began = Instant::now();
    let mut client = timed.edge();
    client.send(format!("POST /unread?1 HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", 64 << 20)).unwrap();
    let mut stream = client.stream.try_clone().unwrap();
    // The client may be cut before all is written.
    let writer = std::thread::spawn(move || _ = stream.write_all(&vec![b'x'; 64 << 20]));
    assert_eq!(client.answer(false).unwrap().status, 504);
    assert_by_the_limit(began);
    drop(client);
    writer.join().unwrap();
    let upload = request("POST", "/unread?2").body(()).unwrap();
    assert_eq!(timed.http2().exchange(upload, &vec![b'x'; 64 << 20]).expect("an answer").status, 504);
    for path in ["/unread?1", "/unread?2"] {
        assert_eq!(timed.ended(path), as_told(504, "sH", "timeout"), "{path}");
    }
    timed.secure.rig.clearcoat.log().waits_for_count("node failed a request", 2);
}

#[test]
fn an_event_stream_may_pause_for_longer_than_bytes_may() {
    let gate = Gate::default();
    let timed = Timed::start(&[("between_bytes", "2s"), ("client_body", "2s")], node(&gate));
    let began = Instant::now();
    let mut plain = timed.edge();
    plain.send(get_request("/events?1")).unwrap();
    plain.head().unwrap();
    let http2 = timed.http2();
    let mut streamed = http2.ask(request("GET", "/events?2").body(()).unwrap(), true).head().unwrap();
    assert_eq!(streamed.piece(true).unwrap().unwrap(), "1\n\n");
    // Who has closed its side may be gone.
    let mut half = timed.edge();
    half.send(get_request("/events?3")).unwrap();
    half.head().unwrap();
    half.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(timed.ended("/events?3"), as_told(200, "cD", "client_gone"));
    assert_by_the_limit(began);
    std::thread::sleep(LONGER);
    gate.open();
    assert_eq!(plain.take(21).unwrap(), b"3\r\n1\n\n\r\n3\r\n2\n\n\r\n0\r\n\r\n");
    assert_eq!(streamed.rest().unwrap(), b"2\n\n");
}

#[test]
fn an_event_stream_that_says_nothing_for_as_long_as_a_tunnel_may_is_cut() {
    let timed = Timed::start(&[("tunnel", "2s")], node(&Gate::default()));
    let began = Instant::now();
    let mut client = timed.edge();
    client.send(get_request("/events?1")).unwrap();
    client.head().unwrap();
    assert_eq!(client.rest(), (b"3\r\n1\n\n\r\n".to_vec(), Ending::Reset));
    assert_by_the_limit(began);
    let http2 = timed.http2();
    let cut = http2.ask(request("GET", "/events?2").body(()).unwrap(), true).head().and_then(Begun::rest);
    assert!(matches!(cut, Err(Broken::Reset(_))), "{cut:?}");
    for path in ["/events?1", "/events?2"] {
        assert_eq!(timed.ended(path), as_told(200, "sD", "stalled"), "{path}");
    }
}

#[test]
fn a_client_that_stops_in_its_upload_is_answered_408_after_client_body() {
    let timed = Timed::start(&[("client_body", "2s")], node(&Gate::opened()));
    let began = Instant::now();
    let mut client = timed.edge();
    client.send("POST /upload?1 HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nstart").unwrap();
    let answer = client.answer(false).unwrap();
    assert_eq!((answer.status, answer.header("Connection")), (408, Some("close")), "{answer:?}");
    assert_by_the_limit(began);
    let http2 = timed.http2();
    let mut stream = http2.ask(request("POST", "/upload?2").body(()).unwrap(), false);
    stream.send(b"start", false).unwrap();
    assert_eq!(stream.answer().expect("an answer").status, 408);
    assert_eq!(http2.get("/next").unwrap().status, 200, "the other streams of its connection go on");
    for path in ["/upload?1", "/upload?2"] {
        assert_eq!(timed.ended(path), as_told(408, "cH", "client_timeout"), "{path}");
    }
    // Who is slow, and does not stop, is served.
    let began = Instant::now();
    let mut slow = timed.edge();
    slow.send("POST /slow HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
    while began.elapsed() < LONGER {
        slow.send("1\r\nx\r\n").unwrap();
        std::thread::sleep(PACE);
    }
    slow.send("0\r\n\r\n").unwrap();
    assert!(slow.answer(false).unwrap().text().starts_with("/slow "));
    assert_not_blamed(&timed.secure.rig, "the request took too long to arrive");
}

#[test]
fn a_client_that_takes_no_more_of_its_answer_is_cut_after_client_body() {
    let timed = Timed::start(&[("client_body", "2s")], node(&Gate::default()));
    let began = Instant::now();
    let mut plain = timed.edge();
    plain.send(get_request("/endless?plain")).unwrap();
    let mut tls = timed.secure.session();
    tls.send(get_request("/endless?tls")).unwrap();
    // Two windows of 64 KiB, and none is given back.
    let http2 = Http2::open_with(timed.secure.address(), &h2::client::Builder::new());
    let mut stream = http2.ask(request("GET", "/endless?http2").body(()).unwrap(), true);
    for path in ["/endless?plain", "/endless?tls", "/endless?http2"] {
        assert_eq!(timed.ended(path), as_told(200, "cD", "client_gone"), "{path}");
    }
    assert_by_the_limit(began);
    assert!(matches!(stream.head().and_then(Begun::rest), Err(Broken::Reset(_))));
    timed.secure.rig.becomes_idle();
    assert_not_blamed(&timed.secure.rig, "the client went away");
}

/// The first frame of a header block, without its continuation.
fn half_head(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_STREAM, stream, &request_fields("GET", "/")[..20])
}

#[test]
fn a_head_by_http2_has_its_time_and_no_drip_or_stream_extends_it() {
    let gate = Gate::default();
    let timed = Timed::start(&[("client_header", "2s")], node(&gate));
    let address = timed.secure.address();
    let began = Instant::now();
    // Half a frame, a frame without its continuation, and one that is continued for ever.
    let mut cases = [&half_head(1)[..12], &half_head(1), &half_head(1)].map(|bytes| {
        let mut frames = Frames::open(address, &[]);
        assert!(frames.send(bytes));
        frames
    });
    let drip = frame(CONTINUATION, 0, 1, b"");
    while cases[2].send(&drip) && began.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(PACE);
    }
    for frames in &mut cases {
        assert_eq!(frames.ended("the connection ends"), Some(0), "a GOAWAY without an error");
    }
    assert_by_the_limit(began);
    for line in timed.log.lines(3) {
        assert_eq!((ended(&line), &line["method"]), ((408, "cR", "client_timeout"), &serde_json::Value::Null));
    }
    // Requests on the same connection that are under way end as they should.
    let mut frames = Frames::open(address, &[]);
    assert!(frames.send([get_frame(1, "/silent"), half_head(3)].concat()));
    let goaway = frames.wait_for("it is sent away", |frame| frame.kind == GOAWAY).expect("a GOAWAY");
    assert_eq!(goaway.reason(), 0);
    gate.open();
    let end = frames.wait_for("the answer ends", |frame| frame.kind == DATA && frame.flags & END_STREAM != 0);
    assert_eq!(end.map(|frame| frame.stream), Some(1));
    frames.ended("the connection ends");
}

#[test]
fn heads_by_http2_that_come_in_time_are_many_and_each_has_its_own() {
    let timed = Timed::start(&[("client_header", "2s")], node(&Gate::opened()));
    let mut frames = Frames::open(timed.secure.address(), &[]);
    let began = Instant::now();
    let fields = request_fields("GET", "/page");
    let (first, rest) = fields.split_at(20);
    let mut stream = 1;
    // At every moment a head is unfinished, and all together take longer than one may.
    assert!(frames.send(frame(HEADERS, END_STREAM, stream, first)));
    while began.elapsed() < LONGER {
        std::thread::sleep(PACE);
        let next = frame(HEADERS, END_STREAM, stream + 2, first);
        assert!(frames.send([frame(CONTINUATION, END_HEADERS, stream, rest), next].concat()), "cut at {stream}");
        stream += 2;
    }
    let answered = |frame: &crate::support::frames::Frame| frame.kind == DATA && frame.stream == stream - 2;
    assert!(frames.wait_for("the last one is answered", answered).is_some());
}

#[test]
fn a_client_at_rest_is_kept_for_keep_alive() {
    let timed = Timed::start(&[("keep_alive", "2s")], node(&Gate::opened()));
    let began = Instant::now();
    let (mut silent, mut used, mut busy) = (timed.edge(), timed.edge(), timed.edge());
    let mut tls = timed.secure.session();
    let (silent_http2, http2) = (timed.http2(), timed.http2());
    assert_eq!(ask(&mut used, "/").status, 200);
    assert_eq!(tls.get("/").unwrap().status, 200);
    assert_eq!(http2.get("/").unwrap().status, 200);
    while began.elapsed() < LONGER {
        assert_eq!(ask(&mut busy, "/").status, 200, "a client that is not at rest");
        std::thread::sleep(PACE);
    }
    for client in [&mut silent, &mut used] {
        assert_eq!(client.rest(), (Vec::new(), Ending::Clean));
    }
    assert_eq!(tls.rest(), (Vec::new(), Ending::Clean));
    assert!(silent_http2.ended().is_ok() && http2.ended().is_ok());
    assert_eq!(ask(&mut busy, "/").status, 200);
    drop(busy);
    eventually("all connections are gone", || {
        (timed.secure.rig.counter("clearcoat_edge_connections") == 0.0).then_some(())
    });
}

#[test]
fn a_connection_to_a_node_is_kept_unless_it_is_not_to_be() {
    let rig = Rig::start(&only(&[("node_keep_alive", "0s")]), vec![node(&Gate::opened())], Vec::new());
    let node = &rig.varnish[0];
    let mut client = rig.edge();
    for path in ["/1", "/2"] {
        ask(&mut client, path);
        eventually("it is closed at once", || (node.open_connections() == 0).then_some(()));
    }
    reloaded(&rig, |config| set(config, "timeouts", "node_keep_alive", "1h"));
    for path in ["/3", "/4"] {
        ask(&mut client, path);
    }
    let connections: Vec<usize> = node.calls().iter().map(|call| call.connection).collect();
    assert!(connections[0] != connections[1] && connections[2] == connections[3], "{connections:?}");
    assert_eq!(node.open_connections(), 1);
    reloaded(&rig, |config| set(config, "timeouts", "node_keep_alive", "100ms"));
    eventually("what is kept goes by the new limit", || (node.open_connections() == 0).then_some(()));
}

#[test]
fn who_was_answered_early_may_go_on_for_client_fin_between_two_pieces() {
    let early = Upstream::start(|call| {
        let answer = "HTTP/1.1 413 Content Too Large\r\nContent-Length: 7\r\nConnection: close\r\n\r\ntoo big";
        call.send_then(answer, Then::Linger)
    });
    let rig = Rig::start(&only(&[]), vec![early], Vec::new());
    let mut client = rig.edge();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nstart").unwrap();
    assert_eq!(client.answer(false).unwrap().status, 413);
    assert_eq!(client.rest(), (Vec::new(), Ending::Clean), "clearcoat has closed its side");
    let connections = || rig.counter("clearcoat_edge_connections");
    std::thread::sleep(LONGER);
    assert_eq!(connections(), 1.0, "30 s are not over");
    reloaded(&rig, |config| set(config, "timeouts", "client_fin", "500ms"));
    eventually_within(Duration::from_secs(20), "it is closed", || (connections() == 0.0).then_some(()));
}

#[test]
fn a_tunnel_through_which_nothing_moves_ends_and_a_used_one_does_not() {
    let timed = Timed::start(&[("tunnel", "2s")], node(&Gate::opened()));
    let tunnel = || {
        let mut client = timed.edge();
        client.send(ASK).unwrap();
        assert_eq!(client.head().unwrap().status, 101);
        client
    };
    let began = Instant::now();
    let (mut idle, mut used) = (tunnel(), tunnel());
    let mut says = || used.send("x").is_ok() && used.take(1).is_ok_and(|echo| echo == b"e");
    while began.elapsed() < LONGER {
        assert!(says());
        std::thread::sleep(PACE);
    }
    assert_ne!(idle.rest().1, Ending::Open);
    assert_eq!(timed.ended("/socket"), as_told(101, "PD", "idle_tunnel"));
    assert!(says());
}

#[test]
fn a_fragment_that_takes_too_long_is_left_out_of_its_page() {
    let web = Upstream::start(|call| {
        if call.path() == "/late" {
            // Until clearcoat gives it up.
            _ = call.exactly(1, |_| ());
            return Then::Close;
        }
        let page = "<p>a<esi:include src=\"/late\"/>b<esi:include src=\"/late\"/>c";
        let head = format!("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {}\r\n\r\n", page.len());
        call.send_then(head + page, Then::KeepAlive)
    });
    let rig = Rig::start(&only(&[("fragment", "2s")]), Vec::new(), vec![web]);
    let began = Instant::now();
    assert_eq!(ask(&mut rig.edge(), "/page").text(), "<p>abc");
    assert_by_the_limit(began);
    assert_eq!(rig.web[0].calls().len(), 2, "the second one is not asked for");
}

#[test]
fn a_reload_changes_the_limit_of_who_is_awaited_and_cuts_nobody_at_once() {
    let gate = Gate::default();
    let rig = Rig::start(&only(&[]), vec![node(&gate)], Vec::new());
    let (mut waiting, mut resting) = (rig.edge(), rig.edge());
    assert_eq!(ask(&mut resting, "/").status, 200);
    waiting.send(get_request("/silent")).unwrap();
    eventually("the node has it", || (rig.inflight() == 1.0).then_some(()));
    // Both have waited for longer than they may from now on.
    std::thread::sleep(Duration::from_secs(6));
    reloaded(&rig, |config| {
        set(config, "timeouts", "first_byte", "5s");
        set(config, "timeouts", "keep_alive", "5s");
    });
    let began = Instant::now();
    assert_eq!(ask(&mut resting, "/").status, 200, "it was not closed");
    assert_eq!(waiting.answer(false).unwrap().status, 504);
    // It is told of as applied a little later than it is.
    let waited = began.elapsed();
    assert!(waited > Duration::from_secs(3) && waited < Duration::from_secs(30), "after {waited:?}");
    assert_eq!(resting.rest(), (Vec::new(), Ending::Clean));
}
