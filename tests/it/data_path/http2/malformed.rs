//! Malformed requests among valid ones on one connection: each is an error of its own stream only.

use crate::data_path::tls::Secure;
use crate::support::client::get;
use crate::support::eventually;
use crate::support::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, Frames, GOAWAY, HEADERS, RST_STREAM, field, frame, get_frame,
    indexed_field, request_fields,
};
use crate::support::upstream::{Gate, Then, Upstream};

const PRIORITY: u8 = 2;
const WINDOW_UPDATE: u8 = 8;
const PROTOCOL_ERROR: u32 = 1;

/// Answers `/held` only when the gate is open.
fn holding(gate: &Gate) -> Vec<Upstream> {
    let gate = gate.clone();
    vec![Upstream::start(move |call| {
        let path = call.path().to_owned();
        if path == "/held" && !call.wait(&gate) {
            return Then::Close;
        }
        if call.body().is_err() {
            return Then::Close;
        }
        call.answer(&path)
    })]
}

/// Malformed frames for the third stream, while the first one waits.
fn malformed() -> Vec<(&'static str, Vec<u8>)> {
    let request = |extra: Vec<u8>| {
        frame(HEADERS, END_HEADERS | END_STREAM, 3, [request_fields("GET", "/malformed"), extra].concat())
    };
    let with = |name: &str, value: &str| request(field(name, value));
    let held = || [frame(HEADERS, END_HEADERS | END_STREAM, 3, request_fields("GET", "/held"))].concat();
    let upload = |trailers: Vec<u8>| {
        let head = frame(HEADERS, END_HEADERS, 3, request_fields("POST", "/malformed"));
        [head, frame(HEADERS, END_HEADERS | END_STREAM, 3, trailers)].concat()
    };
    let mut split = [request_fields("GET", "/malformed"), field("Split", "a")].concat();
    let behind = split.split_off(5);
    vec![
        ("an upper-case name", with("Upper", "a")),
        ("a blank in a name", with("a b", "a")),
        ("no name", with("", "a")),
        ("a control byte", with("a", "a\x01")),
        ("a line break", with("a", "a\nb")),
        ("DEL", with("a", "a\x7f")),
        ("an unknown pseudo field", with(":unknown", "a")),
        ("a status", with(":status", "20")),
        ("a method", frame(HEADERS, END_HEADERS | END_STREAM, 3, request_fields("GET?\0", "/malformed"))),
        ("a field of the connection", with("connection", "close")),
        ("in the table", request(indexed_field("Table", "a"))),
        ("trailers", upload(field("Trailer", "a"))),
        ("in two frames", [frame(HEADERS, END_STREAM, 3, split), frame(CONTINUATION, END_HEADERS, 3, behind)].concat()),
        ("no more window", [held(), frame(WINDOW_UPDATE, 0, 3, [0; 4])].concat()),
        ("a short priority", [held(), frame(PRIORITY, 0, 3, [0; 4])].concat()),
        ("a stream that depends on itself", [held(), frame(PRIORITY, 0, 3, [0, 0, 0, 3, 1])].concat()),
    ]
}

#[test]
fn a_malformed_request_is_an_error_of_its_stream_and_the_others_go_on() {
    for (what, bytes) in malformed() {
        let gate = Gate::default();
        let secure = Secure::start("", "", holding(&gate));
        let mut client = Frames::open(secure.address(), &[]);
        assert!(client.send(get_frame(1, "/held")), "{what}");
        eventually("it is at the node", || (!secure.rig.varnish[0].calls().is_empty()).then_some(()));
        assert!(client.send(&bytes), "{what}");
        let reset = client.wait_for(what, |frame| frame.kind == RST_STREAM || frame.kind == GOAWAY);
        let reset = reset.unwrap_or_else(|| panic!("{what}: the connection ended"));
        assert_eq!((reset.kind, reset.stream, reset.reason()), (RST_STREAM, 3, PROTOCOL_ERROR), "{what}");
        // Its neighbour, and the request after it.
        gate.open();
        assert!(client.send(get_frame(5, "/next")), "{what}");
        for stream in [1, 5] {
            let end = client.wait_for(what, |frame| frame.stream == stream && frame.flags & END_STREAM != 0);
            assert_eq!(end.map(|frame| frame.kind), Some(DATA), "{what}, stream {stream}");
        }
        let calls = secure.rig.varnish[0].calls();
        assert!(!calls.iter().any(|call| call.head.starts_with("GET /malformed ")), "{what}: {calls:?}");
        // Each is counted once, whether it was refused at once or in the middle.
        eventually("three are counted", || {
            let metrics = get(secure.rig.clearcoat.admin, "/metrics").ok()?;
            let counted = ["2xx", "4xx"].map(|class| {
                let series = format!("clearcoat_edge_requests_total{{code_class=\"{class}\"");
                let lines = metrics.text().lines().filter(|line| line.starts_with(&series));
                lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>()
            });
            (counted == [2.0, 1.0]).then_some(())
        });
    }
}

#[test]
fn what_a_malformed_request_put_into_the_table_is_there_for_the_next_one() {
    let secure = Secure::start("", "", vec![Upstream::echo()]);
    let mut client = Frames::open(secure.address(), &[]);
    // The good field first, so that the bad one is the newest.
    let fields = [request_fields("GET", "/1"), indexed_field("x-good", "kept"), indexed_field("Bad", "x")].concat();
    assert!(client.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, fields)));
    client.wait_for("it is refused", |frame| frame.kind == RST_STREAM && frame.stream == 1).expect("a reset");
    // 63 is the good field, and 62 the bad one, which is refused each time.
    let by_index = |stream, path, index: u8| {
        frame(HEADERS, END_HEADERS | END_STREAM, stream, [request_fields("GET", path), vec![0x80 | index]].concat())
    };
    assert!(client.send(by_index(3, "/3", 63)) && client.send(by_index(5, "/5", 62)));
    client.wait_for("it is refused", |frame| frame.kind == RST_STREAM && frame.stream == 5).expect("a reset");
    client.wait_for("it is answered", |frame| frame.stream == 3 && frame.flags & END_STREAM != 0).expect("an answer");
    let calls = secure.rig.varnish[0].calls();
    assert_eq!(calls.len(), 1, "{calls:?}");
    assert_eq!(calls[0].header("x-good"), Some("kept"), "{calls:?}");
}

#[test]
fn what_cannot_be_read_at_all_still_ends_the_connection() {
    for (what, bytes) in [
        ("an index that no table has", frame(HEADERS, END_HEADERS | END_STREAM, 1, [0xff, 0x7f])),
        ("a string beyond its block", frame(HEADERS, END_HEADERS | END_STREAM, 1, [0x00, 0x7e, b'a'])),
        ("more padding than frame", frame(HEADERS, END_HEADERS | END_STREAM | 0x8, 1, [0xff, 0x82])),
        (
            "another frame inside a block",
            [frame(HEADERS, END_STREAM, 1, request_fields("GET", "/")), frame(6, 0, 0, [0; 8])].concat(),
        ),
        ("a window of the connection that does not grow", frame(WINDOW_UPDATE, 0, 0, [0; 4])),
    ] {
        let secure = Secure::start("", "", vec![Upstream::echo()]);
        let mut client = Frames::open(secure.address(), &[]);
        client.send(&bytes);
        assert_eq!(client.ended(what), Some(PROTOCOL_ERROR), "{what}");
    }
}
