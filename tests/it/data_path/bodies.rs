//! Bodies of any size: never faster than the slower side, and never more than a small part in memory.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use crate::data_path::rig::{Rig, at_rest, get_request};
use crate::support::client::Connection;
use crate::support::eventually;
use crate::support::upstream::{Call, Gate, Then, Upstream};

const MIB: usize = 1024 * 1024;

/// The size of a long body, not a multiple of any buffer size.
const LONG: usize = 50 * MIB + 4321;

/// The size of a body that exceeds all buffers on the way, but can still be sent.
const MUCH: usize = 150 * MIB + 1234;

/// The size of a body that cannot be buffered.
const ENDLESS: usize = 4096 * MIB;

/// The most that sockets alone may hold of an unread body: on each of the two connections the largest kernel buffer of
/// this machine, with some tolerance for how it counts.
static SOCKET_BUFFERS: LazyLock<u64> = LazyLock::new(|| {
    let largest = |name: &str| -> u64 {
        let limits = std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).expect("a limit of the kernel");
        limits.split_whitespace().last().and_then(|most| most.parse().ok()).expect("a number")
    };
    let most = 2 * (largest("tcp_rmem") + largest("tcp_wmem"));
    assert!(most < MUCH as u64, "this test needs more than the {most} bytes that sockets may hold here");
    most
});

/// The most that clearcoat's memory may grow over bodies of any size: the unsent rest of a scratch buffer on each of a
/// few connections, and allocator overhead.
const GROWTH: usize = 4 * MIB;

/// Bytes with a prime period, so that lost, duplicated or swapped bytes are detected.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..65_521).map(|_| next()).collect()
});

/// Sends this many bytes of the pattern in pieces of `step` bytes.
fn send_pattern(length: usize, step: usize, mut send: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let twice = [PATTERN.as_slice(), PATTERN.as_slice()].concat();
    let mut sent = 0;
    while sent < length {
        let start = sent % PATTERN.len();
        let piece = step.min(length - sent).min(PATTERN.len());
        send(&twice[start..start + piece])?;
        sent += piece;
    }
    Ok(())
}

fn send_pattern_chunked(length: usize, step: usize, mut send: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    send_pattern(length, step, |piece| {
        let mut chunk = format!("{:X}\r\n", piece.len()).into_bytes();
        chunk.extend_from_slice(piece);
        chunk.extend_from_slice(b"\r\n");
        send(&chunk)
    })?;
    send(b"0\r\n\r\n")
}

/// Compares what arrives with the pattern.
#[derive(Default)]
struct Received(usize);

impl Received {
    fn take(&mut self, mut piece: &[u8]) {
        while !piece.is_empty() {
            let expected = &PATTERN[self.0 % PATTERN.len()..];
            let length = expected.len().min(piece.len());
            assert!(
                piece[..length] == expected[..length],
                "the body is another from byte {} on, or shortly behind",
                self.0
            );
            self.0 += length;
            piece = &piece[length..];
        }
    }
}

/// Sends the requested amount of the pattern, and reports what it received.
fn mirror() -> Upstream {
    Upstream::start(|call| {
        let sent = match call.path() {
            "/length" => call
                .send(format!("HTTP/1.1 200 OK\r\nContent-Length: {LONG}\r\n\r\n"))
                .and_then(|()| send_pattern(LONG, 60_000, |piece| call.send(piece))),
            "/chunked" => call
                .send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                .and_then(|()| send_pattern_chunked(LONG, 12_345, |piece| call.send(piece))),
            _ => {
                let mut received = Received::default();
                let read = call.each_piece(|piece| received.take(piece));
                read.map(|()| _ = call.answer(&received.0.to_string()))
            }
        };
        if sent.is_ok() { Then::KeepAlive } else { Then::Close }
    })
}

#[test]
fn long_bodies_arrive_whole_in_both_directions_and_leave_no_memory_behind() {
    let rig = Rig::web([mirror()]);
    let mut client = rig.origin();
    client.send(get_request("/warm")).unwrap();
    client.answer(false).unwrap();
    let before = rig.memory();

    for path in ["/length", "/chunked"] {
        client.send(get_request(path)).unwrap();
        let head = client.head().unwrap();
        assert_eq!(head.header("Content-Length").is_some(), path == "/length", "{head:?}");
        let mut received = Received::default();
        client.body_in_pieces(&head, |piece| received.take(piece)).unwrap();
        assert_eq!(received.0, LONG, "{path}");
    }
    client.send(format!("POST /in HTTP/1.1\r\nHost: a\r\nContent-Length: {LONG}\r\n\r\n")).unwrap();
    send_pattern(LONG, 50_000, |piece| client.send(piece)).unwrap();
    assert_eq!(client.answer(false).unwrap().text(), LONG.to_string());
    client.send("POST /in HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
    send_pattern_chunked(LONG, 54_321, |piece| client.send(piece)).unwrap();
    assert_eq!(client.answer(false).unwrap().text(), LONG.to_string());

    let grown = rig.memory().saturating_sub(before);
    assert!(grown < GROWTH, "200 MiB of bodies left {} KiB behind", grown / 1024);
    let calls = rig.web[0].calls();
    assert!(calls.iter().all(|call| call.connection == calls[0].connection), "{calls:?}");
}

fn small_buffers(stream: &std::net::TcpStream) {
    let socket = socket2::SockRef::from(stream);
    socket.set_recv_buffer_size(64 * 1024).expect("a socket option");
    socket.set_send_buffer_size(64 * 1024).expect("a socket option");
}

/// Sends an endless body and counts its bytes.
fn endless(call: &mut Call<'_>, sent: &AtomicU64) -> Then {
    small_buffers(call.stream());
    let head = match call.path() {
        "/length" => format!("HTTP/1.1 200 OK\r\nContent-Length: {ENDLESS}\r\n\r\n"),
        "/chunked" => "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(),
        _ => "HTTP/1.1 200 OK\r\n\r\n".to_owned(),
    };
    let chunked = call.path() == "/chunked";
    if call.send(head).is_err() {
        return Then::Close;
    }
    let count = |written: io::Result<()>, length| written.map(|()| _ = sent.fetch_add(length as u64, Ordering::SeqCst));
    let write = |piece: &[u8]| count(call.stream().write_all(piece), piece.len());
    // It ends only with the connection.
    let ended =
        if chunked { send_pattern_chunked(ENDLESS, 16_000, write) } else { send_pattern(ENDLESS, 16_000, write) };
    assert!(ended.is_err(), "somebody took it all");
    Then::Close
}

#[test]
fn a_client_that_does_not_read_stops_the_node_and_costs_no_memory() {
    const CLIENTS: usize = 4;
    let sent = Arc::new(AtomicU64::new(0));
    let rig = Rig::web([Upstream::start({
        let sent = Arc::clone(&sent);
        move |call| endless(call, &sent)
    })]);
    let before = rig.memory();
    for path in ["/length", "/chunked", "/close"] {
        sent.store(0, Ordering::SeqCst);
        let mut clients: Vec<_> = (0..CLIENTS).map(|_| rig.origin()).collect();
        for client in &mut clients {
            small_buffers(&client.stream);
            client.send(get_request(path)).unwrap();
        }
        eventually("the node has all requests", || (rig.inflight() == CLIENTS as f64).then_some(()));
        let at_rest = at_rest("the node", || sent.load(Ordering::SeqCst));
        assert!(at_rest < CLIENTS as u64 * *SOCKET_BUFFERS, "{path}: the node could send {at_rest} bytes");
        let grown = rig.memory().saturating_sub(before);
        assert!(grown < GROWTH, "{path}: {} KiB for {CLIENTS} clients that do not read", grown / 1024);

        // Backpressure does not end the transfer: a client that resumes gets the rest, and the node can send again.
        let client = &mut clients[0];
        let head = client.head().unwrap();
        let mut received = Received::default();
        let wanted = usize::try_from(at_rest).unwrap() + MIB;
        if path == "/length" {
            client.exactly(wanted, |piece| received.take(piece)).unwrap();
        } else {
            read_chunks(client, wanted, &mut received);
        }
        assert_eq!(head.status, 200);
        assert!(received.0 >= wanted && sent.load(Ordering::SeqCst) > at_rest, "{path}: {} bytes", received.0);
        drop(clients);
        rig.becomes_idle();
        eventually("the node's connections end", || (rig.web[0].open_connections() == 0).then_some(()));
    }
}

/// Reads the content of chunks up to this number of bytes.
fn read_chunks(client: &mut Connection, wanted: usize, received: &mut Received) {
    let mut line = Vec::new();
    while received.0 < wanted {
        client.exactly(1, |byte| line.extend_from_slice(byte)).unwrap();
        if line.ends_with(b"\r\n") && line.len() > 2 {
            let size = std::str::from_utf8(&line).unwrap().trim();
            let size = usize::from_str_radix(size, 16).unwrap_or_else(|error| panic!("{error}: {size:?}"));
            client.exactly(size, |piece| received.take(piece)).unwrap();
            client.exactly(2, |_| ()).unwrap();
            line.clear();
        }
    }
}

#[test]
fn a_node_that_does_not_read_stops_the_client_and_costs_no_memory() {
    let gates = [Gate::default(), Gate::default()];
    let rig = Rig::web([Upstream::start({
        let gates = gates.clone();
        move |call| {
            small_buffers(call.stream());
            let mut received = Received::default();
            let gate = &gates[usize::from(call.seen.header("Content-Length").is_none())];
            if !call.wait(gate) || call.each_piece(|piece| received.take(piece)).is_err() {
                return Then::Close;
            }
            call.answer(&received.0.to_string())
        }
    })]);
    let before = rig.memory();
    let framings = [format!("Content-Length: {MUCH}"), "Transfer-Encoding: chunked".to_owned()];
    for (framing, gate) in framings.iter().zip(gates) {
        let sent = Arc::new(AtomicU64::new(0));
        let mut client = rig.origin();
        small_buffers(&client.stream);
        client.send(format!("POST / HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n")).unwrap();
        let chunked = framing.starts_with('T');
        let sending = std::thread::spawn({
            let (mut stream, sent) = (client.stream.try_clone().unwrap(), Arc::clone(&sent));
            move || {
                let write = |piece: &[u8]| {
                    stream.write_all(piece).map(|()| _ = sent.fetch_add(piece.len() as u64, Ordering::SeqCst))
                };
                if chunked { send_pattern_chunked(MUCH, 16_000, write) } else { send_pattern(MUCH, 16_000, write) }
            }
        });
        let at_rest = at_rest("the client", || sent.load(Ordering::SeqCst));
        assert!(at_rest < *SOCKET_BUFFERS, "{framing}: the client could send {at_rest} bytes");
        let grown = rig.memory().saturating_sub(before);
        assert!(grown < GROWTH, "{framing}: {} KiB for a node that does not read", grown / 1024);
        gate.open();
        sending.join().unwrap().expect("the whole body goes out");
        assert_eq!(client.answer(false).unwrap().text(), MUCH.to_string(), "{framing}");
    }
}
