//! TLS at the edge: bodies, certificates, and failing connections.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustls::version::{TLS12, TLS13};

use crate::data_path::rig::{Rig, at_rest};
use crate::support::clearcoat::run;
use crate::support::client::{Connection, Ending, exchange};
use crate::support::tls::{Client, Issued, Session, socket};
use crate::support::upstream::{Call, Gate, Then, Upstream};
use crate::support::{PATIENCE, eventually, eventually_within};

const MIB: usize = 1024 * 1024;

/// Empty, one byte, one read, and more than any buffer on the way.
pub const SIZES: [usize; 5] = [0, 1, 16 * 1024, MIB, 20 * MIB];

/// A clearcoat with one certificate at the edge, for `shop.test`.
pub struct Secure {
    pub rig: Rig,
    pub folder: tempfile::TempDir,
}

impl Secure {
    /// `edge`: keys of its section; `more`: other sections.
    pub fn start(edge: &str, more: &str, varnish: Vec<Upstream>) -> Self {
        Secure::start_with(edge, more, varnish, Vec::new())
    }

    /// Without any cache: the edge forwards to these web nodes.
    pub fn start_with_web(edge: &str, web: Vec<Upstream>) -> Self {
        Secure::start_with(edge, "", Vec::new(), web)
    }

    fn start_with(edge: &str, more: &str, varnish: Vec<Upstream>, web: Vec<Upstream>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let certificate = Issued::for_names(&["shop.test"]);
        let table = certificate.write(folder.path(), "shop").toml("127.0.0.1:0");
        let config = format!("{more}\n[edge]\nlisten = [\"127.0.0.1:0\"]\n{edge}\n{table}");
        Secure { rig: Rig::start(&config, varnish, web), folder }
    }

    pub fn address(&self) -> SocketAddr {
        self.rig.clearcoat.edge_tls[0]
    }

    /// An HTTP/1.1 connection.
    pub fn session(&self) -> Session {
        Client::of(&TLS13, &[b"http/1.1"]).connect(self.address(), "shop.test").expect("a handshake")
    }

    /// Runs curl, which verifies the certificate, for a path of the shop.
    pub fn curl(&self, arguments: &[&str], path: &str) -> Output {
        let port = self.address().port();
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--max-time", "30", "--cacert"])
            .arg(self.folder.path().join("shop.pem"));
        curl.args(["--resolve", &format!("shop.test:{port}:127.0.0.1")]).args(arguments);
        curl.arg(format!("https://shop.test:{port}{path}")).stdin(Stdio::null()).output().expect("curl")
    }
}

/// A body of this size with a prime period, so that lost, duplicated or swapped bytes are detected.
pub fn body_of(size: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(1);
    let pattern: Vec<u8> = (0..65_521).map(|_| random.u8(..)).collect();
    pattern.into_iter().cycle().take(size).collect()
}

/// Sends a body of the requested size (`/length/7`, `/chunked/7`, `/close/7`), and reports the size of request bodies.
pub fn mirror() -> Upstream {
    Upstream::start(|call| {
        let path = call.path().to_owned();
        let Ok(received) = call.body() else { return Then::Close };
        let Some((kind, size)) = path.trim_start_matches('/').split_once('/') else {
            let whole = if received == body_of(received.len()) { "whole" } else { "mangled" };
            return call.answer(&format!("{} {whole}", received.len()));
        };
        let body = body_of(size.parse().expect("a size"));
        let sent = match kind {
            "length" => {
                call.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n")).and_then(|()| call.send(body))
            }
            "chunked" => call.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").and_then(|()| {
                for piece in body.chunks(12_345) {
                    call.send([format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat())?;
                }
                call.send("0\r\n\r\n")
            }),
            _ => return call.send_then([b"HTTP/1.1 200 OK\r\n\r\n", &body[..]].concat(), Then::Linger),
        };
        if sent.is_ok() { Then::KeepAlive } else { Then::Close }
    })
}

#[test]
fn bodies_of_every_size_pass_whole_in_both_directions_over_one_connection() {
    let secure = Secure::start("", "", vec![mirror()]);
    for version in [&TLS12, &TLS13] {
        let mut client = Client::of(version, &[b"http/1.1"]).connect(secure.address(), "shop.test").unwrap();
        assert_eq!(client.tls.conn.protocol_version(), Some(version.version));
        for size in SIZES {
            let body = body_of(size);
            for kind in ["length", "chunked", "close"] {
                let answer = client.get(&format!("/{kind}/{size}")).unwrap();
                assert!(answer.status == 200 && answer.body == body, "{version:?} {kind} {size}: {}", answer.head);
            }
            client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n")).unwrap();
            client.send(&body).unwrap();
            assert_eq!(client.answer().unwrap().text(), format!("{size} whole"), "{version:?}");
            client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
            for piece in body.chunks(23_456) {
                client.send([format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat()).unwrap();
            }
            client.send("0\r\n\r\n").unwrap();
            assert_eq!(client.answer().unwrap().text(), format!("{size} whole"), "{version:?}, chunked");
        }
    }
    let calls = secure.rig.varnish[0].calls();
    assert!(calls.iter().all(|call| call.header("X-Forwarded-Proto") == Some("https")), "{calls:?}");
}

#[test]
fn curl_verifies_the_certificate_and_transfers_bodies_in_every_version() {
    let secure = Secure::start("", "", vec![mirror()]);
    let file = secure.folder.path().join("body");
    for size in SIZES {
        std::fs::write(&file, body_of(size)).unwrap();
        let upload = format!("@{}", file.display());
        for (arguments, http) in [
            (&["--http1.1", "--tls-max", "1.2"][..], "1.1"),
            (&["--http1.1", "--tlsv1.3"], "1.1"),
            (&["--http2", "--tls-max", "1.2"], "2"),
            (&["--http2", "--tlsv1.3"], "2"),
        ] {
            for kind in ["length", "chunked", "close"] {
                let output = secure.curl(arguments, &format!("/{kind}/{size}"));
                let error = String::from_utf8_lossy(&output.stderr);
                assert!(
                    output.status.success() && output.stdout == body_of(size),
                    "{arguments:?} {kind} {size}: {error}"
                );
            }
            for how in
                [&["--data-binary", &upload][..], &["--header", "Transfer-Encoding: chunked", "--data-binary", &upload]]
            {
                // This header makes curl leave out the length; with HTTP/2 curl never sends it.
                let arguments = [arguments, how, &["--write-out", " %{http_version}"]].concat();
                let output = secure.curl(&arguments, "/");
                let said = String::from_utf8_lossy(&output.stdout).into_owned();
                assert_eq!(said, format!("{size} whole {http}"), "{arguments:?}: {output:?}");
            }
        }
    }
}

#[test]
fn sni_selects_among_a_listeners_certificates_and_each_has_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let issued = [["shop.test"], ["*.other.test"], ["third.test"]].map(|names| Issued::for_names(&names));
    let listens = ["127.0.0.1:0", "127.0.0.1:0", "127.0.0.2:0"];
    let tables = issued.iter().zip(listens).enumerate();
    let tables = tables.map(|(at, (issued, listen))| issued.write(folder.path(), &at.to_string()).toml(listen));
    let config = format!("[edge]\nlisten = [\"127.0.0.1:0\"]\n{}", tables.collect::<String>());
    let rig = Rig::start(&config, vec![Upstream::echo()], Vec::new());
    let [two, one] = rig.clearcoat.edge_tls[..] else { panic!("{:?}", rig.clearcoat.edge_tls) };
    for (address, name, expected) in [
        (two, "shop.test", 0),
        (two, "SHOP.test", 0),
        (two, "www.other.test", 1),
        (two, "a.b.other.test", 0),
        (two, "unknown.test", 0),
        (two, "127.0.0.1", 0),
        (one, "third.test", 2),
        (one, "shop.test", 2),
    ] {
        for version in [&TLS12, &TLS13] {
            let mut client = Client::of(version, &[]).connect(address, name).unwrap();
            assert!(client.served() == issued[expected].der, "{name} at {address}");
            assert_eq!(client.get("/page").unwrap().text(), "/page");
        }
    }
}

/// The numbers of successful and failed certificate reloads.
fn reloads(rig: &Rig) -> [f64; 2] {
    ["ok", "failed"].map(|result| rig.clearcoat.metric(&format!("clearcoat_tls_reloads_total{{result=\"{result}\"}}")))
}

#[test]
fn a_renewed_certificate_serves_new_connections_and_a_broken_one_none() {
    let rest = Gate::default();
    let secure = Secure::start(
        "",
        "",
        vec![Upstream::start({
            let rest = rest.clone();
            move |call| {
                if call.path() != "/long" {
                    return call.answer("short");
                }
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 2 * MIB);
                let begun = call.send(head).is_ok() && call.send(&body_of(2 * MIB)[..MIB]).is_ok();
                if begun && call.wait(&rest) {
                    call.send_then(&body_of(2 * MIB)[MIB..], Then::KeepAlive)
                } else {
                    Then::Close
                }
            }
        })],
    );
    let client = Client::of(&TLS13, &[]);
    let mut download = client.connect(secure.address(), "shop.test").unwrap();
    download.send("GET /long HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let head = download.head().unwrap();
    let mut body = download.exactly(MIB).unwrap();
    assert_eq!((head.status, reloads(&secure.rig)), (200, [0.0, 0.0]));

    let renewed = Issued::for_names(&["shop.test"]);
    let files = renewed.write(secure.folder.path(), "shop");
    eventually("the new certificate is in use", || (reloads(&secure.rig)[0] == 1.0).then_some(()));
    // Half a certificate and half a key may have been read between the two writes: one temporary failure.
    let [_, failed] = reloads(&secure.rig);
    let mut after = Client::of(&TLS13, &[]).connect(secure.address(), "shop.test").unwrap();
    assert!(after.served() == renewed.der, "the old certificate is served on");
    assert_eq!(after.get("/").unwrap().text(), "short");

    std::fs::write(&files.cert, "-----BEGIN CERTIFICATE-----\nnot base64!\n").unwrap();
    eventually("the broken file is noticed", || (reloads(&secure.rig) == [1.0, failed + 1.0]).then_some(()));
    let text = files.cert.display().to_string();
    eventually("the log names the file", || secure.rig.clearcoat.log().has(&text).then_some(()));
    let mut after = Client::of(&TLS13, &[]).connect(secure.address(), "shop.test").unwrap();
    assert!(after.served() == renewed.der, "a broken file took a certificate away");
    assert_eq!(after.get("/").unwrap().text(), "short");
    // A session from before the renewal can still be resumed.
    assert!(client.connect(secure.address(), "shop.test").unwrap().resumed());

    rest.open();
    body.append(&mut download.exactly(MIB).unwrap());
    assert!(body == body_of(2 * MIB), "the download of before is not whole");
    assert_eq!(download.get("/again").unwrap().text(), "short");
}

#[test]
fn who_comes_back_resumes_with_either_version() {
    let secure = Secure::start("", "", vec![Upstream::echo()]);
    for version in [&TLS12, &TLS13] {
        let client = Client::of(version, &[]);
        for again in [false, true] {
            let mut session = client.connect(secure.address(), "shop.test").unwrap();
            assert_eq!(session.resumed(), again, "{version:?}");
            assert_eq!(session.get("/page").unwrap().text(), "/page");
        }
    }
}

#[test]
fn check_refuses_certificate_files_that_cannot_be_used_and_names_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let (good, other) = (Issued::for_names(&["a"]).write(path, "good"), Issued::for_names(&["b"]).write(path, "other"));
    let check = |cert: &Path, key: &Path| {
        let (cert, key) = (cert.display(), key.display());
        let config = path.join("clearcoat.toml");
        let table = format!("[[edge.tls]]\nlisten = [\"127.0.0.1:0\"]\ncert = \"{cert}\"\nkey = \"{key}\"\n");
        std::fs::write(&config, table).unwrap();
        let output = run(&["check", "--config", &config.to_string_lossy()]);
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let (accepted, said) = check(&good.cert, &good.key);
    assert!(accepted, "{said}");
    for (name, content) in [("empty", ""), ("text", "hello"), ("cut", "-----BEGIN CERTIFICATE-----\nMIIB\n")] {
        std::fs::write(path.join(name), content).unwrap();
    }
    let [missing, empty, text, cut] = ["missing", "empty", "text", "cut"].map(|name| path.join(name));
    for (cert, key, named) in [
        (&missing, &good.key, &missing),
        (&good.cert, &missing, &missing),
        (&empty, &good.key, &empty),
        (&text, &good.key, &text),
        (&cut, &good.key, &cut),
        (&good.cert, &empty, &empty),
        (&good.cert, &good.cert, &good.cert),
        (&good.key, &good.key, &good.key),
        (&good.cert, &other.key, &other.key),
    ] {
        let (accepted, said) = check(cert, key);
        assert!(!accepted && said.contains(&*named.to_string_lossy()), "{cert:?}, {key:?}: {said}");
    }
}

#[test]
fn who_does_not_speak_tls_is_sent_away_and_harms_nobody() {
    let secure = Secure::start("", "", vec![Upstream::echo()]);
    let mut bystander = secure.session();
    assert_eq!(bystander.get("/before").unwrap().text(), "/before");
    for bytes in
        [&b"GET /plain HTTP/1.1\r\nHost: shop.test\r\n\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[0; 4096]]
    {
        let mut client = Connection::open(secure.address()).unwrap();
        client.send(bytes).unwrap();
        let (said, ending) = client.rest();
        assert!(!said.starts_with(b"HTTP/") && ending != Ending::Open, "{said:?} {ending:?}");
    }
    // No bytes at all, and an end.
    let silent = socket(secure.address());
    silent.shutdown(Shutdown::Write).unwrap();
    assert_eq!((&silent).read(&mut [0; 16]).unwrap_or(0), 0);
    assert_eq!(bystander.get("/after").unwrap().text(), "/after");
    let (_, calls) = secure.rig.varnish[0].all_traffic();
    assert_eq!(calls.len(), 2, "{calls:?}");
}

#[test]
fn a_stalled_handshake_is_ended_by_the_header_timeout_even_if_trickling() {
    let secure = Secure::start("", "[timeouts]\nclient_header = \"2s\"", vec![Upstream::echo()]);
    let mut bystander = secure.session();
    // The start of a ClientHello: a record of 512 bytes.
    let hello = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    let began = Instant::now();
    let clients = [&[][..], &hello, &hello].map(|bytes| {
        let mut client = socket(secure.address());
        client.write_all(bytes).unwrap();
        client
    });
    let trickle = std::thread::spawn({
        let mut client = clients[2].try_clone().unwrap();
        move || {
            while client.write_all(&[0]).is_ok() {
                // The pace of this client, not a synchronisation.
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    });
    for (mut client, what) in clients.into_iter().zip(["silent", "stalled", "trickling"]) {
        let mut said = Vec::new();
        // Any kind of end will do.
        let ended = client.read_to_end(&mut said);
        let open = ended.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
        let waited = began.elapsed();
        assert!(!open && (1.5..15.0).contains(&waited.as_secs_f64()), "{what}: {waited:?}, {said:?}");
    }
    trickle.join().unwrap();
    assert_eq!(bystander.get("/after").unwrap().text(), "/after");
}

/// Sends endlessly, and counts the bytes.
pub fn endless(sent: &Arc<AtomicU64>) -> Upstream {
    let sent = Arc::clone(sent);
    Upstream::start(move |call| {
        let socket = socket2::SockRef::from(call.stream());
        socket.set_send_buffer_size(64 * 1024).expect("a socket option");
        let piece = body_of(16_000);
        if call.send("HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n").is_err() {
            return Then::Close;
        }
        while call.send(&piece).is_ok() {
            sent.fetch_add(piece.len() as u64, Ordering::SeqCst);
        }
        Then::Close
    })
}

#[test]
fn a_client_that_stops_reading_stops_the_node_costs_no_memory_and_is_cut() {
    let sent = Arc::new(AtomicU64::new(0));
    let secure = Secure::start("", "[limits]\nmin_body_rate = 100000000", vec![endless(&sent)]);
    let before = secure.rig.memory();
    let began = Instant::now();
    let socket = socket(secure.address());
    socket2::SockRef::from(&socket).set_recv_buffer_size(64 * 1024).unwrap();
    let mut client = Session::over(socket, Client::of(&TLS13, &[]).config(), "shop.test").unwrap();
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(client.head().unwrap().status, 200);
    let at_rest = at_rest("the node", || sent.load(Ordering::SeqCst));
    assert!(at_rest < 64 * MIB as u64, "the node could send {at_rest} bytes to nobody");
    let grown = secure.rig.memory().saturating_sub(before);
    assert!(grown < 6 * MIB, "{} KiB for a client that does not read", grown / 1024);
    // A body that is 20 s old has to keep the minimum pace; without that rule it would be cut after a minute of
    // silence.
    eventually_within(2 * PATIENCE, "the client is cut", || (secure.rig.inflight() == 0.0).then_some(()));
    let waited = began.elapsed();
    assert!((15..55).contains(&waited.as_secs()), "{waited:?}");
    eventually("the node's connection ends", || (secure.rig.varnish[0].open_connections() == 0).then_some(()));
    let (_, ending) = client.rest();
    assert_eq!(ending, Ending::Reset, "what was cut looks complete");
}

#[test]
fn the_offload_header_says_https_for_tls_clients_or_trusted_proxies_only() {
    let edge = "offload_header = \"SSL-OFFLOADED\"\ntrusted_proxies = [\"127.0.0.2/32\"]";
    let secure = Secure::start(edge, "", vec![Upstream::echo()]);
    let forged = "SSL-OFFLOADED: forged\r\nX-Forwarded-Proto: forged\r\n";
    for (trusted, by_tls, sent, offloaded, proto) in [
        (false, false, "", None, "http"),
        (false, false, forged, None, "http"),
        (false, true, "", Some("https"), "https"),
        (false, true, forged, Some("https"), "https"),
        (true, false, "", None, "http"),
        (true, false, forged, Some("forged"), "forged"),
        (true, true, "", Some("https"), "https"),
        (true, true, forged, Some("forged"), "forged"),
    ] {
        let source = [127, 0, 0, if trusted { 2 } else { 1 }];
        let request = format!("GET / HTTP/1.1\r\nHost: a\r\n{sent}\r\n");
        let address = if by_tls { secure.address() } else { secure.rig.clearcoat.edge };
        let mut client = Connection::open_from(source, address).unwrap();
        if by_tls {
            let mut session = Session::over(client.stream, Client::of(&TLS13, &[]).config(), "shop.test").unwrap();
            session.send(request).unwrap();
            assert_eq!(session.answer().unwrap().status, 200);
        } else {
            client.send(request).unwrap();
            assert_eq!(client.answer(false).unwrap().status, 200);
        }
        let calls = secure.rig.varnish[0].calls();
        let seen = calls.last().unwrap();
        let said = |name: &str| {
            let fields = seen.head.lines().filter_map(|line| line.split_once(": "));
            fields.filter(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value).collect::<Vec<_>>()
        };
        let what = format!("trusted: {trusted}, by TLS: {by_tls}, {sent:?}: {}", seen.head);
        assert_eq!(said("SSL-OFFLOADED"), offloaded.into_iter().collect::<Vec<_>>(), "{what}");
        assert_eq!(said("X-Forwarded-Proto"), [proto], "{what}");
    }
}

/// Aborts its answer in the way given by the path.
pub fn breaks_off() -> Upstream {
    Upstream::start(|call: &mut Call<'_>| {
        let (framing, then) = match call.path() {
            "/length" => ("Content-Length: 1000000", Then::Close),
            "/chunked" => ("Transfer-Encoding: chunked", Then::Close),
            "/length/reset" => ("Content-Length: 1000000", Then::Reset),
            "/chunked/reset" => ("Transfer-Encoding: chunked", Then::Reset),
            "/close/reset" => ("X: until close", Then::Reset),
            _ => return call.answer("whole"),
        };
        let chunk = [&b"1000\r\n"[..], &[b'x'; 4096], b"\r\n"].concat();
        let begun = call.send(format!("HTTP/1.1 200 OK\r\n{framing}\r\n\r\n")).and_then(|()| call.send(&chunk));
        // A reset discards unread data: the client has to read it first.
        if begun.is_ok() && then == Then::Reset {
            call.each_piece(|_| ()).expect("no body");
            std::thread::sleep(Duration::from_millis(200));
        }
        then
    })
}

pub const CUT_PATHS: [&str; 5] = ["/length", "/chunked", "/length/reset", "/chunked/reset", "/close/reset"];

#[test]
fn a_cut_answer_never_looks_complete() {
    let secure = Secure::start("", "", vec![breaks_off()]);
    for path in CUT_PATHS {
        for version in ["HTTP/1.1", "HTTP/1.0"] {
            let mut client = secure.session();
            client.send(format!("GET {path} {version}\r\nHost: a\r\n\r\n")).unwrap();
            assert_eq!(client.head().unwrap().status, 200, "{path} {version}");
            let (body, ending) = client.rest();
            assert!(!body.ends_with(b"0\r\n\r\n"), "{path} {version}");
            assert_eq!(ending, Ending::Reset, "{path} {version}: the cut came with a farewell");
        }
        for arguments in [&["--http1.0"][..], &["--http1.1"], &["--http1.1", "--tls-max", "1.2"], &["--http2"]] {
            let output = secure.curl(arguments, path);
            assert!(!output.status.success(), "{path}, {arguments:?}: curl took it for whole: {output:?}");
        }
    }
    assert_eq!(secure.session().get("/").unwrap().text(), "whole");
}

#[test]
fn an_upload_that_is_cut_never_looks_complete_to_the_node() {
    let (cut, begun) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let secure = Secure::start(
        "",
        "",
        vec![Upstream::start({
            let (cut, begun) = (Arc::clone(&cut), Arc::clone(&begun));
            move |call| {
                let body = call.each_piece(|piece| _ = begun.fetch_add(piece.len() as u64, Ordering::SeqCst));
                assert!(body.is_err(), "half a body came to a good end");
                cut.fetch_add(1, Ordering::SeqCst);
                Then::Close
            }
        })],
    );
    let mut gone = 0;
    for request in ["Content-Length: 1000\r\n\r\nhello", "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"] {
        for farewell in [true, false] {
            begun.store(0, Ordering::SeqCst);
            let mut client = secure.session();
            client.send(format!("PUT / HTTP/1.1\r\nHost: a\r\n{request}")).unwrap();
            eventually("the node has half the body", || (begun.load(Ordering::SeqCst) == 5).then_some(()));
            if farewell {
                client.tls.conn.send_close_notify();
                client.tls.flush().unwrap();
            }
            drop(client);
            gone += 1;
            eventually("the node sees a cut", || (cut.load(Ordering::SeqCst) == gone).then_some(()));
        }
    }
    secure.rig.becomes_idle();
}

#[test]
fn sigterm_lets_downloads_finish_and_ends_connections_at_rest() {
    let rest = Gate::default();
    let mut secure = Secure::start(
        "",
        "",
        vec![Upstream::start({
            let rest = rest.clone();
            move |call| {
                if call.path() != "/long" {
                    return call.answer("short");
                }
                let begun = call.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 2 * MIB)).is_ok()
                    && call.send(&body_of(2 * MIB)[..MIB]).is_ok();
                if begun && call.wait(&rest) {
                    call.send_then(&body_of(2 * MIB)[MIB..], Then::KeepAlive)
                } else {
                    Then::Close
                }
            }
        })],
    );
    let mut download = secure.session();
    download.send("GET /long HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(download.head().unwrap().status, 200);
    let (mut silent, mut idle) = (secure.session(), secure.session());
    assert_eq!(idle.get("/").unwrap().text(), "short");
    let address = secure.address();
    secure.rig.clearcoat.terminate();
    for resting in [&mut silent, &mut idle] {
        assert_eq!(resting.rest(), (Vec::new(), Ending::Clean), "a connection at rest");
    }
    eventually("new connections are refused", || std::net::TcpStream::connect(address).is_err().then_some(()));
    rest.open();
    assert!(download.exactly(2 * MIB).unwrap() == body_of(2 * MIB), "the download is not whole");
    assert_eq!(download.rest(), (Vec::new(), Ending::Clean), "a download that is through");
    let status = secure.rig.clearcoat.wait();
    assert!(status.success(), "{status}");
}

#[test]
fn a_request_right_after_the_handshake_is_answered_plain_or_by_tls() {
    let secure = Secure::start("", "", vec![Upstream::echo()]);
    let plain = exchange(secure.rig.clearcoat.edge, "GET /p HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(plain.text(), "/p");
    assert_eq!(secure.session().get("/p").unwrap().head, plain.head);
}
