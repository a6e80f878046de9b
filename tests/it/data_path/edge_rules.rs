//! The rules of the edge: each by its effect on HTTP/1.1 and HTTP/2, and each taken by a reload.

mod pages;
mod rates;
mod tls;

use std::net::SocketAddr;

use crate::data_path::rig::{Rig, get_request};
use crate::data_path::tls::Secure;
use crate::support::client::{Answer, Connection};
use crate::support::eventually;
use crate::support::http2::{Http2, request};
use crate::support::upstream::{Call, Then, Upstream};

/// The address of the trusted balancer. All others are strangers.
const BALANCER: [u8; 4] = [127, 0, 0, 2];
const STRANGER: [u8; 4] = [127, 0, 0, 3];

const TRUSTED: &str = "trusted_proxies = [\"127.0.0.2/32\"]\nseal = false";

const STRICT: &str = "Strict-Transport-Security";

/// A Varnish that has a policy of its own about https, and answers with its path.
fn opinionated() -> Upstream {
    Upstream::start(|call: &mut Call<'_>| -> Then {
        let path = call.path().to_owned();
        let Ok(_) = call.body() else { return Then::Close };
        let head =
            format!("HTTP/1.1 200 OK\r\nStrict-Transport-Security: max-age=1\r\nContent-Length: {}\r\n", path.len());
        call.send_then(format!("{head}\r\n{path}"), Then::KeepAlive)
    })
}

/// The answer to a request from this address.
fn ask(edge: SocketAddr, from: [u8; 4], request: impl AsRef<[u8]>) -> Answer {
    let mut connection = Connection::open_from(from, edge).expect("the edge accepts");
    connection.send(request.as_ref()).expect("clearcoat reads");
    connection.answer(request.as_ref().starts_with(b"HEAD")).expect("an answer")
}

/// A GET with these fields.
fn with(host: &str, path: &str, fields: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n")
}

/// Waits until so many requests were refused for this reason: one is counted behind its answer.
fn refused(rig: &Rig, reason: &str, count: usize) {
    let series = format!("clearcoat_edge_failures_total{{reason=\"{reason}\"}}");
    eventually(&format!("{count} are counted as {reason}"), || (rig.counter(&series) == count as f64).then_some(()));
}

/// Requests that came to the first Varnish.
fn served(rig: &Rig) -> usize {
    rig.varnish[0].calls().len()
}

/// Changes keys of `[edge]` and waits until every worker goes by them.
fn reloaded(rig: &Rig, change: impl FnOnce(&mut toml::Table)) {
    let applied = || rig.counter("clearcoat_reloads_total{result=\"applied\"}");
    let before = applied();
    let mut config: toml::Table = rig.clearcoat.config().parse().expect("TOML");
    change(config["edge"].as_table_mut().expect("a table"));
    rig.clearcoat.configure(&config.to_string());
    rig.clearcoat.reload();
    eventually("it is applied", || (applied() > before).then_some(()));
}

fn table(text: &str) -> toml::Value {
    text.parse::<toml::Table>().expect("TOML").into()
}

#[test]
fn plain_http_is_sent_to_https_and_only_answers_by_tls_say_to_stay_there() {
    let edge = format!("{TRUSTED}\nhttps = {{ redirect = true, hsts_max_age = 300, hsts_include_subdomains = true }}");
    let secure = Secure::start(&edge, "", vec![opinionated()]);
    let (rig, plain) = (&secure.rig, secure.rig.clearcoat.edge);
    // The body of the last is never sent: nobody waits for it.
    for request in [
        with("Shop.test:8080", "/a?b=c", ""),
        "HEAD /a?b=c HTTP/1.1\r\nHost: shop.test\r\n\r\n".to_owned(),
        with("shop.test", "/a?b=c", "X-Forwarded-Proto: https\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"),
        "POST /a?b=c HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 100000\r\n\r\n".to_owned(),
    ] {
        let answer = ask(plain, STRANGER, &request);
        assert_eq!(answer.status, 308, "{request}");
        let location = answer.header("Location").expect("a location");
        assert!(location.eq_ignore_ascii_case("https://shop.test/a?b=c"), "{location}");
        assert_eq!((answer.header(STRICT), answer.header("Cache-Control")), (None, Some("no-store")));
    }
    refused(rig, "plain_http", 4);
    assert_eq!(served(rig), 0);
    // By plain HTTP not even what a node says of it would be right, but that is the node's own.
    let challenge = ask(plain, STRANGER, with("shop.test", "/.well-known/acme-challenge/a-B_1", ""));
    assert_eq!((challenge.status, challenge.text()), (200, "/.well-known/acme-challenge/a-B_1"));

    let policy = "max-age=300; includeSubDomains";
    let answer = secure.session().get("/b").expect("an answer");
    assert_eq!((answer.status, answer.header(STRICT)), (200, Some(policy)));
    assert_eq!(answer.head.to_lowercase().matches("strict-transport").count(), 1, "{}", answer.head);
    let http2 = Http2::open(secure.address());
    let answer = http2.get("/c").expect("an answer");
    let policies: Vec<_> = answer.headers.get_all(STRICT).iter().filter_map(|value| value.to_str().ok()).collect();
    assert_eq!((answer.status, policies), (200, vec![policy]));
    // Our own answers as well.
    let refused = http2.exchange(request("PURGE", "/c").body(()).expect("a request"), b"").expect("an answer");
    assert_eq!((refused.status, refused.header(STRICT)), (405, Some(policy)));
}

#[test]
fn behind_a_balancer_its_word_decides_and_no_redirect_loops() {
    let edge = format!("{TRUSTED}\nhttps = {{ redirect = true, port = 8443, hsts_max_age = 300 }}");
    let secure = Secure::start(&edge, "", vec![Upstream::echo()]);
    let plain = secure.rig.clearcoat.edge;
    for (fields, status, policy) in [
        ("X-Forwarded-Proto: https\r\n", 200, Some("max-age=300")),
        ("X-Forwarded-Proto: https, http\r\n", 200, Some("max-age=300")),
        ("X-Forwarded-Proto: http\r\n", 308, None),
        // It may have ended TLS.
        ("", 200, None),
    ] {
        let answer = ask(plain, BALANCER, with("shop.test", "/", fields));
        assert_eq!((answer.status, answer.header(STRICT)), (status, policy), "{fields}");
        let location = (status == 308).then_some("https://shop.test:8443/");
        assert_eq!(answer.header("Location"), location, "{fields}");
    }
    let mut kept = Connection::open_from(STRANGER, plain).expect("the edge accepts");
    reloaded(&secure.rig, |edge| _ = edge.insert("https".into(), table("redirect = false")));
    kept.send(get_request("/kept")).expect("clearcoat reads");
    let answer = kept.answer(false).expect("an answer");
    assert_eq!((answer.status, answer.header(STRICT)), (200, None));
}

#[test]
fn only_hosts_of_the_list_are_answered_for() {
    let edge = format!("{TRUSTED}\nhosts = [\"shop.test\", \"*.stores.test\", \"[::1]\"]");
    let folder = tempfile::tempdir().expect("a folder");
    let log = folder.path().join("access.log");
    let keys = format!("[log]\nlevel = \"debug\"\nformat = \"json\"\naccess = \"json\"\naccess_file = {log:?}");
    let secure = Secure::start(&edge, &keys, vec![Upstream::echo()]);
    let (rig, plain) = (&secure.rig, secure.rig.clearcoat.edge);
    for host in ["shop.test", "SHOP.test:8080", "shop.test.", "de.stores.test", "[::1]:80"] {
        assert_eq!(ask(plain, STRANGER, with(host, "/", "")).status, 200, "{host}");
    }
    let before = served(rig);
    let strangers = ["other.test", "stores.test", "shop.test.other.test", "127.0.0.1", "[::2]"];
    for host in strangers {
        let answer = ask(plain, STRANGER, with(host, "/", ""));
        assert_eq!((answer.status, answer.text()), (421, "this server does not answer for this host\n"), "{host}");
    }
    assert_eq!(ask(plain, STRANGER, "GET http://other.test/ HTTP/1.1\r\nHost: other.test\r\n\r\n").status, 421);
    assert_eq!(ask(plain, STRANGER, "GET / HTTP/1.0\r\n\r\n").status, 421);
    // The host of the request counts, whatever a proxy says of another.
    let forwarded = with("other.test", "/", "X-Forwarded-Host: shop.test\r\n");
    assert_eq!(ask(plain, BALANCER, forwarded).status, 421);

    let http2 = Http2::open(secure.address());
    let other = http::Request::builder().uri("https://other.test:8443/").body(()).expect("a request");
    assert_eq!(http2.exchange(other, b"").expect("an answer").status, 421);
    // Its connection goes on for what it was opened for.
    assert_eq!(http2.get("/").expect("an answer").status, 200);
    refused(rig, "unknown_host", 9);
    assert_eq!(served(rig), before + 1);
    eventually("the access log says why", || {
        std::fs::read_to_string(&log).unwrap_or_default().lines().find(|line| {
            line.contains("\"host\":\"other.test\"")
                && line.contains("\"termination\":\"PR\"")
                && line.contains("\"reason\":\"unknown_host\"")
        })?;
        Some(())
    });
    reloaded(rig, |edge| _ = edge.insert("hosts".into(), vec!["other.test"].into()));
    assert_eq!(http2.get("/").expect("an answer").status, 421);
}

#[test]
fn clients_of_a_blocked_network_are_refused_whoever_brings_them() {
    let edge = format!("{TRUSTED}\nblocked = [\"127.0.0.3\", \"192.0.2.0/24\", \"2001:db8::/32\"]");
    let secure = Secure::start(&edge, "", vec![Upstream::echo()]);
    let (rig, plain) = (&secure.rig, secure.rig.clearcoat.edge);
    let upload = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n";
    for request in [get_request("/"), upload.to_owned()] {
        let answer = ask(plain, STRANGER, request);
        assert_eq!((answer.status, answer.text()), (403, "forbidden\n"));
    }
    for (client, status) in [
        ("192.0.2.7", 403),
        ("198.51.100.1, 192.0.2.7", 403),
        ("2001:db8::7", 403),
        // What the client wrote of itself.
        ("192.0.2.7, 198.51.100.1", 200),
    ] {
        let fields = format!("X-Forwarded-For: {client}\r\n");
        assert_eq!(ask(plain, BALANCER, with("a", "/", &fields)).status, status, "{client}");
        // A stranger says what he likes.
        assert_eq!(ask(plain, [127, 0, 0, 4], with("a", "/", &fields)).status, 200, "{client}");
    }
    refused(rig, "blocked", 5);
    let http2 = Http2::open(secure.address());
    assert_eq!(http2.get("/").expect("an answer").status, 200);
    reloaded(rig, |edge| _ = edge.insert("blocked".into(), vec!["127.0.0.1"].into()));
    assert_eq!(http2.get("/").expect("an answer").status, 403);
    assert_eq!(ask(plain, STRANGER, get_request("/")).status, 200);
}

#[test]
fn the_client_in_a_proxy_header_is_the_one_that_is_blocked() {
    let edge = format!(
        "[edge]\nlisten = [\"127.0.0.1:0\"]\n{TRUSTED}\nproxy_protocol = \"accept\"\nblocked = [\"192.0.2.0/24\"]"
    );
    let rig = Rig::start(&edge, vec![Upstream::echo()], Vec::new());
    for (client, status) in [("192.0.2.7", 403), ("198.51.100.1", 200)] {
        let proxied = format!("PROXY TCP4 {client} 127.0.0.1 4711 80\r\n{}", get_request("/"));
        assert_eq!(ask(rig.clearcoat.edge, BALANCER, proxied).status, status, "{client}");
    }
}
