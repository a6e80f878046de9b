//! The access log: what a line says of a request, however it ended, and what none ever says.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::data_path::rig::{Rig, always, get_request};
use crate::data_path::tls::Secure;
use crate::support::client::{Answer, Connection, get};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::frames::{END_HEADERS, END_STREAM, Frames, HEADERS, field, frame, request_fields};
use crate::support::http2::{Http2, request};
use crate::support::upstream::{Gate, Then, Upstream};
use crate::support::varnish::signal;

const HIT: &str = "HTTP/1.1 200 OK\r\nX-Varnish: 32773 5\r\nX-Request-ID: of-a-node\r\nContent-Length: 4\r\n\r\npage";

/// The configuration of a log in a file of this folder. The log for people is verbose, as other tests have it.
pub(super) fn log_in(folder: &Path, more: &str) -> (String, AccessFile) {
    let file = folder.join("access.log");
    let config =
        format!("[log]\nlevel = \"debug\"\nformat = \"json\"\naccess = \"json\"\naccess_file = {file:?}\n{more}\n");
    (config, AccessFile(file))
}

pub(super) struct AccessFile(PathBuf);

impl AccessFile {
    fn text(&self) -> String {
        // Not there before the first line.
        std::fs::read_to_string(&self.0).unwrap_or_default()
    }

    /// The lines, once there are so many.
    pub(super) fn lines(&self, count: usize) -> Vec<Value> {
        let text = eventually(&format!("the access log has {count} lines"), || {
            Some(self.text()).filter(|text| text.lines().count() >= count)
        });
        assert_eq!(text.lines().count(), count, "{text}");
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
    }

    /// The only line of this path, once it is there.
    pub(super) fn of(&self, path: &str) -> Value {
        let text = eventually(&format!("the access log has {path}"), || {
            self.text().lines().find(|line| line.contains(&format!("\"target\":\"{path}\""))).map(str::to_owned)
        });
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }
}

fn is_made(id: &str) -> bool {
    id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[test]
fn a_line_says_who_asked_for_what_and_who_answered_and_how_long_it_took() {
    let folder = tempfile::tempdir().unwrap();
    let (config, log) = log_in(folder.path(), "");
    let rig = Rig::start(&config, vec![always(HIT, Then::KeepAlive)], vec![]);
    let mut client = rig.edge();
    let sent = "POST /p?a=1 HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 5\r\n\r\nhello";
    client.send(sent).unwrap();
    let answer = client.answer(false).unwrap();
    let id = answer.header("x-request-id").expect("an id");
    assert!(is_made(id), "{id}");
    let line = &log.lines(1)[0];
    for (key, expected) in [
        ("listener", Value::from("edge")),
        ("client", "127.0.0.1".into()),
        ("method", "POST".into()),
        ("host", "shop.test".into()),
        ("target", "/p?a=1".into()),
        ("protocol", "HTTP/1.1".into()),
        ("status", 200.into()),
        ("bytes_down", (answer.head.len() + 4 + answer.body.len()).into()),
        ("bytes_up", sent.len().into()),
        ("node", "varnish-1".into()),
        ("tries", 1.into()),
        ("cache", "hit".into()),
        ("termination", "--".into()),
        ("reason", Value::Null),
        ("request_id", id.into()),
    ] {
        assert_eq!(line[key], expected, "{key} of {line}");
    }
    let times = ["queue_ms", "connect_ms", "first_byte_ms", "total_ms"].map(|key| line[key].as_f64().expect("a time"));
    assert!(times[1] > 0.0 && times[..3].iter().sum::<f64>() <= times[3], "{line}");
    assert!(humantime::parse_rfc3339(line["time"].as_str().unwrap()).is_ok(), "{line}");
    // The connection is kept, so the next request opens none.
    client.send(get_request("/next")).unwrap();
    let next = client.answer(false).unwrap();
    assert_ne!(next.header("x-request-id"), Some(id));
    assert_eq!(log.of("/next")["connect_ms"], 0.0);
    // Nodes are told the id.
    let calls = rig.varnish[0].calls();
    assert_eq!(calls[0].header("x-request-id"), Some(id));
    assert_eq!(rig.counter("clearcoat_edge_received_bytes_total"), (sent.len() + get_request("/next").len()) as f64);
}

#[test]
fn an_id_is_a_trusted_proxys_or_new_and_never_a_strangers() {
    let folder = tempfile::tempdir().unwrap();
    let (log_config, log) = log_in(folder.path(), "");
    let edge = "[edge]\nlisten = [\"127.0.0.1:0\"]\nseal = false\ntrusted_proxies = [\"127.0.0.2\"]\n";
    let rig = Rig::start(&format!("{log_config}{edge}"), vec![always(HIT, Then::KeepAlive)], vec![]);
    let ask = |from: [u8; 4], path: &str, ids: &str| {
        let mut client = Connection::open_from(from, rig.clearcoat.edge).unwrap();
        client.send(format!("GET {path} HTTP/1.1\r\nHost: shop.test\r\n{ids}\r\n")).unwrap();
        let answer = client.answer(false).unwrap();
        assert_eq!(answer.head.to_lowercase().matches("x-request-id").count(), 1, "{answer:?}");
        let id = answer.header("x-request-id").unwrap().to_owned();
        let seen = rig.varnish[0].calls().pop().unwrap();
        assert_eq!(seen.head.to_lowercase().matches("x-request-id").count(), 1, "{seen:?}");
        assert_eq!((seen.header("x-request-id"), &log.of(path)["request_id"]), (Some(&*id), &Value::from(&*id)));
        id
    };
    assert_eq!(ask([127, 0, 0, 2], "/1", "X-Request-Id: lb-7/a\r\n"), "lb-7/a");
    for (number, (from, ids)) in [
        ([127, 0, 0, 1], "X-Request-Id: lb-7/a\r\n"),
        ([127, 0, 0, 2], "X-Request-Id: a\r\nX-Request-Id: b\r\n"),
        ([127, 0, 0, 2], "X-Request-Id: a\"b c\r\n"),
        ([127, 0, 0, 2], ""),
    ]
    .into_iter()
    .enumerate()
    {
        let id = ask(from, &format!("/new/{number}"), ids);
        assert!(is_made(&id), "{id} for {ids:?}");
    }
    // So has one that is refused, and the first on its connection.
    let mut client = Connection::open_from([127, 0, 0, 2], rig.clearcoat.edge).unwrap();
    client.send("PURGE /refused HTTP/1.1\r\nHost: shop.test\r\nX-Request-Id: lb-9\r\n\r\n").unwrap();
    assert_eq!(client.answer(false).unwrap().header("x-request-id"), Some("lb-9"));
    assert_eq!(log.of("/refused")["request_id"], "lb-9");
    // Lines of the log for people have the same name.
    let mut client = Connection::open_from([127, 0, 0, 2], rig.clearcoat.edge).unwrap();
    client.send("BREW / HTTP/1.1\r\nHost: shop.test\r\nX-Request-Id: lb-8\r\nContent-Length: 1\r\n\r\n").unwrap();
    client.stream.shutdown(Shutdown::Both).unwrap();
    rig.clearcoat.log().waits_for("\"request\":\"lb-8\"");
}

#[test]
fn the_client_of_a_line_is_whom_a_trusted_proxy_names() {
    let folder = tempfile::tempdir().unwrap();
    let (log_config, log) = log_in(folder.path(), "");
    let edge = "[edge]\nlisten = [\"127.0.0.1:0\"]\nseal = false\ntrusted_proxies = [\"127.0.0.2\"]\nblocked = [\"192.0.2.0/24\"]\n";
    let rig = Rig::start(&format!("{log_config}{edge}"), vec![always(HIT, Then::KeepAlive)], vec![]);
    for (number, (from, named, client)) in [
        ([127, 0, 0, 2], "198.51.100.7", "198.51.100.7"),
        // It is refused, and one can see whom to ask why.
        ([127, 0, 0, 2], "192.0.2.7", "192.0.2.7"),
        ([127, 0, 0, 2], "192.0.2.8, 2001:db8::7", "2001:db8::7"),
        ([127, 0, 0, 2], "nobody", "127.0.0.2"),
        ([127, 0, 0, 1], "198.51.100.7", "127.0.0.1"),
    ]
    .into_iter()
    .enumerate()
    {
        let (path, mut stream) = (format!("/{number}"), Connection::open_from(from, rig.clearcoat.edge).unwrap());
        stream.send(format!("GET {path} HTTP/1.1\r\nHost: shop.test\r\nX-Forwarded-For: {named}\r\n\r\n")).unwrap();
        stream.answer(false).unwrap();
        assert_eq!(log.of(&path)["client"], client, "{named}");
    }
}

/// What a line says of a request that failed.
pub(super) fn ended(line: &Value) -> (u64, &str, &str) {
    let text = |key: &str| line[key].as_str().unwrap_or_else(|| panic!("no {key} in {line}"));
    (line["status"].as_u64().expect("a status"), text("termination"), text("reason"))
}

#[test]
fn who_ended_a_request_and_in_which_phase_is_in_its_line_and_its_counter() {
    let folder = tempfile::tempdir().unwrap();
    let (log_config, log) = log_in(folder.path(), "");
    let limits = "[timeouts]\nclient_header = \"300ms\"\n";
    let hold = Gate::default();
    let node = {
        let hold = hold.clone();
        Upstream::start(move |call| match call.path().to_owned().as_str() {
            "/silent" => {
                hold.wait("the client has left");
                Then::Close
            }
            "/none" => Then::Close,
            "/cut" => call.send_then("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", Then::Close),
            "/endless" => {
                _ = call.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf");
                hold.wait("the client has left");
                Then::Close
            }
            "/malformed" => call.send_then("HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", Then::Close),
            _ => call.send_then(HIT, Then::KeepAlive),
        })
    };
    let rig = Rig::start(&format!("{log_config}{limits}"), vec![node], vec![]);
    let send = |bytes: &str| {
        let mut client = rig.edge();
        client.send(bytes).unwrap();
        client
    };
    let answered = |bytes: &str| send(bytes).answer(false).unwrap().status;
    assert_eq!(answered("GET /a\x01 HTTP/1.1\r\nHost: a\r\n\r\n"), 400);
    let unread = log.lines(1).remove(0);
    assert_eq!((ended(&unread), &unread["target"]), ((400, "PR", "bad_request"), &Value::Null));
    assert_eq!(answered("GET /slow HTTP/1.1\r\nHost:"), 408);
    let slow = log.lines(2).remove(1);
    assert_eq!((ended(&slow), &slow["method"]), ((408, "cR", "client_timeout"), &Value::Null));

    assert_eq!(answered("PURGE /purge HTTP/1.1\r\nHost: a\r\n\r\n"), 405);
    assert_eq!(ended(&log.of("/purge")), (405, "PR", "method_refused"));
    assert_eq!(answered("POST /none HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\na"), 502);
    assert_eq!(ended(&log.of("/none")), (502, "SH", "no_answer"));
    assert_eq!(answered(&get_request("/malformed")), 502);
    assert_eq!(ended(&log.of("/malformed")), (502, "PH", "bad_answer_head"));
    let mut client = send(&get_request("/cut"));
    assert!(client.answer(false).is_err());
    assert_eq!(ended(&log.of("/cut")), (200, "SD", "cut"));

    // A client that has only closed its half may be waiting for the answer: this one is gone.
    let reset = |client: Connection| {
        socket2::SockRef::from(&client.stream).set_linger(Some(Duration::ZERO)).unwrap();
    };
    let waiting = send(&get_request("/silent"));
    eventually("the node has the request", || {
        rig.varnish[0].calls().iter().any(|call| call.head.contains("/silent")).then_some(())
    });
    reset(waiting);
    let gone = log.of("/silent");
    assert_eq!(ended(&gone), (499, "CH", "client_gone"));
    assert_eq!(
        (&gone["first_byte_ms"], &gone["node"], &gone["bytes_down"]),
        (&Value::Null, &"varnish-1".into(), &0.into())
    );
    let mut client = send(&get_request("/endless"));
    client.head().unwrap();
    reset(client);
    assert_eq!(ended(&log.of("/endless")), (200, "CD", "client_gone"));
    hold.open();
    let reasons = [
        ("bad_request", 1),
        ("client_timeout", 1),
        ("method_refused", 1),
        ("no_answer", 1),
        ("cut", 1),
        ("client_gone", 2),
    ];
    for (reason, count) in reasons.into_iter().chain([("none_up", 0)]) {
        let series = format!("clearcoat_edge_failures_total{{reason=\"{reason}\"}}");
        assert_eq!(rig.clearcoat.metric(&series), f64::from(count), "{reason}");
    }
}

#[test]
fn a_client_that_leaves_in_the_middle_of_a_head_has_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let (config, log) = log_in(folder.path(), "");
    let rig = Rig::start(&config, vec![], vec![]);
    let send = |bytes: &str| {
        let mut client = rig.edge();
        client.send(bytes).unwrap();
        client
    };
    // A line break is no part of a request.
    let mut nothing = send("\r\n");
    nothing.stream.shutdown(Shutdown::Write).unwrap();
    assert!(nothing.rest().0.is_empty());
    for (number, is_reset) in [false, true].into_iter().enumerate() {
        let client = send("GET /half HTTP/1.1\r\nHost:");
        if is_reset {
            socket2::SockRef::from(&client.stream).set_linger(Some(Duration::ZERO)).unwrap();
        }
        drop(client);
        let half = log.lines(number + 1).remove(number);
        assert_eq!((ended(&half), &half["method"]), ((499, "CR", "client_gone"), &Value::Null));
    }
    assert_eq!(rig.clearcoat.metric("clearcoat_edge_failures_total{reason=\"client_gone\"}"), 2.0);
}

#[test]
fn a_request_that_finds_no_node_says_that_it_tried_none() {
    let folder = tempfile::tempdir().unwrap();
    let (config, log) = log_in(folder.path(), "access_sample = 0.0");
    let rig = Rig::start(&config, vec![], vec![]);
    assert_eq!(get(rig.clearcoat.edge, "/p").unwrap().status, 503);
    let line = log.of("/p");
    assert_eq!(ended(&line), (503, "SC", "none_up"));
    assert_eq!((&line["node"], &line["tries"], &line["queue_ms"]), (&Value::Null, &0.into(), &Value::Null));
}

#[test]
fn cookies_credentials_and_values_of_secret_parameters_are_in_no_line() {
    let folder = tempfile::tempdir().unwrap();
    let (config, log) = log_in(folder.path(), "");
    let rig = Rig::start(&config, vec![always(HIT, Then::KeepAlive)], vec![]);
    let mut client = rig.edge();
    let fields = "Cookie: PHPSESSID=geheim\r\nAuthorization: Bearer geheim\r\nReferer: https://a/?token=geheim";
    let target = "/customer/account/createPassword?id=1&token=geheim&SID=geheim&login%5Bpassword%5D=geheim";
    client.send(format!("GET {target} HTTP/1.1\r\nHost: shop.test\r\n{fields}\r\n\r\n")).unwrap();
    client.answer(false).unwrap();
    let line = log.lines(1).remove(0);
    assert_eq!(line["target"], "/customer/account/createPassword?id=1&token=***&SID=***&login%5Bpassword%5D=***",);
    assert!(!log.text().contains("geheim"), "{}", log.text());
}

#[test]
fn an_http2_request_has_a_line_and_an_id_like_any_other() {
    let folder = tempfile::tempdir().unwrap();
    let (config, log) = log_in(folder.path(), "");
    let node = Upstream::start(|call| match call.path() {
        "/none" => Then::Close,
        _ => call.send_then(HIT, Then::KeepAlive),
    });
    let secure = Secure::start("seal = false", &config, vec![node]);
    let http2 = Http2::open(secure.address());
    let answer = http2.get("/p").unwrap();
    let line = log.of("/p");
    assert_eq!(answer.header("x-request-id"), line["request_id"].as_str());
    assert_eq!(
        [&line["protocol"], &line["status"], &line["bytes_down"], &line["cache"]],
        [&Value::from("HTTP/2.0"), &200.into(), &4.into(), &"hit".into()]
    );
    let failed = http2.exchange(request("POST", "/none").body(()).unwrap(), b"a").unwrap();
    let line = log.of("/none");
    assert_eq!((ended(&line), failed.header("x-request-id")), ((502, "SH", "no_answer"), line["request_id"].as_str()));
}

#[test]
fn a_request_that_is_refused_as_http_2_is_counted_and_has_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let (config, log) = log_in(folder.path(), "");
    let config = format!("{config}[limits]\nmax_head = 2048\n");
    let secure = Secure::start("seal = false", &config, vec![always(HIT, Then::KeepAlive)]);
    let mut client = Frames::open(secure.address(), &[]);
    let get = request_fields("GET", "/p");
    let heads = [
        // Found by clearcoat's screen, by h2, and too long for it.
        ([&get[..], &field("Upper", "a")].concat(), 400, "bad_request"),
        ([&get[..], &field("connection", "close")].concat(), 400, "bad_request"),
        (field("a", "without a method"), 400, "bad_request"),
        ([&get[..], &field("a", &"b".repeat(100)).repeat(30)].concat(), 431, "request_head_too_large"),
        (get.clone(), 200, ""),
    ];
    for (number, (head, status, reason)) in heads.into_iter().enumerate() {
        let stream = 2 * number as u32 + 1;
        assert!(client.send(frame(HEADERS, END_HEADERS | END_STREAM, stream, head)));
        client.wait_for("it ends", |frame| frame.stream == stream).expect("a frame");
        let line = log.lines(number + 1).remove(number);
        if status == 200 {
            assert_eq!((&line["status"], &line["target"]), (&200.into(), &"/p".into()));
        } else {
            assert_eq!((ended(&line), &line["method"]), ((status, "PR", reason), &Value::Null));
        }
    }
    let count = |series: &str| secure.rig.clearcoat.metric(series);
    assert_eq!(count("clearcoat_edge_requests_total{code_class=\"4xx\",node=\"\"}"), 4.0);
    assert_eq!(count("clearcoat_edge_failures_total{reason=\"bad_request\"}"), 3.0);
    assert_eq!(count("clearcoat_edge_failures_total{reason=\"request_head_too_large\"}"), 1.0);
}

#[test]
fn a_tunnel_has_an_id_and_the_time_of_its_head() {
    let folder = tempfile::tempdir().unwrap();
    let (config, log) = log_in(folder.path(), "");
    let node = Upstream::start(|call| {
        call.send_then("HTTP/1.1 101 Switching Protocols\r\nUpgrade: a\r\nConnection: upgrade\r\n\r\n", Then::Close)
    });
    let rig = Rig::start(&config, vec![node], vec![]);
    let mut client = rig.edge();
    client.send("GET /talk HTTP/1.1\r\nHost: a\r\nUpgrade: a\r\nConnection: upgrade\r\n\r\n").unwrap();
    let head = client.head().unwrap();
    client.stream.shutdown(Shutdown::Write).unwrap();
    let line = log.of("/talk");
    assert_eq!((head.status, head.header("x-request-id")), (101, line["request_id"].as_str()));
    assert!(line["first_byte_ms"].is_number() && line["termination"] == "--", "{line}");
}

#[test]
fn a_share_of_the_requests_is_written_and_every_failure() {
    let folder = tempfile::tempdir().unwrap();
    let (config, log) = log_in(folder.path(), "access_sample = 0.0");
    let rig = Rig::start(&config, vec![always(HIT, Then::KeepAlive)], vec![]);
    let mut client = rig.edge();
    for _ in 0..20 {
        client.send(get_request("/p")).unwrap();
        assert_eq!(client.answer(false).unwrap().status, 200);
    }
    client.send("PURGE /last HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(client.answer(false).unwrap().status, 405);
    assert_eq!(log.lines(1)[0]["target"], "/last");
}

#[test]
fn a_file_is_opened_again_on_usr1_and_the_last_lines_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let (config, log) = log_in(folder.path(), "");
    let mut rig = Rig::start(&config, vec![always(HIT, Then::KeepAlive)], vec![]);
    let mut client = rig.edge();
    let mut ask = |path: &str| {
        client.send(get_request(path)).unwrap();
        assert_eq!(client.answer(false).unwrap().status, 200);
    };
    ask("/before");
    log.of("/before");
    let old = AccessFile(folder.path().join("access.log.1"));
    std::fs::rename(&log.0, &old.0).unwrap();
    signal("-USR1", &[rig.clearcoat.pid()]);
    eventually("the file is made anew", || log.0.exists().then_some(()));
    ask("/after");
    log.of("/after");
    assert_eq!(old.lines(1)[0]["target"], "/before");
    for number in 0..50 {
        ask(&format!("/last/{number}"));
    }
    drop(client);
    rig.clearcoat.terminate();
    assert!(rig.clearcoat.wait().success());
    assert_eq!(log.lines(51)[50]["target"], "/last/49");
}

#[test]
fn without_an_access_log_there_are_no_ids_and_usr1_ends_nothing() {
    let rig = Rig::start("", vec![always(HIT, Then::KeepAlive)], vec![]);
    signal("-USR1", &[rig.clearcoat.pid()]);
    rig.clearcoat.log().waits_for("SIGUSR1");
    let mut client = rig.edge();
    client.send("GET / HTTP/1.1\r\nHost: a\r\nX-Request-ID: mine\r\n\r\n").unwrap();
    assert_eq!(client.answer(false).unwrap().header("x-request-id"), Some("of-a-node"));
    assert_eq!(rig.varnish[0].calls()[0].header("x-request-id"), Some("mine"));
}

#[test]
fn a_pipe_that_nobody_reads_costs_lines_and_no_request() {
    let folder = tempfile::tempdir().unwrap();
    let (config, log) = log_in(folder.path(), "");
    let made = Command::new("mkfifo").arg(&log.0).status().unwrap();
    assert!(made.success());
    // Opened for both, so that neither side waits for the other to open it.
    let mut pipe = std::fs::OpenOptions::new().read(true).write(true).open(&log.0).unwrap();
    rustix::io::ioctl_fionbio(pipe.as_fd(), true).unwrap();
    while pipe.write(&[b'\n'; 4096]).is_ok() {}
    let rig = Rig::start(&config, vec![always(HIT, Then::KeepAlive)], vec![]);
    let mut client = rig.edge();
    for number in 0..2_000 {
        client.send(get_request(&format!("/{number}"))).unwrap();
        assert_eq!(client.answer(false).unwrap().status, 200);
    }
    // Once it is read, what waited is there.
    let mut text = Vec::new();
    eventually("every line has come", || {
        let mut piece = [0; 64 * 1024];
        while let Ok(read) = pipe.read(&mut piece) {
            text.extend_from_slice(&piece[..read]);
        }
        let lines = text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).count();
        (lines == 2_000).then_some(())
    });
    assert_eq!(rig.clearcoat.metric("clearcoat_access_log_dropped_total"), 0.0);
}

#[test]
fn a_file_that_cannot_be_opened_is_said_once_and_costs_its_lines_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (config, log) = log_in(&folder.path().join("missing"), "");
    let rig = Rig::start(&config, vec![always(HIT, Then::KeepAlive)], vec![]);
    let mut client = rig.edge();
    for count in 1..=3 {
        client.send(get_request("/p")).unwrap();
        assert_eq!(client.answer(false).unwrap().status, 200);
        eventually("the line is counted as lost", || {
            (rig.clearcoat.metric("clearcoat_access_log_dropped_total") == f64::from(count)).then_some(())
        });
    }
    rig.clearcoat.log().waits_for_count("the access log cannot be written", 1);
    std::fs::create_dir(folder.path().join("missing")).unwrap();
    signal("-USR1", &[rig.clearcoat.pid()]);
    eventually("the file is there", || log.0.exists().then_some(()));
    client.send(get_request("/written")).unwrap();
    client.answer(false).unwrap();
    log.of("/written");
}

/// With real Varnish: what its cache did is told, and one id leads from the edge to the web node.
#[test]
fn a_request_is_followed_by_its_id_through_edge_varnish_and_origin() {
    let folder = tempfile::tempdir().unwrap();
    let (config, log) = log_in(folder.path(), "");
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, config: config.leak(), ..Plan::default() });
    let answers = [fleet.get("/p/1"), fleet.get("/p/1"), fleet.get("/customer/")];
    let lines = eventually("the access log has all of them", || {
        let text = log.text();
        let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let of = |listener: &str, target: &str| -> Vec<Value> {
            let is = |line: &&Value| line["listener"] == listener && line["target"] == target;
            lines.iter().filter(is).cloned().collect()
        };
        let found = (of("edge", "/p/1"), of("origin", "/p/1"), of("edge", "/customer/"));
        (found.0.len() == 2 && found.1.len() == 1 && found.2.len() == 1).then_some(found)
    });
    let (unordered, fetched, private) = lines;
    // Each worker hands over its own lines.
    let of = |answer: &Answer| {
        let mut lines = unordered.iter().filter(|line| line["request_id"].as_str() == answer.header("x-request-id"));
        lines.next().expect("its line").clone()
    };
    let pages: Vec<Value> = answers[..2].iter().map(of).collect();
    let mut results: Vec<&str> = pages.iter().filter_map(|line| line["cache"].as_str()).collect();
    results.push(private[0]["cache"].as_str().expect("a result"));
    assert_eq!(results, ["miss", "hit", "pass"]);
    for (line, answer) in pages.iter().chain(&private).zip(&answers) {
        assert_eq!(line["request_id"].as_str(), answer.header("x-request-id"), "{line}");
    }
    let origin = &fetched[0];
    assert_eq!(origin["request_id"], pages[0]["request_id"], "the one that missed");
    assert_eq!([&origin["node"], &origin["cache"]], [&Value::from("web-1"), &Value::Null]);
}
