//! Tests of the etcd harness itself, on which other tests rely.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use etcd_client::{Client, ConnectOptions, Error, GetOptions, Identity};

use crate::support::etcd::Etcd;
use crate::support::etcd::access::Access;
use crate::support::etcd::backup::ClusterId;
use crate::support::etcd::certificates::Certificates;
use crate::support::etcd::link::Link;
use crate::support::{PATIENCE, eventually};

/// Long enough to conclude that no answer will come: real ones take a hundredth of it.
const SILENCE: Duration = Duration::from_millis(300);

/// Sends requests with a client independent of the harness.
fn ask<T>(
    endpoint: &str,
    options: ConnectOptions,
    ask: impl AsyncFnOnce(Client) -> Result<T, Error>,
) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let answer = async { ask(Client::connect([endpoint], Some(options)).await?).await };
    runtime
        .block_on(async { tokio::time::timeout(PATIENCE, answer).await })
        .expect("an answer")
        .map_err(|error| error_text(&error))
}

/// An error with all its causes, which are often the informative part.
fn error_text(error: &Error) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn put(endpoint: &str, options: ConnectOptions, key: &str) -> Result<(), String> {
    ask(endpoint, options, async |mut client| client.put(key, "x", None).await.map(drop))
}

fn get(endpoint: &str, options: ConnectOptions, key: &str) -> Result<usize, String> {
    ask(endpoint, options, async |mut client| client.get(key, None).await.map(|answer| answer.kvs().len()))
}

#[test]
fn a_cluster_survives_the_loss_of_its_leader() {
    let mut etcd = Etcd::cluster(3);
    assert_eq!(etcd.endpoints().len(), 3);
    let first = etcd.leader();
    let before = etcd.put("a", "1");
    etcd.kill(first);
    assert_eq!(etcd.put("b", "2"), before + 1, "a revision for each put, and none for what the harness waits by");
    let second = etcd.leader();
    assert_ne!(second, first);
    etcd.restart(first);
    etcd.healthy();
    etcd.hang(second);
    etcd.put("c", "3");
    assert_ne!(etcd.leader(), second);
    etcd.resume(second);
    etcd.healthy();
    for endpoint in etcd.endpoints() {
        assert_eq!(get(&endpoint, ConnectOptions::new(), "c"), Ok(1), "{endpoint}");
    }
    etcd.kill_all();
    etcd.restart_all();
    assert_eq!(etcd.list("").into_iter().collect::<Vec<_>>(), [("a", "1"), ("b", "2"), ("c", "3")].map(owned));
    assert_eq!(etcd.revision(), before + 2);
}

fn owned((key, value): (&str, &str)) -> (String, String) {
    (key.to_owned(), value.to_owned())
}

#[test]
fn keys_and_revisions_are_what_was_put() {
    let etcd = Etcd::start();
    let first = etcd.put("shop/a", "1");
    let second = etcd.put("shop/a", "2");
    assert_eq!((second, etcd.revision()), (first + 1, second));
    assert_eq!(etcd.get("shop/a").as_deref(), Some("2"));
    assert_eq!(etcd.get("shop"), None);
    let entry = etcd.entry("shop/a").expect("a key");
    assert_eq!((entry.create_revision(), entry.mod_revision(), entry.version()), (first, second, 2));
    etcd.put("shop/b", "3");
    assert_eq!(etcd.entries("shop/").len(), 2);
    assert_eq!(etcd.list("shop/b").into_iter().collect::<Vec<_>>(), [owned(("shop/b", "3"))]);
    assert!(etcd.delete("shop/a"));
    assert!(!etcd.delete("shop/a"));
    assert_eq!(etcd.delete_prefix("shop/"), 1);
    assert_eq!(etcd.revision(), second + 3, "what deletes nothing has no revision");
    etcd.compact(second);
    let old = async |mut client: Client| client.get("shop/a", Some(GetOptions::new().with_revision(first))).await;
    let error = ask(etcd.endpoint(0), ConnectOptions::new(), old).map(drop).expect_err("a revision that is forgotten");
    assert!(error.contains("compacted"), "{error}");
}

#[test]
fn keys_go_with_their_leases() {
    let etcd = Etcd::start();
    let (long, short) = (etcd.grant(600), etcd.grant(1));
    etcd.put_with_lease("long", "x", long);
    etcd.put_with_lease("short", "x", short);
    assert_eq!(etcd.entry("long").expect("a key").lease(), long);
    assert!(etcd.lease_ttl(long).is_some_and(|seconds| (590..=600).contains(&seconds)));
    etcd.revoke(long);
    assert_eq!((etcd.get("long"), etcd.lease_ttl(long)), (None, None));
    eventually("a lease that nobody keeps ends", || etcd.get("short").is_none().then_some(()));
}

#[test]
fn many_keys_are_put_fast() {
    let etcd = Etcd::cluster(3);
    let began = Instant::now();
    let last = etcd.put_many((0..10_000).map(|number| (format!("many/{number:05}"), number.to_string())));
    let took = began.elapsed();
    eprintln!("10,000 puts took {took:?}");
    assert!(took < Duration::from_secs(10), "10,000 puts took {took:?}");
    let keys = etcd.list("many/");
    assert_eq!((keys.len(), keys["many/09999"].as_str(), etcd.revision()), (10_000, "9999", last));
}

#[test]
fn a_restored_etcd_is_what_it_was() {
    let mut etcd = Etcd::cluster(3);
    let (id, endpoints) = (etcd.cluster_id(), etcd.endpoints());
    let then = etcd.put("a", "1");
    let snapshot = etcd.snapshot();
    etcd.put_many((0..200).map(|number| (format!("b/{number}"), "2")));
    assert!(etcd.revision() > then);
    etcd.restore(&snapshot, ClusterId::Kept);
    assert_eq!((etcd.revision(), etcd.cluster_id(), etcd.list("").len()), (then, id, 1));
    etcd.put("c", "3");
    etcd.restore(&snapshot, ClusterId::New);
    assert_eq!((etcd.revision(), etcd.list("").len()), (then, 1));
    assert_ne!(etcd.cluster_id(), id);
    assert_eq!(etcd.endpoints(), endpoints);
}

#[test]
fn an_etcd_with_users_refuses_strangers() {
    let mut etcd = Etcd::start();
    let open = etcd.snapshot();
    etcd.add_user("shop", "old", &[("shop/", Access::ReadWrite), ("nodes/", Access::Read), ("log/", Access::Write)]);
    etcd.enable_auth("secret");
    etcd.add_user("everything", "secret", &[("", Access::ReadWrite)]);
    etcd.put("nodes/a", "1");
    let stranger = ConnectOptions::new();
    let shop = |password: &str| ConnectOptions::new().with_user("shop", password);
    let refuses = |answer: Result<usize, String>, why: &str| {
        let error = answer.expect_err(why);
        assert!(error.contains(why), "{error}");
    };
    let endpoint = etcd.endpoint(0).to_owned();
    refuses(get(&endpoint, stranger.clone(), "nodes/a"), "user name is empty");
    refuses(get(&endpoint, shop("wrong"), "nodes/a"), "invalid user ID or password");
    assert_eq!(get(&endpoint, shop("old"), "nodes/a"), Ok(1));
    refuses(put(&endpoint, shop("old"), "nodes/a").map(|()| 0), "permission denied");
    assert_eq!(put(&endpoint, shop("old"), "shop/a"), Ok(()));
    assert_eq!(put(&endpoint, shop("old"), "log/a"), Ok(()));
    refuses(get(&endpoint, shop("old"), "log/a"), "permission denied");
    assert_eq!(get(&endpoint, ConnectOptions::new().with_user("everything", "secret"), "nodes/a"), Ok(1));
    etcd.change_password("shop", "new");
    refuses(get(&endpoint, shop("old"), "nodes/a"), "invalid user ID or password");
    assert_eq!(get(&endpoint, shop("new"), "nodes/a"), Ok(1));
    // The harness itself continues, since it knows the new password.
    etcd.change_password("root", "another");
    etcd.restart(0);
    let closed = etcd.snapshot();
    etcd.disable_auth();
    assert_eq!(get(&endpoint, stranger.clone(), "nodes/a"), Ok(1));
    etcd.restore(&closed, ClusterId::Kept);
    assert_eq!(etcd.get("nodes/a").as_deref(), Some("1"));
    refuses(get(&endpoint, stranger.clone(), "nodes/a"), "user name is empty");
    etcd.restore(&open, ClusterId::Kept);
    assert_eq!(get(&endpoint, stranger, "nodes/a"), Ok(0));
}

#[test]
fn an_etcd_with_tls_refuses_clients_without_its_certificate() {
    let etcd = Etcd::start_tls();
    etcd.put("a", "1");
    let with = |tls| get(etcd.endpoint(0), ConnectOptions::new().with_tls(tls), "a");
    assert_eq!(with(etcd.tls().for_client()), Ok(1));
    // The client sees a closed connection; the reason is in the log of etcd.
    let log_says = |text: &str| eventually("etcd says why", || etcd.log(0).contains(text).then_some(()));
    with(etcd.tls().without_client()).expect_err("etcd wants a certificate");
    log_says("client didn't provide a certificate");
    let folder = tempfile::tempdir().expect("a folder");
    let others = Certificates::make(folder.path(), [127, 0, 0, 1].into());
    let read = |file| std::fs::read(file).expect("our file");
    let identity = Identity::from_pem(read(&others.client.cert), read(&others.client.key));
    with(etcd.tls().without_client().identity(identity)).expect_err("etcd wants a certificate of its authority");
    log_says("certificate signed by unknown authority");
    let error = with(others.for_client()).expect_err("a server of another authority");
    assert!(error.contains("invalid peer certificate"), "{error}");
    assert!(put(&etcd.endpoint(0).replace("https", "http"), ConnectOptions::new(), "a").is_err(), "etcd wants TLS");
}

#[test]
fn a_link_that_is_cut_loses_everything_and_says_nothing() {
    let target = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let mut link = Link::to(&format!("http://{}", target.local_addr().expect("an address")));
    let (mut client, mut server) = (connect(&link).expect("a link"), accept(&target));
    exchange(&mut client, &mut server);
    exchange(&mut server, &mut client);

    link.cut();
    client.write_all(b"lost").expect("room to write");
    server.write_all(b"lost").expect("room to write");
    let mut late = connect(&link).expect("a link that is cut accepts");
    late.write_all(b"lost").expect("room to write");
    for end in [&mut client, &mut server, &mut late] {
        end.set_read_timeout(Some(SILENCE)).expect("a socket option");
        let error = end.read(&mut [0; 8]).expect_err("nothing comes, not even an end");
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        end.set_read_timeout(Some(PATIENCE)).expect("a socket option");
    }

    link.mend();
    for end in [&mut client, &mut server, &mut late] {
        assert_eq!(end.read(&mut [0; 8]).expect_err("a reset").kind(), ErrorKind::ConnectionReset);
    }
    let (mut client, mut server) = (connect(&link).expect("a link"), accept(&target));
    exchange(&mut client, &mut server);

    link.close();
    for end in [&mut client, &mut server] {
        assert_eq!(end.read(&mut [0; 8]).expect_err("a reset").kind(), ErrorKind::ConnectionReset);
    }
    assert_eq!(connect(&link).expect_err("a link that is closed refuses").kind(), ErrorKind::ConnectionRefused);

    link.mend();
    let (mut client, mut server) = (connect(&link).expect("a link"), accept(&target));
    exchange(&mut client, &mut server);
    client.shutdown(std::net::Shutdown::Write).expect("our socket");
    assert_eq!(server.read(&mut [0; 8]).expect("an end"), 0);
    exchange(&mut server, &mut client);
}

/// A link can be cut while one end does not read the data on its way to it.
#[test]
fn a_link_is_cut_while_it_is_full() {
    let target = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let link = Link::to(&format!("http://{}", target.local_addr().expect("an address")));
    let (mut client, mut server) = (connect(&link).expect("a link"), accept(&target));
    client.set_write_timeout(Some(SILENCE)).expect("a socket option");
    let full = std::iter::repeat_with(|| client.write_all(&[0; 1 << 20])).find_map(Result::err).expect("a full link");
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    link.cut();
    server.set_read_timeout(Some(SILENCE)).expect("a socket option");
    let end = std::io::copy(&mut server, &mut std::io::sink()).expect_err("what was there, and no end");
    assert_eq!(end.kind(), ErrorKind::WouldBlock);
}

fn connect(link: &Link) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(link.endpoint().strip_prefix("http://").expect("an endpoint"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn accept(target: &TcpListener) -> TcpStream {
    let (stream, _) = target.accept().expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket option");
    stream
}

fn exchange(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"hello").expect("room to write");
    let mut piece = [0; 5];
    to.read_exact(&mut piece).expect("what was sent");
    assert_eq!(&piece, b"hello");
}

#[test]
fn a_client_is_cut_off_while_etcd_serves_others() {
    let etcd = Etcd::start();
    let mut link = Link::to(etcd.endpoint(0));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let options = ConnectOptions::new().with_timeout(SILENCE);
    let mut client = runtime.block_on(Client::connect([link.endpoint()], Some(options))).expect("a client");
    runtime.block_on(client.put("a", "1", None)).expect("a link that is open");
    link.cut();
    let error = runtime.block_on(client.put("a", "2", None)).map(drop).expect_err("a link that is cut");
    assert!(error_text(&error).contains("imeout"), "a deadline is all that shows it");
    etcd.put("b", "1");
    assert_eq!(etcd.get("a").as_deref(), Some("1"), "what was sent over a link that is cut is lost");
    link.mend();
    eventually("the client is back", || runtime.block_on(client.put("a", "3", None)).ok());
    assert_eq!(etcd.get("a").as_deref(), Some("3"));
    link.close();
    runtime.block_on(client.put("a", "4", None)).map(drop).expect_err("a link that is closed");
}

#[test]
fn nothing_is_left_of_a_test_that_fails() {
    let mut left = None;
    let test = AssertUnwindSafe(|| {
        let mut etcd = Etcd::start_tls();
        let link = Link::to(etcd.endpoint(0));
        left = Some(([etcd.endpoint(0).to_owned(), link.endpoint()], etcd.tls().ca.clone()));
        etcd.hang(0);
        panic!("as tests do");
    });
    catch_unwind(test).expect_err("a test that fails");
    let (endpoints, file) = left.expect("an etcd that has run");
    for endpoint in endpoints {
        let address = endpoint.strip_prefix("https://").expect("an endpoint");
        assert_eq!(TcpStream::connect(address).expect_err("nobody").kind(), ErrorKind::ConnectionRefused);
    }
    assert!(!file.exists(), "the folder is gone");
}
