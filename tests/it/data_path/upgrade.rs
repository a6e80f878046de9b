//! `Upgrade`: a tunnel begins only with the node's 101, carries both sides' bytes until both have ended, and no other
//! answer starts one.

mod through_varnish;
pub(super) mod websocket;

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use crate::data_path::proxy_protocol::encrypted;
use crate::data_path::rig::{Rig, always, get_request};
use crate::support::client::{Connection, Ending, get};
use crate::support::upstream::{Call, Gate, Then, Upstream};
use crate::support::{PATIENCE, eventually};
use websocket::{ASK, Opcode, SWITCH, echo, frame, read_frame, shake_hands};

/// A node that switches protocols, and then follows the script. It answers `/other` normally.
fn switching(script: impl Fn(&mut Call<'_>) -> Then + Send + Sync + 'static) -> Upstream {
    Upstream::start(move |call| {
        if call.path() == "/other" {
            return call.answer("other");
        }
        if call.send(SWITCH).is_ok() { script(call) } else { Then::Close }
    })
}

/// Checks that other requests are served by the same thread, which gives pending faults time to show.
fn others_are_served(rig: &Rig) {
    for _ in 0..50 {
        assert_eq!(get(rig.clearcoat.origin, "/other").unwrap().text(), "other");
    }
}

/// Random bytes that cannot be confused with others.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; length];
    random.fill(&mut bytes);
    bytes
}

#[test]
fn a_websocket_talks_both_ways_at_either_listener_and_is_counted() {
    let rig = Rig::start("", vec![Upstream::start(echo)], vec![Upstream::start(echo)]);
    for (mut client, node, metric) in [
        (rig.edge(), &rig.varnish[0], "clearcoat_edge_requests_total{code_class=\"1xx\",node=\"varnish-1\"}"),
        (rig.origin(), &rig.web[0], "clearcoat_origin_requests_total{code_class=\"1xx\",node=\"web-1\"}"),
    ] {
        shake_hands(&mut client);
        let head = &node.calls()[0];
        assert_eq!(
            (head.header("Upgrade"), head.header("Connection")),
            (Some("websocket"), Some("upgrade")),
            "{head:?}"
        );
        assert_eq!(head.header("X-Forwarded-For"), Some("127.0.0.1"), "{head:?}");
        assert_eq!(rig.inflight(), 1.0);
        for (length, seed) in [(0, 0), (1, 1), (125, 2), (126, 3), (65_535, 4), (65_536, 5), (4 << 20, 6)] {
            let message = noise(length, seed);
            let mut writer = client.stream.try_clone().unwrap();
            let sent = frame(Opcode::Binary, Some([1, 2, 3, 4]), &message);
            let sending = std::thread::spawn(move || writer.write_all(&sent));
            let (opcode, back) = read_frame(|length, take| client.exactly(length, take)).unwrap();
            sending.join().unwrap().unwrap();
            assert!(opcode == Opcode::Binary && back == message, "{length} bytes did not come back as they were");
        }
        client.send(frame(Opcode::Close, Some([9; 4]), b"\x03\xe8")).unwrap();
        let (opcode, _) = read_frame(|length, take| client.exactly(length, take)).unwrap();
        assert_eq!((opcode, client.rest()), (Opcode::Close, (Vec::new(), Ending::Clean)));
        drop(client);
        rig.becomes_idle();
        eventually("the tunnel is counted", || (rig.counter(metric) == 1.0).then_some(()));
        eventually("the node's connection ends", || (node.open_connections() == 0).then_some(()));
    }
    eventually("no client is left", || (rig.counter("clearcoat_edge_connections") == 0.0).then_some(()));
}

#[test]
fn what_a_client_sends_before_the_101_reaches_the_node_after_it() {
    let may_switch = Gate::default();
    let rig = Rig::web([Upstream::start({
        let may_switch = may_switch.clone();
        move |call| {
            if call.path() == "/other" {
                return call.answer("other");
            }
            if !call.wait(&may_switch) {
                return Then::Close;
            }
            // Nothing arrived before the 101, neither with the head nor after it.
            call.stream().set_nonblocking(true).unwrap();
            let looked = call.stream().peek(&mut [0]).map_err(|error| error.kind());
            call.stream().set_nonblocking(false).unwrap();
            assert_eq!(looked, Err(io::ErrorKind::WouldBlock), "bytes before the 101");
            let interim = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n";
            let begun = call.send(format!("{interim}{SWITCH}server first,")).is_ok();
            let (early, clean) = if begun { call.rest() } else { return Then::Close };
            assert!(clean);
            call.send_then(early, Then::Close)
        }
    })]);
    let mut client = rig.origin();
    client.send(format!("{ASK}with the head,")).unwrap();
    eventually("the node has the head", || (rig.web[0].calls().len() == 1).then_some(()));
    client.send("GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    others_are_served(&rig);
    may_switch.open();
    assert_eq!(client.head().unwrap().status, 101);
    client.send(",and later").unwrap();
    client.stream.shutdown(Shutdown::Write).unwrap();
    let (bytes, ending) = client.rest();
    let expected = "server first,with the head,GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n,and later";
    assert_eq!((String::from_utf8(bytes).unwrap().as_str(), ending), (expected, Ending::Clean));
    rig.becomes_idle();
}

#[test]
fn either_side_may_end_first_and_still_hear_the_other() {
    const LATER: usize = 1 << 20;
    let rig = Rig::web([switching(|call| {
        if call.seen.header("X-First") == Some("client") {
            let (bytes, clean) = call.rest();
            assert!(clean && bytes == noise(LATER, 1), "{} bytes", bytes.len());
            return call.send_then(noise(LATER, 2), Then::Close);
        }
        if call.send(noise(LATER, 2)).is_err() {
            return Then::Close;
        }
        call.stream().shutdown(Shutdown::Write).unwrap();
        let (bytes, clean) = call.rest();
        assert!(clean && bytes == noise(LATER, 1), "{} bytes", bytes.len());
        Then::Close
    })]);
    for first in ["client", "node"] {
        let mut client = rig.origin();
        client.send(ASK.replacen("Host", &format!("X-First: {first}\r\nHost"), 1)).unwrap();
        assert_eq!(client.head().unwrap().status, 101);
        if first == "client" {
            client.send(noise(LATER, 1)).unwrap();
            client.stream.shutdown(Shutdown::Write).unwrap();
        }
        let (bytes, ending) = client.rest();
        assert!(bytes == noise(LATER, 2) && ending == Ending::Clean, "{first}: {ending:?}, {} bytes", bytes.len());
        if first == "node" {
            assert_eq!(rig.inflight(), 1.0);
            client.send(noise(LATER, 1)).unwrap();
            client.stream.shutdown(Shutdown::Write).unwrap();
        }
        rig.becomes_idle();
        eventually("the node's connection ends", || (rig.web[0].open_connections() == 0).then_some(()));
    }
}

#[test]
fn a_tunnel_of_an_encrypted_client_ends_in_either_order_too() {
    let folder = tempfile::tempdir().unwrap();
    let (table, config) = encrypted(folder.path());
    let node = switching(|call| {
        let node_ends_first = call.seen.header("X-First") == Some("node");
        let mut word = Vec::new();
        call.exactly(4, |piece| word.extend_from_slice(piece)).unwrap();
        if call.send(noise(1 << 20, 7)).is_err() {
            return Then::Close;
        }
        if node_ends_first {
            call.stream().shutdown(Shutdown::Write).unwrap();
        }
        let (bytes, clean) = call.rest();
        assert_eq!((word.as_slice(), bytes.as_slice(), clean), (&b"ping"[..], &b"pong"[..], true));
        if node_ends_first { Then::Close } else { call.send_then("last", Then::Close) }
    });
    let rig = Rig::start(&table, vec![node], Vec::new());
    for first in ["client", "node"] {
        let socket = TcpStream::connect(rig.clearcoat.listening("edge.tls")[0]).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let name = rustls::pki_types::ServerName::try_from("shop.test").unwrap();
        let session = rustls::ClientConnection::new(Arc::clone(&config), name).unwrap();
        let mut client = rustls::StreamOwned::new(session, socket);
        let ask = ASK.replacen("Host", &format!("X-First: {first}\r\nHost"), 1);
        client.write_all(format!("{ask}ping").as_bytes()).unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            client.read_exact(&mut byte).unwrap();
            head.extend(byte);
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", head.escape_ascii());
        let mut body = vec![0; 1 << 20];
        client.read_exact(&mut body).unwrap();
        assert!(body == noise(1 << 20, 7));
        client.write_all(b"pong").unwrap();
        let mut rest = Vec::new();
        if first == "node" {
            client.read_to_end(&mut rest).expect("an end that is told by TLS");
        }
        client.conn.send_close_notify();
        client.flush().unwrap();
        if first == "client" {
            client.read_to_end(&mut rest).expect("an end that is told by TLS");
        }
        assert_eq!(rest, if first == "client" { &b"last"[..] } else { b"" });
        rig.becomes_idle();
    }
}

#[test]
fn a_side_that_breaks_off_takes_the_other_along() {
    let rig = Rig::web([switching(|call| {
        if call.seen.header("X-Breaks") == Some("node") {
            return Then::Reset;
        }
        // A reset, or the end that it became.
        let (bytes, _) = call.rest();
        assert_eq!(bytes, b"hello");
        Then::Close
    })]);
    let mut client = rig.origin();
    client.send(ASK.replacen("Host", "X-Breaks: node\r\nHost", 1)).unwrap();
    assert_eq!(client.head().unwrap().status, 101);
    assert_eq!(client.rest(), (Vec::new(), Ending::Reset));
    rig.becomes_idle();

    let mut client = rig.origin();
    client.send(format!("{ASK}hello")).unwrap();
    assert_eq!(client.head().unwrap().status, 101);
    socket2::SockRef::from(&client.stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    eventually("the node's connection ends", || (rig.web[0].open_connections() == 0).then_some(()));
    rig.becomes_idle();
    assert_eq!(rig.retries("web", "no_answer"), 0.0);
}

#[test]
fn neither_side_is_read_faster_than_the_other_takes() {
    let rig = Rig::web([switching(|call| {
        let piece = [b'x'; 64 * 1024];
        // Ends when the client has gone.
        while call.send(piece).is_ok() {}
        Then::Close
    })]);
    let before = rig.memory();
    let mut clients: Vec<_> = (0..8).map(|_| rig.origin()).collect();
    for client in &mut clients {
        client.send(ASK).unwrap();
        assert_eq!(client.head().unwrap().status, 101);
    }
    others_are_served(&rig);
    let grown = rig.memory().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more");
    drop(clients);
    rig.becomes_idle();
}

/// Invalid 101s: unsolicited, for another protocol, without a protocol.
const BAD_SWITCHES: [&str; 6] = [
    "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket2\r\n\r\n",
    "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket, h2c\r\n\r\n",
    "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\r\n",
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
    "HTTP/1.1 101 Switching Protocols\r\n\r\n",
];

#[test]
fn a_101_that_the_client_did_not_ask_for_is_a_502() {
    let h2c = "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n";
    for (switch, requests) in BAD_SWITCHES.iter().map(|bad| (*bad, vec![ASK])).chain([
        (SWITCH, vec!["GET / HTTP/1.1\r\nHost: a\r\n\r\n", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"]),
        (BAD_SWITCHES[0], vec![h2c]),
    ]) {
        let rig = Rig::web([always(switch, Then::Linger)]);
        for request in requests {
            let mut client = rig.origin();
            client.send(format!("{request}{}", get_request("/behind"))).unwrap();
            let answer = client.answer(false).unwrap();
            assert_eq!((answer.status, answer.header("Upgrade")), (502, None), "{switch}{request}");
            assert_eq!(client.rest(), (Vec::new(), Ending::Clean), "{switch}{request}");
        }
        eventually("the node is blamed", || rig.clearcoat.log().has("node failed a request").then_some(()));
        assert!(rig.web[0].calls().iter().all(|call| !call.head.contains("/behind")), "{:?}", rig.web[0].calls());
        rig.becomes_idle();
    }
}

#[test]
fn an_answer_other_than_101_is_an_ordinary_one() {
    let rig = Rig::web([Upstream::start(|call| {
        let answer = match call.path() {
            "/socket" => {
                "HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\nno"
            }
            "/chunked" => "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n",
            "/none" => "HTTP/1.1 204 No Content\r\n\r\n",
            _ => "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnext",
        };
        call.send_then(answer, Then::KeepAlive)
    })]);
    let mut client = rig.origin();
    for (path, status, body) in [("/socket", 426, "no"), ("/chunked", 200, "no"), ("/none", 204, "")] {
        for _ in 0..2 {
            client.send(ASK.replacen("/socket", path, 1)).unwrap();
            let answer = client.answer(false).unwrap();
            assert_eq!((answer.status, answer.text(), answer.header("Connection")), (status, body, None), "{answer:?}");
            client.send(get_request("/next")).unwrap();
            assert_eq!(client.answer(false).unwrap().text(), "next", "behind {path}");
        }
    }
}

#[test]
fn an_offer_that_could_hide_requests_is_not_passed_on() {
    let offers = [
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: H2C\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: HTTP/2.0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket, h2c\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: \r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n\r\nhello",
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n\r\nhello",
        "HEAD / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        "GET / HTTP/1.0\r\nHost: a\r\nConnection: Upgrade, keep-alive\r\nUpgrade: websocket\r\n\r\n",
    ];
    let rig = Rig::start("", vec![Upstream::echo()], vec![Upstream::echo()]);
    for (address, node) in [(rig.clearcoat.edge, &rig.varnish[0]), (rig.clearcoat.origin, &rig.web[0])] {
        for offer in offers {
            let mut client = Connection::open(address).unwrap();
            client.send(format!("{offer}{}", get_request("/next"))).unwrap();
            let answer = client.answer(offer.starts_with("HEAD")).unwrap_or_else(|error| panic!("{offer}: {error}"));
            assert_eq!(answer.status, 200, "{offer}");
            assert_eq!(client.answer(false).unwrap().text(), "/next", "{offer}");
        }
        let calls = node.calls();
        assert_eq!(calls.len(), 2 * offers.len());
        for call in calls {
            let seen = ["Upgrade", "Connection", "HTTP2-Settings"].map(|name| call.header(name).map(str::to_owned));
            assert_eq!(seen, [None, None, None], "{}", call.head);
        }
    }
}

/// CVE-2026-2833: a proxy that passed bytes on as soon as a client asked for an upgrade let requests through unchecked.
#[test]
fn a_request_after_a_declined_upgrade_offer_is_checked_like_any_other() {
    let rig = Rig::start("", vec![Upstream::echo()], vec![Upstream::echo()]);
    for (address, node, client_is) in [
        (rig.clearcoat.edge, &rig.varnish[0], "127.0.0.1"),
        // The client's address is that of a Varnish, and so trusted.
        (rig.clearcoat.origin, &rig.web[0], "6.6.6.6, 127.0.0.1"),
    ] {
        let forged = "GET /second HTTP/1.1\r\nHost: shop.test\r\nX-Forwarded-For: 6.6.6.6\r\nConnection: X-Secret\r\n\
            X-Secret: s\r\n\r\n";
        let purge = "PURGE / HTTP/1.1\r\nHost: shop.test\r\nX-Magento-Tags-Pattern: .*\r\n\r\n";
        let ambiguous =
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
        let bare = "GET /third HTTP/1.1\nHost: a\n\n";
        for (behind, status) in [(forged, 200), (purge, 405), (ambiguous, 400), (bare, 400)] {
            for cut in [0, 1, behind.len()] {
                let mut client = Connection::open(address).unwrap();
                client.send(format!("{ASK}{}", &behind[..cut])).unwrap();
                client.send(&behind[cut..]).unwrap();
                assert_eq!(client.answer(false).unwrap().text(), "/socket");
                assert_eq!(client.answer(false).unwrap().status, status, "{behind}");
            }
        }
        let (bytes, calls) = node.all_traffic();
        let heads: usize = calls.iter().map(|call| call.head.len()).sum();
        assert_eq!(bytes, heads as u64, "bytes that are no request of ours reached the node");
        let count = |path: &str| calls.iter().filter(|call| call.head.starts_with(&format!("GET {path} "))).count();
        assert_eq!((count("/socket"), count("/second"), calls.len()), (12, 3, 15), "{calls:?}");
        for call in calls.iter().filter(|call| call.head.starts_with("GET /second ")) {
            assert_eq!((call.header("X-Forwarded-For"), call.header("X-Secret")), (Some(client_is), None), "{call:?}");
        }
    }
}

#[test]
fn a_tunnel_outlives_the_first_signal_and_ends_with_the_process() {
    let ended = Gate::default();
    let mut rig = Rig::start(
        "",
        Vec::new(),
        vec![switching({
            let ended = ended.clone();
            move |call| {
                let mut word = Vec::new();
                while call.exactly(4, |piece| word.extend_from_slice(piece)).is_ok() {
                    if call.send(std::mem::take(&mut word)).is_err() {
                        break;
                    }
                }
                ended.open();
                Then::Close
            }
        })],
    );
    let mut client = rig.origin();
    client.send(ASK).unwrap();
    assert_eq!(client.head().unwrap().status, 101);
    let mut say = |word: &[u8; 4]| {
        client.send(word).unwrap();
        let mut back = [0; 4];
        client.stream.read_exact(&mut back).unwrap();
        assert_eq!(&back, word);
    };
    say(b"ping");
    rig.clearcoat.terminate();
    eventually("it is about to end", || rig.clearcoat.log().has("ending: requests under way").then_some(()));
    say(b"pong");
    rig.clearcoat.terminate();
    assert_ne!(client.rest().1, Ending::Open);
    ended.wait("the node's side of the tunnel ends");
    let status = rig.clearcoat.wait();
    assert!(status.success(), "{status}");
}
