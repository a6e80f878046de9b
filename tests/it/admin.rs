//! The operator's view: the admin listener, the commands, and the end of the process.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use crate::support::clearcoat::run;
use crate::support::client::{Connection, exchange, get, get_of};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};

/// Every metric family that a dashboard can rely on after one request and one purge.
const FAMILIES: [&str; 25] = [
    "bans_sent_total",
    "build_info",
    "cache_results_total",
    "edge_request_duration_seconds",
    "edge_requests_total",
    "fenced_total",
    "journal_append_duration_seconds",
    "journal_head_position",
    "node_current",
    "node_cursor_lag",
    "node_cursor_lag_seconds",
    "node_up",
    "origin_request_duration_seconds",
    "origin_requests_total",
    "purge_ack_duration_seconds",
    "purge_deliveries_total",
    "purge_sources_total",
    "purge_tags_total",
    "purge_wide_total",
    "purges_waiting",
    "purges_total",
    "stale_served_total",
    "upstream_connect_errors_total",
    "upstream_inflight",
    "retries_total",
];

fn small() -> Fleet {
    // What is said of seals depends on how far a trial is.
    let config = "[edge]\nlisten = [\"127.0.0.1:0\"]\nseal = false\n";
    Fleet::start(&Plan { varnish: 1, web: 1, config, ..Plan::default() })
}

/// A command's exit status, stdout and stderr.
fn result(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// A process without nodes that nobody has asked for anything.
#[test]
fn every_series_whose_labels_are_known_is_there_from_the_start() {
    let fleet = Fleet::start(&Plan { varnish: 0, web: 0, ..Plan::default() });
    for series in [
        "purges_total{kind=\"tags\",result=\"applied\"}",
        "purges_total{kind=\"none\",result=\"forbidden\"}",
        "purge_wide_total{what=\"everything\"}",
        "retries_total{reason=\"connect\",role=\"web\"}",
        "edge_requests_total{code_class=\"5xx\",node=\"\"}",
        "edge_failures_total{reason=\"none_up\"}",
        "origin_failures_total{reason=\"timeout\"}",
        "edge_sent_bytes_total",
        "tls_handshakes_total{result=\"failed\"}",
        "queue_length{role=\"web\",waits_for=\"node\"}",
        "queue_length{role=\"varnish\",waits_for=\"file\"}",
        "queue_duration_seconds_count{role=\"web\"}",
        "retries_refused_total{reason=\"no_answer\",role=\"varnish\"}",
        "origin_failures_total{reason=\"queue_full\"}",
        "access_log_dropped_total",
        "spans_dropped_total",
    ] {
        assert_eq!(fleet.clearcoat.metric(&format!("clearcoat_{series}")), 0.0, "{series}");
    }
    assert!(fleet.clearcoat.metric("process_resident_memory_bytes") > 1e6);
    assert!(fleet.clearcoat.metric("process_start_time_seconds") > 1e9);
}

/// Prometheus' own tool finds nothing to improve in names, units and help.
#[test]
fn promtool_has_nothing_to_say_of_the_metrics() {
    let fleet = small();
    fleet.get("/p/1");
    fleet.purge_tag("cat_p_1");
    let metrics = get(fleet.clearcoat.admin, "/metrics").expect("an answer");
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut promtool = promtool.spawn().expect("promtool");
    promtool.stdin.take().expect("a pipe").write_all(&metrics.body).expect("promtool reads");
    let (status, out, err) = result(&promtool.wait_with_output().expect("promtool"));
    assert_eq!((status, &*out, &*err), (Some(0), "", ""));
}

#[test]
fn what_clearcoat_and_its_vcl_ask_themselves_is_no_request() {
    let fleet = small();
    let origin = fleet.clearcoat.origin;
    let counted = |class: &str| {
        fleet.clearcoat.metric(&format!("clearcoat_origin_requests_total{{code_class=\"{class}\",node=\"\"}}"))
    };
    let refused = || fleet.clearcoat.metric("clearcoat_origin_failures_total{reason=\"method_refused\"}");
    let before = (counted("4xx"), refused());
    let probe = "PURGE /.clearcoat/probe HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    assert_eq!(exchange(origin, probe).expect("an answer").status, 405);
    let other = "PURGE /p HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    assert_eq!(exchange(origin, other).expect("an answer").status, 405);
    eventually("the other one is counted", || (refused() > before.1).then_some(()));
    assert_eq!((counted("4xx"), refused()), (before.0 + 1.0, before.1 + 1.0));
}

#[test]
fn the_admin_listener_tells_the_state_of_the_process_and_of_the_fleet() {
    let fleet = small();
    let admin = fleet.clearcoat.admin;
    assert_eq!(get(admin, "/healthz").expect("an answer").status, 200);
    assert_eq!(get(admin, "/readyz").expect("an answer").text(), "ready\n");
    assert_eq!(get_of(admin, "localhost", "/nothing").expect("an answer").status, 404);
    assert_eq!(exchange(admin, "POST /healthz HTTP/1.1\r\nHost: a\r\n\r\n").expect("an answer").status, 405);

    fleet.get("/p/1");
    fleet.purge_tag("cat_p_1");
    let answer = get(admin, "/api/v1/fleet").expect("an answer");
    assert_eq!(answer.header("Content-Type"), Some("application/json"));
    let mut json = answer.json();
    let version = json["version"].take();
    assert!(version.as_u64() >= Some(2), "{version}");
    for node in json["nodes"].as_array_mut().expect("nodes") {
        let node = node.as_object_mut().expect("a node");
        let recent = node.remove("recent").expect("it is told");
        assert!(recent["requests_per_second"].is_f64() && recent["part"].is_f64(), "{recent}");
        node.remove("since");
    }
    // A trial may still be running, and cursors are saved once a second.
    let varnish = json["nodes"][0].as_object_mut().expect("a node");
    varnish.remove("saved").expect("it is told");
    let trial = ["trial", "trial_finding", "trial_fenced"].map(|key| varnish.remove(key).expect("it is told"));
    assert!(trial[0].is_string() && trial[1].is_string() && trial[2] == false, "{trial:?}");
    let expected = serde_json::json!({
        "version": null, "head": 1, "fence": 1, "journal": "disk", "problems": [],
        "nodes": [
            {"role": "varnish", "id": "varnish-1", "address": fleet.varnish[0].address, "weight": 1, "share": 100, "health": "up",
             "reason": "", "state": "serving", "gets_traffic": true, "why": "", "advice": "", "inflight": 0, "source": "static",
             "cursor": 1, "lag": 0, "lag_seconds": 0.0, "current": true, "admitted": true, "seals": false, "delivery_error": "",
             "delivery": "magento", "header_limit": 7680, "send_proxy": "off"},
            {"role": "web", "id": "web-1", "address": fleet.web[0].address, "weight": 1, "share": 100, "health": "up", "reason": "",
             "state": "serving", "gets_traffic": true, "why": "", "advice": "", "inflight": 0, "source": "static"},
        ],
        "queues": [
            {"listener": "edge", "waiting": 0, "max_queue": 1024},
            {"listener": "origin", "waiting": 0, "max_queue": 1024},
        ],
    });
    assert_eq!(json, expected);
}

#[test]
fn every_family_of_metrics_is_there_with_its_help() {
    let mut fleet = small();
    fleet.get("/p/1");
    fleet.purge_tag("cat_p_1");
    fleet.purge_tag("cat_p");
    // A request whose first node is dead.
    fleet.varnish[0].kill();
    fleet.get("/p/1");
    let answer = get(fleet.clearcoat.admin, "/metrics").expect("an answer");
    assert!(
        answer.header("Content-Type").is_some_and(|kind| kind.starts_with("text/plain; version=0.0.4")),
        "{answer:?}"
    );
    let text = answer.text();
    let has = |start: String| text.lines().any(|line| line.starts_with(&start));
    let missing: Vec<_> = FAMILIES
        .iter()
        .filter(|family| !has(format!("# HELP clearcoat_{family} ")) || !has(format!("# TYPE clearcoat_{family} ")))
        .collect();
    assert!(missing.is_empty(), "without {missing:?}:\n{text}");
    // No label has a page, a tag or a client, except for senders of purges.
    for strange in ["/p/1", "cat_p_1", "shop.test"] {
        assert!(!text.contains(strange), "{strange} is in\n{text}");
    }
    let with_an_address: Vec<_> = text.lines().filter(|line| line.contains("127.0.0.1")).collect();
    assert_eq!(with_an_address, ["clearcoat_purge_sources_total{source=\"127.0.0.1\"} 2"]);
}

#[test]
fn the_command_status_shows_the_fleet() {
    let fleet = small();
    let admin = format!("http://{}", fleet.clearcoat.admin);
    let (code, table, errors) = result(&run(&["status", "--admin", &admin]));
    assert_eq!((code, errors.as_str()), (Some(0), ""));
    let row = |id: &str| table.lines().find(|line| line.contains(id)).map(|line| line.split_whitespace().collect());
    let varnish: Vec<&str> = row("varnish-1").unwrap_or_else(|| panic!("{table}"));
    let address = fleet.varnish[0].address.to_string();
    assert_eq!(varnish, ["varnish", "varnish-1", &address, "up", "yes", "0", "0"], "{table}");
    let web: Vec<&str> = row("web-1").unwrap_or_else(|| panic!("{table}"));
    assert_eq!(web[3..5], ["up", "yes"], "{table}");

    let (code, json, _) = result(&run(&["status", "--admin", &admin, "--json"]));
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!((code, &json["journal"]), (Some(0), &"disk".into()));

    let (code, ready, _) = result(&run(&["status", "--admin", &admin, "--ready"]));
    assert_eq!((code, ready.as_str()), (Some(0), "ready\n"));

    // The purge listener does not serve the admin API, and the edge serves neither.
    let purge = format!("http://{}", fleet.clearcoat.purge);
    let (code, _, errors) = result(&run(&["status", "--admin", &purge]));
    assert!(code == Some(1) && errors.contains(&purge), "{code:?} {errors}");
    let (code, ..) = result(&run(&["status", "--admin", "clearcoat"]));
    assert_eq!(code, Some(2));
}

#[test]
fn the_command_purge_purges_or_fails_with_a_reason() {
    let fleet = small();
    let endpoint = format!("http://{}", fleet.clearcoat.purge);
    let purge = |what: &[&str]| result(&run(&[&["purge", "--endpoint", &endpoint], what].concat()));
    let pages = ["/p/1", "/p/2", "/p/3"];
    pages.iter().for_each(|page| fleet.warm(page));
    let cached = || pages.map(|page| fleet.cached(page).concat());

    let done = |position| (Some(0), format!("purged at position {position}: applied by varnish-1\n"), String::new());
    assert_eq!(purge(&["--tag", "cat_p_1"]), done(1));
    assert_eq!(cached(), ["MISS", "HIT", "HIT"]);
    assert_eq!(purge(&["--url", "http://shop.test/p/2"]), done(2));
    assert_eq!(cached(), ["HIT", "MISS", "HIT"]);
    assert_eq!(purge(&["--all"]), done(3));
    assert_eq!(cached(), ["MISS", "MISS", "MISS"]);
    assert_eq!(purge(&["--pattern", "cat_p_[12]$", "--tag", "cat_p_1"]).0, Some(2));

    let (code, output, errors) = purge(&["--pattern", "cat_p_("]);
    assert_eq!((code, output.as_str()), (Some(1), ""));
    assert!(errors.contains("400") && errors.contains("X-Magento-Tags-Pattern"), "{errors}");
    assert_eq!(purge(&["--tag", "cat_p_.*"]).0, Some(2));
    assert_eq!(cached(), ["HIT", "HIT", "HIT"]);

    drop(fleet);
    let (code, _, errors) = result(&run(&["purge", "--endpoint", &endpoint, "--all"]));
    assert!(code == Some(1) && errors.contains(&endpoint), "{code:?} {errors}");
}

#[test]
fn the_command_check_prints_what_would_run_or_says_what_is_wrong() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("clearcoat.toml");
    let path = file.to_str().expect("a text path");
    let check = |text: &str| {
        std::fs::write(&file, text).expect("written");
        result(&run(&["check", "--config", path]))
    };
    let nodes = "[[node]]\nrole = \"varnish\"\nid = \"a\"\naddress = \"127.0.0.1:1\"\n[[node]]\nrole = \"web\"\nid = \"a\"\naddress = \"127.0.0.1:2\"\n";
    let text = format!("[purge]\nack_timeout = \"3s\"\n{nodes}");
    assert_eq!(check(&text), (Some(0), format!("{path} is valid: 1 Varnish, 1 web node\n"), String::new()));
    let (code, output, errors) = result(&run(&["check", "--show", "--config", path]));
    assert_eq!((code, errors.as_str()), (Some(0), ""));
    assert!(output.ends_with(&format!("\n# {path} is valid: 1 Varnish, 1 web node\n")), "{output}");
    let effective: toml::Table = output.parse().expect("TOML");
    assert_eq!(effective["purge"]["ack_timeout"].as_str(), Some("3s"), "{output}");
    assert_eq!(effective["journal"]["kind"].as_str(), Some("disk"), "{output}");

    let (code, output, errors) = check("[edge]\npolicy = \"fastest\"\n[purge]\nack_timout = \"1s\"\n");
    assert_eq!((code, output.as_str()), (Some(1), ""));
    let expected = [
        format!("{path}:2:1: edge.policy = \"fastest\": unknown value; allowed: rendezvous, "),
        format!("{path}:4:1: purge.ack_timout: unknown key; did you mean purge.ack_timeout? allowed: "),
        format!("{path} is not valid: 2 errors"),
    ];
    assert!(errors.lines().zip(&expected).all(|(line, start)| line.starts_with(start)), "{errors}");
    assert_eq!(errors.lines().count(), expected.len(), "{errors}");
    // A configuration that fails the check does not start.
    let (code, _, errors) = result(&run(&["serve", "--config", path]));
    assert!(code == Some(1) && errors.contains("edge.policy"), "{code:?} {errors}");
    // What is hardly meant is said, and the verdict is last.
    let (code, output, errors) = check("");
    assert_eq!((code, output), (Some(0), format!("{path} is valid: 0 Varnish, 0 web nodes\n")));
    assert!(errors.starts_with("warning: no node is configured"), "{errors}");
}

#[test]
fn a_second_clearcoat_on_the_same_journal_does_not_start() {
    let fleet = Fleet::start(&Plan { varnish: 0, web: 0, ..Plan::default() });
    let journal = fleet.folder.path().join("journal");
    let any = "listen = [\"127.0.0.1:0\"]";
    let config = format!(
        "[edge]\n{any}\n[origin]\n{any}\n[purge]\n{any}\n[admin]\n{any}\n[journal]\nkind = \"disk\"\npath = \"{}\"\n",
        journal.display()
    );
    let file = fleet.folder.path().join("second.toml");
    std::fs::write(&file, config).expect("written");
    let (code, _, errors) = result(&run(&["serve", "--config", file.to_str().expect("a text path")]));
    assert_eq!(code, Some(1));
    assert!(errors.contains("another clearcoat uses the journal"), "{errors}");
    assert!(errors.contains(journal.to_str().expect("a text path")), "{errors}");
    assert_eq!(get(fleet.clearcoat.admin, "/readyz").expect("an answer").status, 200);
}

#[test]
fn an_end_in_order_says_so_first_and_finishes_what_is_under_way() {
    let mut fleet = small();
    let (edge, admin) = (fleet.clearcoat.edge, fleet.clearcoat.admin);
    // One request whose body is incomplete, and one that is awaiting its uncached page.
    let mut post = Connection::open(edge).expect("a connection");
    post.send("POST /p/1 HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 10\r\n\r\n01234").expect("sent");
    let mut read = Connection::open(edge).expect("a connection");
    read.send("GET /p/77 HTTP/1.1\r\nHost: shop.test\r\n").expect("sent");
    eventually("the first request is at a node", || (fleet.clearcoat.node("varnish-1")["inflight"] == 1).then_some(()));

    fleet.clearcoat.terminate();
    eventually("it says that it is about to end", || {
        (get(admin, "/readyz").expect("an answer").status == 503).then_some(())
    });
    let (code, ..) = result(&run(&["status", "--admin", &format!("http://{admin}"), "--ready"]));
    assert_eq!(code, Some(1));
    // A client in front that has not noticed yet is still served.
    assert_eq!(fleet.get("/p/2").status, 200);
    eventually("the edge takes no more connections", || Connection::open(edge).is_err().then_some(()));

    post.send("56789").expect("sent");
    let answer = post.answer(false).expect("an answer");
    assert_eq!((answer.status, answer.header("Connection")), (200, Some("close")), "{answer:?}");
    read.send("\r\n").expect("sent");
    let answer = read.answer(false).expect("an answer");
    assert_eq!((answer.status, answer.header("Connection")), (200, Some("close")), "{answer:?}");
    assert!(post.is_closed_by_peer() && read.is_closed_by_peer());
    let status = fleet.clearcoat.wait();
    assert_eq!(status.code(), Some(0), "{status}");
}
