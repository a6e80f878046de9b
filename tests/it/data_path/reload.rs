//! A reload changes what can change for the next request of every connection, and cuts none: each kind of setting by its effect.

use std::time::Instant;

use crate::data_path::rig::{Rig, get_request};
use crate::data_path::tls::Secure;
use crate::support::client::{Connection, get, purge, tag};
use crate::support::eventually;
use crate::support::tls::Issued;
use crate::support::upstream::{Gate, Then, Upstream};

/// Sections that a test changes, with the addresses of the rig.
const LISTEN: &str = "listen = [\"127.0.0.1:0\"]";

/// Changes the configuration as a tree, and reloads it.
fn reload(rig: &Rig, change: impl FnOnce(&mut toml::Table)) {
    let mut config: toml::Table = rig.clearcoat.config().parse().expect("TOML");
    change(&mut config);
    rig.clearcoat.configure(&config.to_string());
    rig.clearcoat.reload();
}

pub(super) fn set(config: &mut toml::Table, section: &str, key: &str, value: impl Into<toml::Value>) {
    let table = section.split('.').fold(config, |table, name| {
        table.entry(name).or_insert_with(|| toml::Table::new().into()).as_table_mut().expect("a table")
    });
    table.insert(key.into(), value.into());
}

fn reloads(rig: &Rig, result: &str) -> f64 {
    rig.counter(&format!("clearcoat_reloads_total{{result=\"{result}\"}}"))
}

/// The same, and waits until it is in effect at every worker.
pub(super) fn reloaded(rig: &Rig, change: impl FnOnce(&mut toml::Table)) {
    let before = reloads(rig, "applied");
    reload(rig, change);
    eventually("it is applied", || (reloads(rig, "applied") > before).then_some(()));
}

fn status(client: &mut Connection, request: &str) -> u16 {
    client.send(request).expect("clearcoat reads");
    client.answer(false).expect("an answer").status
}

#[test]
fn limits_hold_for_the_next_request_and_not_for_one_under_way() {
    let late = Gate::default();
    let web = Upstream::start({
        let late = late.clone();
        move |call| {
            let path = call.path().to_owned();
            let Ok(body) = call.body() else { return Then::Close };
            if path == "/late" {
                call.wait(&late);
            }
            call.answer(&format!("{path} {}", body.len()))
        }
    });
    let rig = Rig::web([web]);
    let post = |path: &str, length: usize| {
        format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{}", "x".repeat(length))
    };
    let (mut kept, mut under_way) = (rig.origin(), rig.origin());
    assert_eq!(status(&mut kept, &post("/a", 5000)), 200);
    // Half of it is sent before, half after.
    let upload = post("/late", 5000);
    let (first, rest) = upload.split_at(3000);
    under_way.send(first).expect("clearcoat reads");
    eventually("it is at the node", || (rig.inflight() == 1.0).then_some(()));
    reloaded(&rig, |config| {
        set(config, "limits", "max_body", 1000);
        set(config, "limits", "max_fields", 20);
    });
    under_way.send(rest).expect("clearcoat reads");
    late.open();
    assert_eq!(under_way.answer(false).expect("an answer").text(), "/late 5000");
    assert_eq!(status(&mut kept, &post("/b", 5000)), 413);
    let many = (0..30).map(|number| format!("X-{number}: 1\r\n")).collect::<String>();
    assert_eq!(status(&mut rig.origin(), &format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n")), 431);
    reloaded(&rig, |config| _ = config.remove("limits"));
    assert_eq!(status(&mut rig.origin(), &post("/c", 5000)), 200);
}

#[test]
fn a_proxy_is_trusted_from_the_next_request_of_its_connection_on() {
    let rig = Rig::start("", vec![Upstream::echo()], vec![]);
    let mut kept = rig.edge();
    let mut seen = |path: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 192.0.2.7\r\n\r\n");
        assert_eq!(status(&mut kept, &request), 200);
        let calls = rig.varnish[0].calls();
        let call = calls.iter().find(|call| call.head.starts_with(&format!("GET {path} "))).expect("it");
        call.header("X-Forwarded-For").expect("written by clearcoat").to_owned()
    };
    assert_eq!(seen("/stranger"), "127.0.0.1");
    reloaded(&rig, |config| set(config, "edge", "trusted_proxies", vec!["127.0.0.0/8"]));
    assert_eq!(seen("/proxy"), "192.0.2.7, 127.0.0.1");
    reloaded(&rig, |config| set(config, "edge", "trusted_proxies", Vec::<String>::new()));
    assert_eq!(seen("/stranger-again"), "127.0.0.1");
}

#[test]
fn who_may_purge_changes_with_the_next_purge_and_a_token_is_read_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("token");
    let rig = Rig::start("", vec![Upstream::echo()], vec![]);
    let (address, pattern) = (rig.clearcoat.purge, tag("a"));
    let with_token = |token: &str| {
        let head = format!("X-Magento-Tags-Pattern: {pattern}\r\nAuthorization: Bearer {token}\r\nHost: a\r\n\r\n");
        crate::support::client::exchange(address, format!("PURGE / HTTP/1.1\r\n{head}")).expect("an answer").status
    };
    let plain = || purge(address, &pattern).expect("an answer").status;
    assert_eq!(plain(), 200);
    reloaded(&rig, |config| set(config, "purge", "allow", vec!["10.0.0.0/8"]));
    assert_eq!(plain(), 403);
    std::fs::write(&file, "first").expect("a file");
    reloaded(&rig, |config| {
        set(config, "purge", "allow", vec!["127.0.0.0/8"]);
        set(config, "purge", "token_file", file.display().to_string());
    });
    assert_eq!((plain(), with_token("first")), (403, 200));
    std::fs::write(&file, "second").expect("a file");
    reloaded(&rig, |_| {});
    assert_eq!((with_token("first"), with_token("second")), (403, 200));
}

#[test]
fn health_checks_go_by_what_is_configured_now() {
    let web = Upstream::start(|call| {
        let status = if call.path() == "/well" { "200 OK" } else { "404 Not Found" };
        call.send_then(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n"), Then::KeepAlive)
    });
    let rig = Rig::web([web]);
    reloaded(&rig, |config| {
        set(config, "health.web", "path", "/missing");
        set(config, "health.web", "fall", 1);
    });
    let node = eventually("it is down", || Some(rig.clearcoat.node("web-1")).filter(|node| node["health"] == "down"));
    assert!(node["reason"].as_str().expect("a reason").contains("/missing answered 404"), "{node}");
    reloaded(&rig, |config| {
        set(config, "health.web", "path", "/well");
        set(config, "health.web", "rise", 1);
    });
    eventually("it is up", || (rig.clearcoat.node("web-1")["health"] == "up").then_some(()));
}

#[test]
fn other_certificates_serve_new_connections_and_those_that_are_open_go_on() {
    let secure = Secure::start("", "", vec![Upstream::echo()]);
    let (rig, folder) = (&secure.rig, secure.folder.path());
    let mut open = secure.session();
    let first = open.served();
    let second = Issued::for_names(&["shop.test"]);
    let files = second.write(folder, "second");
    let point_at = |config: &mut toml::Table, cert: &std::path::Path, key: &std::path::Path| {
        let table = config["edge"]["tls"].as_array_mut().expect("tables")[0].as_table_mut().expect("a table");
        table.insert("cert".into(), cert.display().to_string().into());
        table.insert("key".into(), key.display().to_string().into());
    };
    // Not one that is missing, with whatever else is new.
    reload(rig, |config| {
        point_at(config, &folder.join("missing.pem"), &files.key);
        set(config, "limits", "max_fields", 16);
    });
    eventually("it is refused", || (reloads(rig, "refused") == 1.0).then_some(()));
    rig.clearcoat.log().waits_for("missing.pem");
    assert_eq!(secure.session().served(), first);
    let many = (0..40).map(|number| format!("X-{number}: 1\r\n")).collect::<String>();
    assert_eq!(status(&mut rig.edge(), &format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n")), 200, "nothing is taken");

    reloaded(rig, |config| {
        point_at(config, &files.cert, &files.key);
        config.remove("limits");
    });
    assert_eq!(secure.session().served(), second.der);
    assert_eq!(open.get("/open").expect("it was not cut").status, 200);
    // From now on the new files are those that are looked at.
    let third = Issued::for_names(&["shop.test"]);
    third.write(folder, "second");
    eventually("a renewed one is served", || (secure.session().served() == third.der).then_some(()));
    let metrics = get(rig.clearcoat.admin, "/metrics").expect("an answer");
    let ends = metrics.text().lines().filter(|line| line.starts_with("clearcoat_tls_certificate_expiry")).count();
    assert_eq!(ends, 1, "{}", metrics.text());
}

#[test]
fn an_access_log_is_begun_moved_and_ended() {
    let folder = tempfile::tempdir().expect("a folder");
    let [first, second] = ["first.log", "second.log"].map(|name| folder.path().join(name));
    let rig = Rig::start("", vec![Upstream::echo()], vec![]);
    let mut kept = rig.edge();
    let lines = |file: &std::path::Path| std::fs::read_to_string(file).unwrap_or_default().lines().count();
    assert_eq!(status(&mut kept, &get_request("/none")), 200);
    reloaded(&rig, |config| {
        set(config, "log", "access", "json");
        set(config, "log", "access_file", first.display().to_string());
    });
    assert_eq!(status(&mut kept, &get_request("/first")), 200);
    eventually("it is written", || (lines(&first) == 1).then_some(()));
    reloaded(&rig, |config| set(config, "log", "access_file", second.display().to_string()));
    assert_eq!(status(&mut kept, &get_request("/second")), 200);
    eventually("it is written elsewhere", || (lines(&second) == 1).then_some(()));
    reloaded(&rig, |config| set(config, "log", "access", "off"));
    assert_eq!(status(&mut kept, &get_request("/none-again")), 200);
    let threads = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", rig.clearcoat.pid())).expect("a process");
        let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        tasks
            .filter(|task| task.as_ref().is_ok_and(|_| true))
            .map(|task| name(task.expect("a task")))
            .filter(|name| name.trim() == "access-log")
            .count()
    };
    eventually("no thread writes any more", || (threads() == 0).then_some(()));
    assert_eq!((lines(&first), lines(&second)), (1, 1));
}

#[test]
fn a_drain_that_was_made_shorter_is_the_one_that_counts() {
    let held = Gate::default();
    let varnish = Upstream::start(move |call| {
        call.wait(&held);
        call.answer("late")
    });
    let mut rig = Rig::start("[shutdown]\nleave = \"0s\"\ndrain = \"1h\"", vec![varnish], vec![]);
    let mut client = rig.edge();
    client.send(get_request("/late")).expect("clearcoat reads");
    eventually("it is at the node", || (rig.inflight() == 1.0).then_some(()));
    reloaded(&rig, |config| set(config, "shutdown", "drain", "100ms"));
    let began = Instant::now();
    rig.clearcoat.terminate();
    assert!(rig.clearcoat.wait().success());
    assert!(began.elapsed().as_secs() < 600, "not after an hour");
    rig.clearcoat.log().waits_for("are cut: shutdown.drain is over");
}

#[test]
fn connections_of_an_address_are_limited_and_nobody_is_turned_out() {
    let rig = Rig::start("", vec![Upstream::echo()], vec![]);
    let mut before: Vec<Connection> = (0..3).map(|_| rig.edge()).collect();
    assert!(before.iter_mut().all(|client| status(client, &get_request("/before")) == 200));
    reloaded(&rig, |config| set(config, "limits", "max_connections_per_address", 1));
    let mut first = rig.edge();
    assert_eq!(status(&mut first, &get_request("/first")), 200);
    assert!(rig.edge().is_closed_by_peer(), "the second one is one too many");
    assert!(before.iter_mut().all(|client| status(client, &get_request("/after")) == 200));
}

#[test]
fn what_needs_a_restart_is_named_once_and_the_rest_is_taken() {
    let rig = Rig::start(&format!("[admin]\n{LISTEN}"), vec![Upstream::echo()], vec![]);
    reloaded(&rig, |config| {
        set(config, "runtime", "workers", 7);
        set(config, "journal", "retention", "2h");
        set(config, "admin", "hosts", vec!["clearcoat.shop.test"]);
        set(config, "edge", "policy", "random");
    });
    let log = rig.clearcoat.log();
    log.waits_for_count("takes effect at the next start: journal.retention, runtime.workers\"", 1);
    log.waits_for("the configuration was reloaded: admin.hosts, edge.policy\"");
    let answer = crate::support::client::get_of(rig.clearcoat.admin, "clearcoat.shop.test", "/api/v1/fleet");
    assert_eq!(answer.expect("an answer").status, 200, "a name that the admin listener knows now");
}
