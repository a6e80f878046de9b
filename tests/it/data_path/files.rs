//! Open files: traffic beyond the limit waits or is refused, without affecting anything else.

use std::process::Command;

use crate::data_path::rig::{Rig, get_request};
use crate::support::client::{Connection, get, purge, tag};
use crate::support::eventually;
use crate::support::upstream::{Gate, Then, Upstream};

/// A single failed check takes a node down.
const CHECKS: &str = "[health.web]\ninterval = \"1s\"\ntimeout = \"1s\"\nfall = 1\n\
    [health.varnish]\ntrial = false\ninterval = \"1s\"\ntimeout = \"1s\"\nfall = 1\n";

/// Answers `/held` only when the gate is open, and long answers to `/long`.
fn holding(gate: &Gate) -> Upstream {
    let gate = gate.clone();
    Upstream::start(move |call| {
        if call.path() == "/held" && !call.wait(&gate) {
            return Then::Close;
        }
        match call.path() {
            "/long" => call.answer(&"x".repeat(1 << 20)),
            _ => call.answer("ok"),
        }
    })
}

fn limit(rig: &Rig) -> String {
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", rig.clearcoat.pid())).expect("a running process");
    let line = limits.lines().find(|line| line.starts_with("Max open files")).expect("a limit");
    line.split_whitespace().nth(3).expect("the soft one").to_owned()
}

fn shortages(rig: &Rig, at: &str) -> f64 {
    rig.counter(&format!("clearcoat_shortages_total{{at=\"{at}\"}}"))
}

fn all_up(rig: &Rig) -> bool {
    rig.clearcoat.nodes().iter().all(|node| node["health"] == "up")
}

#[test]
fn the_soft_limit_is_raised_to_the_hard_one() {
    let rig = Rig::with_files((64, 3000), CHECKS, vec![Upstream::echo()], vec![Upstream::echo()]);
    assert_eq!(limit(&rig), "3000");
    assert!(rig.clearcoat.log().has("\"before\":64"), "{}", rig.clearcoat.log().text());
}

#[test]
fn clients_beyond_the_open_files_wait_or_are_refused_affecting_no_others() {
    const CLIENTS: usize = 150;
    for edge in [true, false] {
        let gate = Gate::default();
        let rig = Rig::with_files((256, 256), CHECKS, vec![holding(&gate)], vec![holding(&gate)]);
        let (listener, share) = if edge { (rig.clearcoat.edge, "edge") } else { (rig.clearcoat.origin, "origin") };
        let mut clients: Vec<Connection> = (0..CLIENTS)
            .map(|_| {
                let mut client = Connection::open(listener).expect("the kernel accepts");
                client.send(get_request("/held")).expect("the kernel accepts");
                client
            })
            .collect();
        eventually("both shares are short", || {
            let short = |of| shortages(&rig, &format!("{share}_{of}")) > 0.0;
            (short("clients") && short("nodes")).then_some(())
        });
        let files = std::fs::read_dir(format!("/proc/{}/fd", rig.clearcoat.pid())).unwrap().count();
        assert!(files < 250, "{files} files are open");
        for _ in 0..10 {
            assert!(all_up(&rig), "{}", rig.clearcoat.fleet());
            assert_eq!(purge(rig.clearcoat.purge, &tag("cat_p_1")).expect("an answer").status, 200);
        }
        gate.open();
        let mut served = 0;
        for (number, client) in clients.iter_mut().enumerate() {
            let answer = client.answer(false).unwrap_or_else(|error| panic!("{share} {number}: {error}"));
            assert!([200, 503].contains(&answer.status), "{share} {number}: {answer:?}");
            assert!(answer.status == 200 || answer.header("Retry-After") == Some("1"), "{answer:?}");
            served += usize::from(answer.status == 200);
            // Releases its file.
            client.stream.shutdown(std::net::Shutdown::Both).unwrap();
        }
        assert!(served > 10, "{served} of {CLIENTS}");
        assert!(all_up(&rig), "{}", rig.clearcoat.fleet());
        let log = rig.clearcoat.log();
        assert!(!log.has("Too many open files") && !log.has("node is down"), "{}", log.text());
        // Logged once, not for each request.
        assert_eq!(log.count(&format!("\"at\":\"{share}_nodes\"")), 1, "{}", log.text());
        rig.becomes_idle();
        // Spare files are returned: a long answer has room for its pipe again.
        assert_eq!(get(listener, "/long").unwrap().body.len(), 1 << 20);
    }
}

/// Changes the soft limit of the process. Open files stay open.
fn change_limit(rig: &Rig, files: usize) {
    let (pid, limit) = (rig.clearcoat.pid().to_string(), format!("--nofile={files}:"));
    let set = Command::new("prlimit").args(["--pid", &pid, &limit]).status().expect("util-linux");
    assert!(set.success(), "{set}");
}

#[test]
fn a_check_or_connect_that_fails_for_lack_of_files_blames_no_node() {
    let rig = Rig::start(CHECKS, vec![Upstream::echo()], vec![Upstream::echo()]);
    // Opened while files are available.
    let (mut admin, mut edge) = (Connection::open(rig.clearcoat.admin).unwrap(), rig.edge());
    let mut ask = |path: &str| {
        admin.send(get_request(path).replace("shop.test", "localhost")).unwrap();
        admin.answer(false).unwrap().text().to_owned()
    };
    ask("/healthz");
    edge.send(get_request("/before")).unwrap();
    assert_eq!(edge.answer(false).unwrap().status, 200);
    eventually("what was kept is closed", || (rig.varnish[0].open_connections() == 0).then_some(()));
    // No file is left for anything new.
    change_limit(&rig, 3);
    eventually("many checks could not be carried out", || {
        let text = ask("/metrics");
        let count = text.lines().find_map(|line| line.strip_prefix("clearcoat_shortages_total{at=\"probe\"} "));
        (count.expect("a counter").parse::<f64>().unwrap() >= 10.0).then_some(())
    });
    let mut waits = rig.edge();
    edge.send(get_request("/now")).unwrap();
    let answer = edge.answer(false).unwrap();
    assert_eq!((answer.status, answer.header("Retry-After")), (503, Some("1")), "{answer:?}");
    assert_eq!(ask("/api/v1/fleet").matches("\"health\":\"up\"").count(), 2);
    assert!(ask("/metrics").contains("clearcoat_upstream_connect_errors_total{node=\"varnish-1\",role=\"varnish\"} 0"));
    eventually("the edge says that it cannot accept", || rig.clearcoat.log().has("\"at\":\"accept\"").then_some(()));

    change_limit(&rig, 1024);
    // The other one was closed after its 503, as after any answer of our own.
    assert_eq!(get(rig.clearcoat.edge, "/after").unwrap().text(), "/after");
    waits.send(get_request("/waited")).unwrap();
    assert_eq!(waits.answer(false).unwrap().text(), "/waited");
    let log = rig.clearcoat.log();
    assert!(!log.has("node is down"), "{}", log.text());
    for at in ["probe", "accept", "connect"] {
        assert_eq!(log.count(&format!("\"at\":\"{at}\"")), 1, "{at} is said more than once, or never: {}", log.text());
    }
}
