//! Which versions of TLS and which cipher suites clients may use.

use rustls::version::{TLS12, TLS13};

use crate::data_path::tls::Secure;
use crate::support::eventually;
use crate::support::tls::Client;
use crate::support::upstream::Upstream;

fn is_taken(secure: &Secure, version: &'static rustls::SupportedProtocolVersion) -> bool {
    let session = Client::of(version, &[b"http/1.1"]).connect(secure.address(), "shop.test");
    session.and_then(|mut session| session.get("/")).is_ok_and(|answer| answer.status == 200)
}

/// Changes the one table of `edge.tls`, and waits until it is in effect.
fn retabled(secure: &Secure, keys: &str) {
    let applied = || secure.rig.counter("clearcoat_reloads_total{result=\"applied\"}");
    let before = applied();
    let mut config: toml::Table = secure.rig.clearcoat.config().parse().expect("TOML");
    let table = config["edge"]["tls"][0].as_table_mut().expect("a table");
    table.extend(keys.parse::<toml::Table>().expect("TOML"));
    secure.rig.clearcoat.configure(&config.to_string());
    secure.rig.clearcoat.reload();
    eventually("it is applied", || (applied() > before).then_some(()));
}

#[test]
fn the_least_version_changes_with_a_reload_and_cuts_nobody() {
    let secure = Secure::start("seal = false", "", vec![Upstream::echo()]);
    let mut old = Client::of(&TLS12, &[b"http/1.1"]).connect(secure.address(), "shop.test").expect("a handshake");
    assert_eq!(old.get("/").expect("an answer").status, 200);
    retabled(&secure, "min_version = \"1.3\"");
    assert!(!is_taken(&secure, &TLS12) && is_taken(&secure, &TLS13));
    assert_eq!(old.get("/").expect("an answer").status, 200);
    retabled(&secure, "min_version = \"1.2\"");
    assert!(is_taken(&secure, &TLS12));
}

#[test]
fn only_the_cipher_suites_that_are_named_are_used() {
    let secure = Secure::start("seal = false", "", vec![Upstream::echo()]);
    let suite = |version| {
        let session = Client::of(version, &[b"http/1.1"]).connect(secure.address(), "shop.test").expect("a handshake");
        format!("{:?}", session.tls.conn.negotiated_cipher_suite().expect("a suite").suite())
    };
    let ciphers = ["TLS_CHACHA20_POLY1305_SHA256", "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"];
    retabled(&secure, &format!("ciphers = {ciphers:?}"));
    assert_eq!((suite(&TLS13).as_str(), suite(&TLS12).as_str()), ("TLS13_CHACHA20_POLY1305_SHA256", ciphers[1]));

    // One that nobody has is refused, with the names of those that there are.
    let mut config: toml::Table = secure.rig.clearcoat.config().parse().expect("TOML");
    let table = config["edge"]["tls"][0].as_table_mut().expect("a table");
    table.insert("ciphers".into(), vec!["TLS_RSA_WITH_RC4_128_MD5"].into());
    secure.rig.clearcoat.configure(&config.to_string());
    secure.rig.clearcoat.reload();
    secure.rig.clearcoat.log().waits_for("wanted one of TLS_AES_256_GCM_SHA384, ");
    assert_eq!(suite(&TLS13), "TLS13_CHACHA20_POLY1305_SHA256");
}
