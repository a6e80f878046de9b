//! Handshakes over loopback, with certificates made for the test.

mod rig;

use std::fs;
use std::time::Duration;

use rustls::client::Tls12Resumption;
use rustls::server::NoServerSessionStorage;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConnection, HandshakeKind};

use super::*;
use crate::telemetry::Metrics;
use rig::{EchoServer, Folder, Issued, NoTickets, TlsClient, echo, kind, served};

fn rendered(metrics: &Metrics) -> String {
    String::from_utf8(metrics.render().unwrap()).unwrap()
}

#[tokio::test]
async fn sni_picks_the_certificate() {
    let folder = Folder::new();
    let default = Issued::for_names(&["default.test"]);
    let wildcard = Issued::for_names(&["*.shop.test", "shop.test"]);
    let exact = Issued::for_names(&["WWW.shop.test", "other.test"]);
    let files = [folder.write("default", &default), folder.write("wildcard", &wildcard), folder.write("exact", &exact)];
    let tls = Tls::load(&files, true).unwrap();
    let server = EchoServer::start(&tls).await;
    for version in [&TLS12, &TLS13] {
        for (name, expected) in [
            ("default.test", &default),
            ("shop.test", &wildcard),
            ("de.shop.test", &wildcard),
            // The exact name wins though the wildcard is configured before it.
            ("www.shop.test", &exact),
            ("www.SHOP.test", &exact),
            ("other.test", &exact),
            // A wildcard matches one label, and an unknown name gets the first certificate.
            ("a.de.shop.test", &default),
            ("unknown.test", &default),
            ("test", &default),
            // No SNI is sent with an address (RFC 6066 section 3).
            ("127.0.0.1", &default),
        ] {
            let mut stream = TlsClient::of(version).connect(&server, name).await.unwrap();
            assert_eq!(served(&stream), expected.der, "{name} {version:?}");
            assert_eq!(stream.get_ref().1.protocol_version(), Some(version.version));
            echo(&mut stream).await;
        }
    }
}

#[tokio::test]
async fn a_wildcard_stands_at_the_left_only_and_the_common_name_is_no_name() {
    let folder = Folder::new();
    let default = Issued::for_names(&["default.test"]);
    let odd = Issued::for_names(&["a.*.test", "b*.test"]);
    let common_name = Issued::with_common_name("cn.test");
    let files = [folder.write("default", &default), folder.write("odd", &odd), folder.write("cn", &common_name)];
    let server = EchoServer::start(&Tls::load(&files, true).unwrap()).await;
    for name in ["a.b.test", "bc.test", "cn.test"] {
        let stream = TlsClient::of(&TLS13).connect(&server, name).await.unwrap();
        assert_eq!(served(&stream), default.der, "{name}");
    }
}

#[tokio::test]
async fn of_two_certificates_for_a_name_the_client_gets_one_that_it_can_check() {
    let folder = Folder::new();
    let (ecdsa, rsa) = (Issued::for_names(&["shop.test"]), Issued::rsa(&["shop.test"]));
    let files = [folder.write("ecdsa", &ecdsa), folder.write("rsa", &rsa)];
    let server = EchoServer::start(&Tls::load(&files, true).unwrap()).await;
    for version in [&TLS12, &TLS13] {
        let modern = TlsClient::of(version).connect(&server, "shop.test").await.unwrap();
        assert_eq!(served(&modern), ecdsa.der);
        let old = TlsClient::of(version).checking(rustls::SignatureScheme::RSA_PSS_SHA256);
        assert_eq!(served(&old.connect(&server, "shop.test").await.unwrap()), rsa.der);
    }
}

#[tokio::test]
async fn alpn_offers_http2_only_where_it_is_on() {
    let folder = Folder::new();
    let files = [folder.write("shop", &Issued::for_names(&["shop.test"]))];
    let with = EchoServer::start(&Tls::load(&files, true).unwrap()).await;
    let without = EchoServer::start(&Tls::load(&files, false).unwrap()).await;
    let browser: &[&[u8]] = &[b"h2", b"http/1.1"];
    let curl: &[&[u8]] = &[b"http/1.1"];
    for version in [&TLS12, &TLS13] {
        for (server, offered, agreed) in [
            (&with, browser, Some(&b"h2"[..])),
            (&with, curl, Some(b"http/1.1")),
            (&with, &[], None),
            (&without, browser, Some(b"http/1.1")),
            (&without, &[], None),
        ] {
            let stream = TlsClient::of(version).offering(offered).connect(server, "shop.test").await.unwrap();
            assert_eq!(stream.get_ref().1.alpn_protocol(), agreed, "{offered:?}");
        }
        let refused = TlsClient::of(version).offering(&[b"h2"]).connect(&without, "shop.test").await.unwrap_err();
        assert!(refused.to_string().contains("NoApplicationProtocol"), "{refused}");
    }
}

#[tokio::test]
async fn tickets_resume_in_both_versions_after_a_reload_and_elsewhere() {
    for version in [&TLS12, &TLS13] {
        let folder = Folder::new();
        let first = Issued::for_names(&["shop.test"]);
        let files = [folder.write("shop", &first)];
        // Without a session store, only a ticket can have resumed the session.
        let resumption = Resumption { sessions: Arc::new(NoServerSessionStorage {}), ..Resumption::new().unwrap() };
        let tls = Tls::load_sharing(&files, true, &TlsPolicy::default(), &resumption).unwrap();
        let server = EchoServer::start(&tls).await;
        let client = TlsClient::of(version);

        let mut stream = client.connect(&server, "shop.test").await.unwrap();
        assert_eq!(kind(&stream), HandshakeKind::Full);
        // The tickets of TLS 1.3 come with the first data.
        echo(&mut stream).await;
        let mut stream = client.connect(&server, "shop.test").await.unwrap();
        assert_eq!(kind(&stream), HandshakeKind::Resumed, "{version:?}");
        echo(&mut stream).await;

        folder.write("shop", &Issued::for_names(&["shop.test"]));
        assert!(tls.reload().unwrap());
        let mut stream = client.connect(&server, "shop.test").await.unwrap();
        assert_eq!(kind(&stream), HandshakeKind::Resumed, "after a reload, {version:?}");
        echo(&mut stream).await;

        let other =
            EchoServer::start(&Tls::load_sharing(&files, true, &TlsPolicy::default(), &resumption).unwrap()).await;
        let mut stream = client.connect(&other, "shop.test").await.unwrap();
        assert_eq!(kind(&stream), HandshakeKind::Resumed, "at another listener, {version:?}");
        echo(&mut stream).await;

        let stranger = EchoServer::start(&Tls::load(&files, true).unwrap()).await;
        let stream = client.connect(&stranger, "shop.test").await.unwrap();
        assert_eq!(kind(&stream), HandshakeKind::Full, "where the keys are others, {version:?}");
    }
}

#[tokio::test]
async fn sessions_resume_for_clients_without_tickets_also_at_another_listener() {
    let folder = Folder::new();
    let files = [folder.write("shop", &Issued::for_names(&["shop.test"]))];
    let resumption = Resumption::new().unwrap();
    let one = EchoServer::start(&Tls::load_sharing(&files, true, &TlsPolicy::default(), &resumption).unwrap()).await;
    let other = EchoServer::start(&Tls::load_sharing(&files, true, &TlsPolicy::default(), &resumption).unwrap()).await;
    let stranger = EchoServer::start(&Tls::load(&files, true).unwrap()).await;
    let client = TlsClient::of(&TLS12).resuming_by(Tls12Resumption::SessionIdOnly);
    for (server, expected) in [
        (&one, HandshakeKind::Full),
        (&one, HandshakeKind::Resumed),
        (&other, HandshakeKind::Resumed),
        (&stranger, HandshakeKind::Full),
    ] {
        let mut stream = client.connect(server, "shop.test").await.unwrap();
        assert_eq!(kind(&stream), expected);
        echo(&mut stream).await;
    }
}

#[tokio::test]
async fn no_session_allows_early_data() {
    let folder = Folder::new();
    let files = [folder.write("shop", &Issued::for_names(&["shop.test"]))];
    // rustls never allows early data with a ticket, but it would with a stored session: so that case is tested.
    let resumption = Resumption { ticketer: Arc::new(NoTickets), ..Resumption::new().unwrap() };
    let tls = Tls::load_sharing(&files, true, &TlsPolicy::default(), &resumption).unwrap();
    let server = EchoServer::start(&tls).await;
    let client = TlsClient::of(&TLS13).wishing_for_early_data();
    echo(&mut client.connect(&server, "shop.test").await.unwrap()).await;
    let mut again = ClientConnection::new(client.config(), "shop.test".try_into().unwrap()).unwrap();
    assert!(again.early_data().is_none());
    let stream = client.connect(&server, "shop.test").await.unwrap();
    assert_eq!(kind(&stream), HandshakeKind::Resumed);
}

#[tokio::test]
async fn a_reload_serves_new_connections_and_leaves_open_ones_alone() {
    let folder = Folder::new();
    let (old, new) = (Issued::for_names(&["shop.test"]), Issued::for_names(&["shop.test"]));
    let files = [folder.write("shop", &old)];
    let tls = Tls::load(&files, true).unwrap();
    let server = EchoServer::start(&tls).await;
    let mut open = TlsClient::of(&TLS13).connect(&server, "shop.test").await.unwrap();
    echo(&mut open).await;
    assert!(!tls.reload().unwrap(), "nothing has changed");

    folder.write("shop", &new);
    assert!(tls.reload().unwrap());
    echo(&mut open).await;
    assert_eq!(served(&open), old.der);
    let fresh = TlsClient::of(&TLS13).connect(&server, "shop.test").await.unwrap();
    assert_eq!(served(&fresh), new.der);
    assert!(!tls.reload().unwrap());
}

#[tokio::test]
async fn a_file_that_is_broken_keeps_all_old_certificates_and_is_named() {
    let folder = Folder::new();
    let names = [["a.test"], ["b.test"]];
    let old = names.map(|names| Issued::for_names(&names));
    let new = names.map(|names| Issued::for_names(&names));
    let files = [folder.write("a", &old[0]), folder.write("b", &old[1])];
    let tls = Tls::load(&files, true).unwrap();
    let server = EchoServer::start(&tls).await;

    folder.write("a", &new[0]);
    fs::write(&files[1].cert, "-----BEGIN CERTIFICATE-----\nMIIB").unwrap();
    let error = tls.reload().unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}: is not well-formed PEM", files[1].cert.display())), "{error}");
    for (index, [name]) in names.iter().enumerate() {
        let stream = TlsClient::of(&TLS13).connect(&server, name).await.unwrap();
        assert_eq!(served(&stream), old[index].der, "{name}");
    }

    folder.write("b", &new[1]);
    assert!(tls.reload().unwrap());
    for (index, [name]) in names.iter().enumerate() {
        let stream = TlsClient::of(&TLS13).connect(&server, name).await.unwrap();
        assert_eq!(served(&stream), new[index].der, "{name}");
    }
}

#[test]
fn a_change_is_seen_through_links_and_without_a_new_time() {
    let folder = Folder::new();
    let (old, new) = (Issued::for_names(&["shop.test"]), Issued::for_names(&["shop.test"]));
    // As Kubernetes mounts a secret: files are links to a folder that is swapped.
    let long_ago = std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    for (version, issued) in [("v1", &old), ("v2", &new)] {
        fs::create_dir(folder.path(version)).unwrap();
        for file in [folder.write(&format!("{version}/shop"), issued)].iter().flat_map(|f| [&f.cert, &f.key]) {
            fs::File::options().write(true).open(file).unwrap().set_modified(long_ago).unwrap();
        }
    }
    let link = |target: &str| {
        std::os::unix::fs::symlink(folder.path(target), folder.path("next")).unwrap();
        fs::rename(folder.path("next"), folder.path("current")).unwrap();
    };
    link("v1");
    let files = CertificateFiles { cert: folder.path("current/shop.pem"), key: folder.path("current/shop.key") };
    let tls = Tls::load(&[files], true).unwrap();
    assert!(!tls.reload().unwrap());
    link("v2");
    assert!(tls.reload().unwrap());
    assert_eq!(tls.resolver.current().iter().next().unwrap().key.cert[0], new.der);
}

#[test]
fn keys_are_read_in_every_form() {
    let folder = Folder::new();
    let (ecdsa, rsa) = (Issued::for_names(&["shop.test"]), Issued::rsa(&["shop.test"]));
    for (name, issued, key) in [
        ("pkcs8", &ecdsa, ecdsa.key.clone()),
        ("sec1", &ecdsa, ecdsa.inner_key("EC PRIVATE KEY")),
        ("pkcs8-rsa", &rsa, rsa.key.clone()),
        ("pkcs1", &rsa, rsa.inner_key("RSA PRIVATE KEY")),
    ] {
        let files = folder.write(name, issued);
        fs::write(&files.key, &key).unwrap();
        Tls::load(&[files], true).unwrap_or_else(|error| panic!("{name}: {error}"));
        // HAProxy's form: everything in one file, in any order.
        for text in [format!("{key}{}", issued.cert), format!("{}\n{key}", issued.cert)] {
            let one = folder.path(&format!("{name}-combined.pem"));
            fs::write(&one, text).unwrap();
            let files = CertificateFiles { cert: one.clone(), key: one };
            Tls::load(&[files], true).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}

#[tokio::test]
async fn the_whole_chain_is_sent() {
    let folder = Folder::new();
    let (shop, above) = (Issued::for_names(&["shop.test"]), Issued::for_names(&["authority.test"]));
    let files = folder.write("shop", &shop);
    fs::write(&files.cert, format!("{}{}", shop.cert, above.cert)).unwrap();
    let server = EchoServer::start(&Tls::load(&[files], true).unwrap()).await;
    let stream = TlsClient::of(&TLS13).connect(&server, "shop.test").await.unwrap();
    assert_eq!(stream.get_ref().1.peer_certificates().unwrap(), [shop.der, above.der]);
}

#[test]
fn every_error_names_the_file_and_what_is_wrong_with_it() {
    let folder = Folder::new();
    let (one, other) = (Issued::for_names(&["one.test"]), Issued::for_names(&["other.test"]));
    let key_only = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    let not_der = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let encrypted = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let cut = |text: &str| text[..text.len() / 2].to_owned();
    let both = format!("{}{not_der}", one.cert);
    let huge = "#".repeat(1024 * 1024 + 1);
    for (cert, key, in_cert, expected) in [
        (None, Some(one.key.clone()), true, "cannot be read: No such file"),
        (Some(one.cert.clone()), None, false, "cannot be read: No such file"),
        (Some(huge.clone()), Some(one.key.clone()), true, "is larger than 1048576 bytes"),
        (Some(one.cert.clone()), Some(huge), false, "is larger than 1048576 bytes"),
        (Some(String::new()), Some(one.key.clone()), true, "holds no certificate in PEM form"),
        (Some(one.key.clone()), Some(one.key.clone()), true, "holds no certificate in PEM form"),
        (Some(cut(&one.cert)), Some(one.key.clone()), true, "is not well-formed PEM"),
        (Some(not_der.to_owned()), Some(one.key.clone()), true, "holds a certificate that is malformed"),
        (Some(both), Some(one.key.clone()), true, "holds a certificate that is malformed"),
        (Some(one.cert.clone()), Some(String::new()), false, "holds no private key in PEM form"),
        (Some(one.cert.clone()), Some(one.cert.clone()), false, "holds no private key in PEM form"),
        (Some(one.cert.clone()), Some(encrypted.to_owned()), false, "holds no private key in PEM form"),
        (Some(one.cert.clone()), Some(cut(&one.key)), false, "is not well-formed PEM"),
        (Some(one.cert.clone()), Some(key_only.to_owned()), false, "holds a private key that cannot be used"),
        (Some(one.cert.clone()), Some(other.key), false, "the private key does not belong to the first"),
    ] {
        let files = CertificateFiles { cert: folder.path("it.pem"), key: folder.path("it.key") };
        for (file, text) in [(&files.cert, cert), (&files.key, key)] {
            match text {
                Some(text) => fs::write(file, text).unwrap(),
                None => _ = fs::remove_file(file),
            }
        }
        let error = Tls::load(std::slice::from_ref(&files), true).unwrap_err().to_string();
        let blamed = if in_cert { &files.cert } else { &files.key };
        assert!(error.starts_with(&format!("{}: {expected}", blamed.display())), "{error}, not {expected}");
        // No part of a key may appear in a log.
        assert!(!error.contains(one.key.lines().nth(1).unwrap()), "{error}");
    }
    let error = Tls::load(&[], true).unwrap_err();
    assert!(matches!(error, TlsError::NoFiles), "{error}");
}

#[test]
fn a_policy_by_which_nobody_could_connect_is_refused_also_by_a_reload() {
    let folder = Folder::new();
    let rsa = folder.write("rsa", &Issued::rsa(&["a"]));
    let ecdsa = folder.write("ecdsa", &Issued::for_names(&["a"]));
    let policy =
        TlsPolicy { ciphers: vec!["TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256".to_owned()], ..TlsPolicy::default() };
    let load = |files: &[CertificateFiles]| Tls::load_sharing(files, true, &policy, &Resumption::new().unwrap());
    let error = load(std::slice::from_ref(&rsa)).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}: no suite of `ciphers` fits its RSA key", rsa.cert.display())), "{error}");
    assert!(load(&[rsa.clone(), ecdsa]).is_ok());
    let tls = Tls::load(std::slice::from_ref(&rsa), true).unwrap();
    assert!(tls.prepare(std::slice::from_ref(&rsa), &policy).is_err());
}

#[test]
fn nothing_prints_a_key() {
    let folder = Folder::new();
    let tls = Tls::load(&[folder.write("shop", &Issued::for_names(&["shop.test"]))], true).unwrap();
    let printed = format!("{tls:?}");
    assert!(printed.starts_with("Tls { files: [CertificateFiles") && printed.ends_with(", .. }"), "{printed}");
    assert_eq!(format!("{:?}", tls.resolver), "[[\"shop.test\"]]");
}

#[tokio::test]
async fn looks_count_what_is_new_and_show_when_certificates_end() {
    let folder = Folder::new();
    let files = folder.write("shop", &Issued::ending(&["shop.test"], 2001));
    let name = files.cert.display().to_string();
    // The certificate has expired, and is used all the same.
    let tls = Arc::new(Tls::load(std::slice::from_ref(&files), true).unwrap());
    let metrics = Arc::new(Metrics::new().unwrap());
    let mut watcher = watch::Watcher::new(Arc::clone(&tls), Arc::clone(&metrics));
    let expect = |ok: u32, failed: u32, end: i64| {
        let text = rendered(&metrics);
        for line in [
            format!("clearcoat_tls_reloads_total{{result=\"ok\"}} {ok}\n"),
            format!("clearcoat_tls_reloads_total{{result=\"failed\"}} {failed}\n"),
            format!("clearcoat_tls_certificate_expiry_timestamp_seconds{{cert=\"{name}\"}} {end}\n"),
        ] {
            assert!(text.contains(&line), "no {line} in {text}");
        }
    };
    const YEAR_2001: i64 = 978_307_200;
    const YEAR_2100: i64 = 4_102_444_800;
    watcher.look().await;
    watcher.look().await;
    expect(0, 0, YEAR_2001);

    folder.write("shop", &Issued::ending(&["shop.test"], 2100));
    watcher.look().await;
    watcher.look().await;
    expect(1, 0, YEAR_2100);

    // The same failure counts once; another one counts again, and so does the first when it comes back.
    fs::write(&files.cert, "nothing").unwrap();
    watcher.look().await;
    watcher.look().await;
    expect(1, 1, YEAR_2100);
    fs::remove_file(&files.cert).unwrap();
    watcher.look().await;
    watcher.look().await;
    expect(1, 2, YEAR_2100);
    folder.write("shop", &Issued::ending(&["shop.test"], 2001));
    watcher.look().await;
    expect(2, 2, YEAR_2001);
    fs::remove_file(&files.cert).unwrap();
    watcher.look().await;
    expect(2, 3, YEAR_2001);

    drop(watcher);
    assert!(!rendered(&metrics).contains(&name));
}

#[tokio::test]
async fn the_watch_brings_a_renewed_certificate_to_new_connections() {
    let folder = Folder::new();
    let (old, new) = (Issued::for_names(&["shop.test"]), Issued::for_names(&["shop.test"]));
    let files = [folder.write("shop", &old)];
    let tls = Arc::new(Tls::load(&files, true).unwrap());
    let server = EchoServer::start(&tls).await;
    let watching = watch(tls, Arc::new(Metrics::new().unwrap()), Duration::from_millis(1));
    let renewed = async {
        let stream = TlsClient::of(&TLS13).connect(&server, "shop.test").await.unwrap();
        assert_eq!(served(&stream), old.der);
        folder.write("shop", &new);
        loop {
            let stream = TlsClient::of(&TLS13).connect(&server, "shop.test").await.unwrap();
            if served(&stream) == new.der {
                return;
            }
        }
    };
    tokio::select! {
        () = watching => unreachable!("the watch has no end"),
        result = tokio::time::timeout(Duration::from_secs(20), renewed) => result.expect("the new certificate"),
    }
}

#[tokio::test]
async fn tls_1_1_is_refused() {
    let folder = Folder::new();
    let tls = Tls::load(&[folder.write("shop", &Issued::for_names(&["shop.test"]))], true).unwrap();
    let server = EchoServer::start(&tls).await;
    // A ClientHello of RFC 4346 section 7.4.1.2: version, random, no session, two suites, no compression, and the
    // extension without which rustls refuses for another reason.
    let suites = [0, 4, 0xc0, 0x13, 0, 0x2f];
    let extensions = [0, 10, 0, 13, 0, 6, 0, 4, 4, 3, 4, 1];
    let hello = [&[3, 2][..], &[7; 32], &[0], &suites, &[1, 0], &extensions].concat();
    let len = u8::try_from(hello.len()).unwrap();
    let record = [&[22, 3, 1, 0, len + 4, 1, 0, 0, len][..], &hello].concat();
    // A fatal alert (2), protocol_version (70).
    assert_eq!(server.answer_to(&record).await, [21, 3, 3, 0, 2, 2, 70]);
}
