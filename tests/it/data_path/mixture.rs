//! A random mixture: whatever clients and nodes do to their connections, each answer belongs to its request.

use fastrand::Rng;

use crate::data_path::rig::Rig;
use crate::support::client::Connection;
use crate::support::upstream::{Call, Then, Upstream};

const CLIENTS: u64 = 6;
const CONNECTIONS: usize = 120;

/// One request and its expected answer.
struct Planned {
    head_only: bool,
    /// It cannot be retried once part of it was sent on a connection that the node was about to close.
    may_fail: bool,
    wire: Vec<u8>,
    answer: String,
}

/// The node's answer, known to both sides: the path and the body of the request.
fn answer_to(path: &str, body: &[u8]) -> String {
    let sum = body
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    let size = path.split('/').nth(3).and_then(|size| size.parse().ok()).expect("a size");
    format!("{path} {} {sum:x} {}", body.len(), "x".repeat(size))
}

fn plan(random: &mut Rng, client: u64, serial: usize) -> Planned {
    let framing = ["length", "chunked", "open"][random.usize(..3)];
    let then = ["keeps", "keeps", "keeps", "says", "closes"][random.usize(..5)];
    let size = if random.u8(..10) == 0 { random.usize(..200_000) } else { random.usize(..300) };
    let path = format!("/{client}/{serial}/{size}/{framing}/{then}");
    let body: Vec<u8> = match random.u8(..3) {
        0 => Vec::new(),
        1 => std::iter::repeat_with(|| random.u8(..)).take(20).collect(),
        _ => vec![random.u8(..); random.usize(..60_000)],
    };
    let (method, fields, framed) = match random.u8(..4) {
        0 => ("HEAD", String::new(), Vec::new()),
        1 => ("GET", String::new(), Vec::new()),
        2 => ("PUT", format!("Content-Length: {}\r\n", body.len()), body.clone()),
        _ => ("PUT", "Transfer-Encoding: chunked\r\n".to_owned(), chunked(random, &body)),
    };
    let mut wire = format!("{method} {path} HTTP/1.1\r\nHost: a\r\n{fields}\r\n").into_bytes();
    wire.extend(framed);
    let body = if method == "PUT" { body } else { Vec::new() };
    let answer = answer_to(&path, &body);
    Planned { head_only: method == "HEAD", may_fail: method == "PUT", wire, answer }
}

fn chunked(random: &mut Rng, body: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    let mut rest = body;
    while !rest.is_empty() {
        let (chunk, behind) = rest.split_at(random.usize(1..=rest.len()));
        wire.extend(format!("{:x}{}\r\n", chunk.len(), if random.bool() { ";x=y" } else { "" }).bytes());
        wire.extend(chunk);
        wire.extend(b"\r\n");
        rest = behind;
    }
    wire.extend(if random.bool() { &b"0\r\n\r\n"[..] } else { b"0\r\nX-Trailer: t\r\n\r\n" });
    wire
}

fn node(call: &mut Call<'_>) -> Then {
    let path = call.path().to_owned();
    let Ok(body) = call.body() else { return Then::Close };
    let content = answer_to(&path, &body);
    let says = if path.ends_with("/says") { "Connection: close\r\n" } else { "" };
    let content = if call.is("HEAD") { "" } else { content.as_str() };
    let (answer, open) = match path.split('/').nth(4).expect("a framing") {
        "length" => (format!("HTTP/1.1 200 OK\r\n{says}Content-Length: {}\r\n\r\n{content}", content.len()), false),
        "chunked" => {
            let head = format!("HTTP/1.1 200 OK\r\n{says}Transfer-Encoding: chunked\r\n\r\n");
            let size = content.len();
            let body = if size == 0 { String::new() } else { format!("{size:x}\r\n{content}\r\n0\r\n\r\n") };
            (head + &body, false)
        }
        _ => (format!("HTTP/1.1 200 OK\r\n{says}\r\n{content}"), true),
    };
    let keeps = path.ends_with("/keeps") && (!open || call.is("HEAD"));
    call.send_then(answer, if keeps { Then::KeepAlive } else { Then::Close })
}

/// Some requests on one connection, written together in pieces of any size; sometimes aborted half-way.
fn converse(rig: &Rig, random: &mut Rng, client: u64, serial: &mut usize) {
    let planned: Vec<Planned> = (0..random.usize(1..6))
        .map(|_| {
            *serial += 1;
            plan(random, client, *serial)
        })
        .collect();
    let wire: Vec<u8> = planned.iter().flat_map(|request| request.wire.iter().copied()).collect();
    let mut connection = rig.origin();
    let given_up = if random.u8(..8) == 0 { random.usize(..wire.len()) } else { wire.len() };
    let step = random.usize(1..=wire.len()).max(wire.len() / 50);
    for piece in wire[..given_up].chunks(step) {
        // A failed earlier request ended the connection; the answers are checked below.
        if connection.send(piece).is_err() {
            break;
        }
    }
    if given_up == wire.len() {
        read_answers(&mut connection, &planned);
    }
}

fn read_answers(connection: &mut Connection, planned: &[Planned]) {
    for request in planned {
        let name = request.answer.split(' ').next().expect("a path");
        let answer = connection.answer(request.head_only).unwrap_or_else(|error| panic!("{name}: {error}"));
        if answer.status == 502 && request.may_fail {
            return;
        }
        assert_eq!(answer.status, 200, "{name}: {answer:?}");
        let expected = if request.head_only { "" } else { &request.answer };
        let shown = |text: &str| text.chars().take(200).collect::<String>();
        assert!(answer.text() == expected, "{:?} instead of {:?}", shown(answer.text()), shown(expected));
    }
}

#[test]
fn each_answer_belongs_to_its_request_whatever_else_happens() {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    println!("SEED={seed}");
    let rig = Rig::start("[runtime]\nworkers = 2", Vec::new(), vec![Upstream::start(node), Upstream::start(node)]);
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let rig = &rig;
            scope.spawn(move || {
                let mut random = Rng::with_seed(seed.wrapping_add(client));
                let mut serial = 0;
                for _ in 0..CONNECTIONS {
                    converse(rig, &mut random, client, &mut serial);
                }
            });
        }
    });
    rig.becomes_idle();
    assert!(rig.web.iter().all(|node| node.calls().len() > 100), "one node got nearly everything");
    assert!(rig.retries("web", "no_answer") > 0.0, "no connection was closed at a bad moment: this test proves little");
}
