//! Restarts with listening sockets that a service manager keeps (`LISTEN_FDS`): nobody is refused, and nothing is cut.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::clearcoat::Clearcoat;
use crate::support::client::{Connection, get, purge, tag};
use crate::support::upstream::{Then, Upstream};
use crate::support::{eventually, say};

/// A command that runs `clearcoat` with these two sockets, as systemd passes them on. They come as standard input and output, so
/// that no other process of this test gets them.
fn with_sockets(first: &TcpListener, second: &TcpListener) -> Command {
    let handle = |socket: &TcpListener| Stdio::from(OwnedFd::from(socket.try_clone().expect("a handle")));
    let script = "exec 3<&0 4<&1 0</dev/null 1>/dev/null; LISTEN_PID=$$ LISTEN_FDS=2 exec \"$0\" \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_clearcoat")]).stdin(handle(first)).stdout(handle(second));
    command
}

/// Answers GET with its path, and an upload with its length.
fn node() -> Upstream {
    Upstream::start(|call| {
        let path = call.path().to_owned();
        let Ok(body) = call.body() else { return Then::Close };
        call.answer(&if call.is("POST") { body.len().to_string() } else { path })
    })
}

/// The configuration of a process that is restarted: what it does not inherit is on any free port.
fn configuration(folder: &Path, listen: [SocketAddr; 4], varnish: &Upstream, web: &Upstream) -> String {
    let [edge, origin, purge, admin] = listen;
    format!(
        "[edge]\nlisten = [\"{edge}\"]\nseal = false\n[origin]\nlisten = [\"{origin}\"]\n[purge]\nlisten = [\"{purge}\"]\n\
         [admin]\nlisten = [\"{admin}\"]\n[shutdown]\nleave = \"0s\"\ndrain = \"60s\"\n[runtime]\nworkers = 2\n\
         [health.varnish]\ntrial = false\n[journal]\npath = {:?}\nfirst_start = \"trust\"\n\
         [[node]]\nrole = \"varnish\"\nid = \"varnish-1\"\naddress = \"{}\"\n\
         [[node]]\nrole = \"web\"\nid = \"web-1\"\naddress = \"{}\"\n",
        folder.join("journal"),
        varnish.address,
        web.address
    )
}

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

fn socket() -> (TcpListener, SocketAddr) {
    let socket = TcpListener::bind(ANY).expect("a free port");
    let address = socket.local_addr().expect("an address");
    (socket, address)
}

/// What clients have had, all in all.
#[derive(Default)]
struct Load {
    stop: AtomicBool,
    reads: AtomicU64,
    uploads: AtomicU64,
    /// Of any answer, in ms.
    longest: AtomicU64,
}

impl Load {
    /// Reads at a pace, each time on a new connection, until it is stopped.
    fn read(&self, listener: SocketAddr) {
        while !self.stop.load(Ordering::SeqCst) {
            let began = Instant::now();
            let answer = get(listener, "/a").unwrap_or_else(|error| panic!("a read: {error}"));
            assert_eq!((answer.status, answer.text()), (200, "/a"));
            let took = began.elapsed();
            self.longest.fetch_max(took.as_millis() as u64, Ordering::SeqCst);
            self.reads.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(20).saturating_sub(took));
        }
    }

    /// Uploads in many pieces, for three seconds each time.
    fn upload(&self, listener: SocketAddr) {
        const PIECES: usize = 30;
        while !self.stop.load(Ordering::SeqCst) {
            let mut client = Connection::open(listener).unwrap_or_else(|error| panic!("an upload: {error}"));
            client
                .send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", PIECES * 1000))
                .expect("sent");
            for _ in 0..PIECES {
                client.stream.write_all(&[b'x'; 1000]).unwrap_or_else(|error| panic!("an upload: {error}"));
                std::thread::sleep(Duration::from_millis(100));
            }
            let answer = client.answer(false).unwrap_or_else(|error| panic!("an upload was cut: {error}"));
            assert_eq!((answer.status, answer.text()), (200, "30000"));
            self.uploads.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[test]
fn a_restart_refuses_no_client_and_cuts_no_upload() {
    let folder = tempfile::tempdir().expect("a folder");
    let (varnish, web) = (node(), node());
    let ((edge_socket, edge), (origin_socket, origin)) = (socket(), socket());
    let config = configuration(folder.path(), [edge, origin, ANY, ANY], &varnish, &web);
    let start = || Clearcoat::start_with(with_sockets(&edge_socket, &origin_socket), folder.path(), &config);
    let mut clearcoat = start();
    assert_eq!((clearcoat.edge, clearcoat.origin), (edge, origin));
    clearcoat.ready();
    let load = &Load::default();
    std::thread::scope(|scope| {
        // The test fails, and the scope ends, if one of them panics.
        let _stops = StopsAtTheEnd(&load.stop);
        let readers = [edge, edge, edge, origin].map(|listener| scope.spawn(move || load.read(listener)));
        let uploads = [edge, edge, origin].map(|listener| scope.spawn(move || load.upload(listener)));
        for _restart in 0..3 {
            let (reads, done) = (load.reads.load(Ordering::SeqCst), load.uploads.load(Ordering::SeqCst));
            eventually("there is traffic", || {
                let moved =
                    load.reads.load(Ordering::SeqCst) > reads + 100 && load.uploads.load(Ordering::SeqCst) > done;
                (moved || readers.iter().any(|thread| thread.is_finished())).then_some(())
            });
            clearcoat.terminate();
            assert!(clearcoat.wait().success());
            assert!(!clearcoat.log().has("are cut"), "{}", clearcoat.log().text());
            clearcoat = start();
            clearcoat.opened();
        }
        let reads = load.reads.load(Ordering::SeqCst);
        eventually("it serves after the last one", || (load.reads.load(Ordering::SeqCst) > reads + 100).then_some(()));
        load.stop.store(true, Ordering::SeqCst);
        readers.into_iter().chain(uploads).for_each(|thread| thread.join().expect("nobody was refused or cut"));
    });
    let (reads, uploads) = (load.reads.load(Ordering::SeqCst), load.uploads.load(Ordering::SeqCst));
    say(&format!(
        "3 restarts: {reads} reads and {uploads} uploads of 3 s, none refused or cut; the longest read took {} ms",
        load.longest.load(Ordering::SeqCst)
    ));
}

/// Ends the threads of a scope, also when the test fails.
struct StopsAtTheEnd<'s>(&'s AtomicBool);

impl Drop for StopsAtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn purges_and_operators_wait_for_the_next_process_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let (varnish, web) = (node(), node());
    let ((purge_socket, purge_address), (admin_socket, admin)) = (socket(), socket());
    let config = configuration(folder.path(), [ANY, ANY, purge_address, admin], &varnish, &web);
    let start = || Clearcoat::start_with(with_sockets(&purge_socket, &admin_socket), folder.path(), &config);
    let mut clearcoat = start();
    clearcoat.opened();
    let position = |answer: crate::support::client::Answer| {
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["position"].as_u64().expect("a position")
    };
    let first = position(purge(purge_address, &tag("a")).expect("an answer"));
    clearcoat.terminate();
    assert!(clearcoat.wait().success());
    // There is no clearcoat now.
    let waiting = std::thread::spawn(move || purge(purge_address, &tag("b")).expect("an answer"));
    let asking = std::thread::spawn(move || get(admin, "/healthz").expect("an answer"));
    let _clearcoat = start();
    assert_eq!(position(waiting.join().expect("nobody was refused")), first + 1);
    assert_eq!(asking.join().expect("nobody was refused").status, 200);
}

#[test]
fn a_socket_that_no_listener_has_is_an_error_and_so_is_another_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let (varnish, web) = (node(), node());
    let ((known, address), (stray, stray_address)) = (socket(), socket());
    let file = folder.path().join("clearcoat.toml");
    std::fs::write(&file, configuration(folder.path(), [address, ANY, ANY, ANY], &varnish, &web)).expect("a file");
    let failed = |mut command: Command| {
        let output = command.args(["serve", "--config"]).arg(&file).output().expect("clearcoat");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let error = failed(with_sockets(&known, &stray));
    assert!(error.contains(&format!("LISTEN_FDS: nothing listens at {stray_address}")), "{error}");
    let mut no_socket = Command::new("sh");
    let script = "exec 3</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\"";
    no_socket.args(["-c", script, env!("CARGO_BIN_EXE_clearcoat")]).stdin(Stdio::null());
    let error = failed(no_socket);
    assert!(error.contains("LISTEN_FDS: file 3 is no listening TCP socket"), "{error}");
    // What is meant for another process is not ours.
    let mut others = Command::new("sh");
    others.args(["-c", "LISTEN_PID=1 LISTEN_FDS=1 exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_clearcoat")]);
    drop((known, stray));
    Clearcoat::start_with(others, folder.path(), &std::fs::read_to_string(&file).expect("our file")).opened();
}
