//! The PROXY protocol from a balancer in front of the edge: the client named by its header is the client for everything
//! that depends on it. The header to the Varnish behind is tested in `to_varnish`.

mod to_varnish;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;

use crate::data_path::rig::{Rig, get_request};
use crate::support::client::{Connection, Ending, exchange};
use crate::support::eventually;
use crate::support::upstream::{Call, Then, Upstream};

/// The address of the trusted balancer. All others are untrusted.
const BALANCER: [u8; 4] = [127, 0, 0, 2];

const FORGED: &str = "GET / HTTP/1.1\r\nHost: shop.test\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n";

/// An edge that expects a header from the balancer, in front of a Varnish that answers with the client's address.
fn accepting(config: &str) -> Rig {
    let edge = "[edge]\nlisten = [\"127.0.0.1:0\"]\nproxy_protocol = \"accept\"\ntrusted_proxies = [\"127.0.0.2/32\"]";
    Rig::start(&format!("{edge}\n{config}"), vec![telling()], Vec::new())
}

fn telling() -> Upstream {
    Upstream::start(|call: &mut Call<'_>| -> Then {
        let client = call.seen.header("X-Forwarded-For").unwrap_or("nobody").to_owned();
        call.answer(&client)
    })
}

fn from_balancer(edge: SocketAddr) -> Connection {
    Connection::open_from(BALANCER, edge).expect("the edge accepts")
}

/// A header of version 2 with this command, family and address block.
fn v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
    let len = u16::try_from(block.len()).expect("a short block");
    [b"\r\n\r\n\0\r\nQUIT\n", &[command, family][..], &len.to_be_bytes(), block].concat()
}

/// A listener with TLS, its certificate in this folder, and clients that accept it.
pub(super) fn encrypted(folder: &Path) -> (String, Arc<rustls::ClientConfig>) {
    let issued = rcgen::generate_simple_self_signed(["shop.test".to_owned()]).expect("a certificate");
    let (cert, key) = (folder.join("shop.pem"), folder.join("shop.key"));
    std::fs::write(&cert, issued.cert.pem()).expect("a file");
    std::fs::write(&key, issued.signing_key.serialize_pem()).expect("a file");
    let table = format!("[[edge.tls]]\nlisten = [\"127.0.0.1:0\"]\ncert = {cert:?}\nkey = {key:?}");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(issued.cert.der().clone()).expect("a certificate");
    let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    (table, Arc::new(config))
}

/// 203.0.113.7:4660 to 10.0.0.1:443.
const IPV4: [u8; 12] = [203, 0, 113, 7, 10, 0, 0, 1, 0x12, 0x34, 0x01, 0xbb];

fn naming_ipv6() -> Vec<u8> {
    let address = |last| [0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
    v2(0x21, 0x21, &[&address(7)[..], &address(1), &[0x12, 0x34, 0x01, 0xbb]].concat())
}

/// Headers that name a client, and the client.
fn naming() -> Vec<(Vec<u8>, &'static str)> {
    let line = |line: &str| line.as_bytes().to_vec();
    // A TLV of an unassigned type, longer than one read.
    let tlvs = [&IPV4[..], &[0xee, 0x04, 0x00], &[0; 1024]].concat();
    vec![
        (line("PROXY TCP4 203.0.113.7 10.0.0.1 4660 443\r\n"), "203.0.113.7"),
        (line("PROXY TCP6 2001:db8::7 2001:db8::1 4660 443\r\n"), "2001:db8::7"),
        (line("PROXY TCP6 ::ffff:203.0.113.7 ::ffff:10.0.0.1 4660 443\r\n"), "203.0.113.7"),
        (v2(0x21, 0x11, &IPV4), "203.0.113.7"),
        (v2(0x21, 0x11, &tlvs), "203.0.113.7"),
        (naming_ipv6(), "2001:db8::7"),
    ]
}

#[test]
fn whom_the_header_names_is_the_client_however_the_bytes_are_cut() {
    let rig = accepting("");
    for (header, client) in naming() {
        let wire = [&header[..], FORGED.as_bytes(), FORGED.as_bytes()].concat();
        let cut_behind_the_header = [&wire[..header.len()], &wire[header.len()..]];
        let cuts: [Vec<&[u8]>; 4] =
            [vec![&wire], wire.chunks(1).collect(), wire.chunks(7).collect(), cut_behind_the_header.into()];
        for pieces in cuts {
            let mut balancer = from_balancer(rig.clearcoat.edge);
            pieces.iter().for_each(|piece| balancer.send(piece).expect("the edge reads"));
            for _ in 0..2 {
                let answer = balancer.answer(false).unwrap_or_else(|error| panic!("{client}: {error}"));
                // The named client is untrusted, so its own fields are ignored.
                assert_eq!((answer.status, answer.text()), (200, client), "{} pieces", pieces.len());
            }
        }
    }
    assert_eq!(rig.counter("clearcoat_edge_connections_refused_total"), 0.0);
}

#[test]
fn a_header_that_names_nobody_leaves_the_balancer_as_the_client() {
    let rig = accepting("");
    let unix = v2(0x21, 0x31, &[b'x'; 216]);
    for header in [
        b"PROXY UNKNOWN\r\n".to_vec(),
        b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n".to_vec(),
        v2(0x20, 0x00, &[]),
        v2(0x20, 0x11, &IPV4),
        v2(0x21, 0x00, b"ignored"),
        unix,
    ] {
        for step in [header.len(), 1] {
            let mut balancer = from_balancer(rig.clearcoat.edge);
            header.chunks(step).for_each(|piece| balancer.send(piece).expect("the edge reads"));
            balancer.send(FORGED).unwrap();
            // The client behind the balancer is untrusted, though the balancer is trusted.
            assert_eq!(balancer.answer(false).unwrap().text(), "127.0.0.2", "{}", header.escape_ascii());
        }
    }
}

#[test]
fn whom_a_header_names_not_is_bounded_and_forwarded_as_a_stranger() {
    let rig = accepting("[limits]\nmax_connections_per_address = 2");
    let forged = "GET / HTTP/1.1\r\nHost: shop.test\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: evil\r\n\r\n";
    let mut unknown: Vec<_> = (0..2)
        .map(|_| {
            let mut balancer = from_balancer(rig.clearcoat.edge);
            balancer.send(format!("PROXY UNKNOWN\r\n{forged}{forged}")).unwrap();
            (0..2).for_each(|_| assert_eq!(balancer.answer(false).unwrap().text(), "127.0.0.2"));
            balancer
        })
        .collect();
    let head = rig.varnish[0].calls().pop().unwrap().head;
    assert!(head.contains("X-Forwarded-Proto: http\r\n") && head.contains("X-Forwarded-Host: shop.test\r\n"), "{head}");
    // The balancer itself is exempt from that limit, its clients are not.
    let mut third = from_balancer(rig.clearcoat.edge);
    _ = third.send(format!("PROXY UNKNOWN\r\n{forged}"));
    assert!(third.answer(false).is_err());
    drop(unknown.pop());
    eventually("there is room again", || {
        let mut next = from_balancer(rig.clearcoat.edge);
        let sent = next.send(format!("PROXY UNKNOWN\r\n{forged}")).is_ok();
        (sent && next.answer(false).is_ok_and(|answer| answer.status == 200)).then_some(())
    });
}

#[test]
fn a_balancer_that_sends_no_proper_header_is_closed_and_reaches_no_node() {
    let rig = accepting("");
    let line = |line: &str| line.as_bytes().to_vec();
    let too_long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(100));
    for begins in [
        Vec::new(),
        line("PROXY TCP4 203.0.113.7 10.0.0.1 4660 443\n"),
        line("PROXY TCP4 203.0.113.7 10.0.0.1 4660 443 \r\n"),
        line("PROXY TCP4 203.0.113.7 10.0.0.1 4660\r\n"),
        line("PROXY TCP4 203.0.113.07 10.0.0.1 4660 443\r\n"),
        line("PROXY TCP4 2001:db8::7 2001:db8::1 4660 443\r\n"),
        line("PROXY UDP4 203.0.113.7 10.0.0.1 4660 443\r\n"),
        line("proxy TCP4 203.0.113.7 10.0.0.1 4660 443\r\n"),
        line(" PROXY TCP4 203.0.113.7 10.0.0.1 4660 443\r\n"),
        line(&too_long),
        v2(0x11, 0x11, &IPV4),
        v2(0x22, 0x11, &IPV4),
        v2(0x21, 0x12, &IPV4),
        v2(0x21, 0x11, &IPV4[..11]),
        v2(0x21, 0x21, &IPV4),
        v2(0x21, 0x11, &[0; 4096]),
        // The start of a TLS handshake.
        vec![0x16, 0x03, 0x01, 0x02, 0x00],
    ] {
        let mut balancer = from_balancer(rig.clearcoat.edge);
        balancer.send([&begins[..], get_request("/smuggled").as_bytes()].concat()).expect("the edge reads");
        let (bytes, ending) = balancer.rest();
        assert!(bytes.is_empty(), "{}: an answer: {}", begins.escape_ascii(), bytes.escape_ascii());
        assert_ne!(ending, Ending::Open, "{}", begins.escape_ascii());
    }
    // Connections without a byte, as from a balancer's health checks, or cut within a header.
    for half in [&b""[..], b"PROXY TCP4 203", b"\r\n\r\n\0\r\nQUIT"] {
        let mut balancer = from_balancer(rig.clearcoat.edge);
        balancer.send(half).unwrap();
        balancer.stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(balancer.rest(), (Vec::new(), Ending::Clean), "{}", half.escape_ascii());
    }
    let (bytes, calls) = rig.varnish[0].all_traffic();
    assert_eq!((bytes, calls), (0, Vec::new()));
    eventually("every connection is gone", || (rig.counter("clearcoat_edge_connections") == 0.0).then_some(()));
}

#[test]
fn a_strangers_header_is_no_http_and_neither_is_anybodys_where_it_is_off() {
    let off =
        Rig::start("[edge]\nlisten = [\"127.0.0.1:0\"]\ntrusted_proxies = [\"127.0.0.2/32\"]", vec![telling()], vec![]);
    let on = accepting("");
    for (rig, source) in [(&on, [127, 0, 0, 1]), (&off, [127, 0, 0, 1]), (&off, BALANCER)] {
        for (header, _) in naming() {
            let mut stranger = Connection::open_from(source, rig.clearcoat.edge).unwrap();
            stranger.send([&header[..], get_request("/smuggled").as_bytes()].concat()).unwrap();
            assert_eq!(stranger.answer(false).unwrap().status, 400, "{}", header.escape_ascii());
            assert_eq!(stranger.rest(), (Vec::new(), Ending::Clean), "{}", header.escape_ascii());
        }
        assert_eq!(rig.varnish[0].all_traffic(), (0, Vec::new()));
    }
    // Addresses other than the balancer's are served as usual.
    let answer = exchange(on.clearcoat.edge, FORGED).unwrap();
    assert_eq!((answer.status, answer.text()), (200, "127.0.0.1"));
}

#[test]
fn a_header_has_a_timeout_as_a_whole_and_idling_after_it_has_longer() {
    let rig = accepting("[timeouts]\nclient_header = \"1s\"");
    let mut resting = from_balancer(rig.clearcoat.edge);
    resting.send("PROXY TCP4 203.0.113.7 10.0.0.1 4660 443\r\n").unwrap();

    let began = Instant::now();
    let silent = from_balancer(rig.clearcoat.edge);
    let mut stalled = from_balancer(rig.clearcoat.edge);
    stalled.send("PROXY TCP4 203.0.113").unwrap();
    let mut dripping = from_balancer(rig.clearcoat.edge);
    dripping.send("PROXY UNKNOWN ").unwrap();
    let mut writer = dripping.stream.try_clone().unwrap();
    let drip = std::thread::spawn(move || {
        while writer.write_all(b"x").is_ok() {
            // The pace of this balancer, not a synchronisation.
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    for (mut balancer, what) in [(silent, "silent"), (stalled, "stalled"), (dripping, "dripping")] {
        let (bytes, ending) = balancer.rest();
        assert!(bytes.is_empty() && ending != Ending::Open, "{what}: {ending:?} {}", bytes.escape_ascii());
        let waited = began.elapsed();
        assert!(waited > Duration::from_millis(800) && waited < Duration::from_secs(8), "{what}: {waited:?}");
    }
    drip.join().unwrap();
    resting.send(FORGED).unwrap();
    assert_eq!(resting.answer(false).unwrap().text(), "203.0.113.7");
}

#[test]
fn a_header_stands_before_the_handshake_where_the_listener_speaks_tls() {
    let folder = tempfile::tempdir().unwrap();
    let (table, config) = encrypted(folder.path());
    let rig = accepting(&table);
    let address = rig.clearcoat.listening("edge.tls")[0];

    for (header, client) in naming() {
        for step in [usize::MAX, 1] {
            // The header and the start of the handshake in one packet, and both in single bytes.
            let name = ServerName::try_from("shop.test").unwrap();
            let mut session = rustls::ClientConnection::new(Arc::clone(&config), name).unwrap();
            let mut wire = header.clone();
            session.write_tls(&mut wire).unwrap();
            let mut balancer = from_balancer(address);
            wire.chunks(step.min(wire.len())).for_each(|piece| balancer.send(piece).expect("the edge reads"));
            let mut stream = rustls::StreamOwned::new(session, balancer.stream);
            let close = FORGED.replacen("Host", "Connection: close\r\nHost", 1);
            stream.write_all(close.as_bytes()).unwrap_or_else(|error| panic!("{client}: {error}"));
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap_or_else(|error| panic!("{client}: {error}"));
            let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
            assert!(head.starts_with("HTTP/1.1 200 "), "{answer}");
            assert_eq!(body, client);
        }
    }

    // A real client that sends the header itself; and no handshake without a header.
    for version in ["--http1.1", "--http2"] {
        let url = format!("https://{address}/");
        let curl = |more: &[&str]| {
            let mut command = Command::new("curl");
            command.args(["--silent", "--insecure", "--interface", "127.0.0.2", version]).args(more).arg(&url);
            command.output().expect("curl is installed (make test installs it)")
        };
        let output = curl(&["--haproxy-protocol"]);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "127.0.0.2", "{version}: {}", output.status);
        let output = curl(&[]);
        assert!(!output.status.success() && output.stdout.is_empty(), "{version}: {output:?}");
    }
}

#[test]
fn the_named_address_counts_for_the_limit_and_the_balancer_does_not() {
    let rig = accepting("[limits]\nmax_connections_per_address = 2");
    let edge = rig.clearcoat.edge;
    let of = |client: &str| {
        let mut balancer = from_balancer(edge);
        // Once refused, it may be closed before all is written.
        _ = balancer.send(format!("PROXY TCP4 {client} 10.0.0.1 4660 443\r\n{FORGED}"));
        balancer.answer(false).ok().map(|answer| (balancer, answer))
    };
    let kept: Vec<_> = ["203.0.113.7", "203.0.113.8", "203.0.113.7", "203.0.113.8"].map(of).into();
    assert!(kept.iter().all(|client| client.as_ref().is_some_and(|(_, answer)| answer.status == 200)));
    assert!(of("203.0.113.7").is_none(), "a third connection of one address");
    assert_eq!(rig.counter("clearcoat_edge_connections_refused_total"), 1.0);
    assert!(of("203.0.113.9").is_some());
    for _ in 0..4 {
        let mut balancer = from_balancer(edge);
        balancer.send(format!("PROXY UNKNOWN\r\n{FORGED}")).unwrap();
        assert_eq!(balancer.answer(false).unwrap().status, 200);
    }
    drop(kept);
    eventually("there is room for the address again", || of("203.0.113.7"));
}
