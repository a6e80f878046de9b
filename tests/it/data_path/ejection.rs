//! Nodes that pass their checks and fail the requests of clients.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::rig::{Rig, always, get_request};
use crate::support::client::{exchange, purge, tag};
use crate::support::eventually;
use crate::support::upstream::{Call, Then, Upstream};

const UNAVAILABLE: &str = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno";

/// Longer than a row of failures has to last.
const LONG: Duration = Duration::from_millis(2500);

fn checks(eject_for: &str) -> String {
    format!(
        "[health.web]\ninterval = \"500ms\"\ntimeout = \"500ms\"\nslow_start = \"0s\"\neject_for = \"{eject_for}\"\n"
    )
}

/// A node that answers like this while the switch is on, and well otherwise.
fn failing(is_failing: &Arc<AtomicBool>, answer: &'static str, then: Then) -> Upstream {
    let is_failing = Arc::clone(is_failing);
    Upstream::start(move |call: &mut Call<'_>| match is_failing.load(Ordering::SeqCst) {
        true => call.send_then(answer, then),
        false => call.answer("page"),
    })
}

fn sound() -> Upstream {
    Upstream::start(|call: &mut Call<'_>| call.answer("page"))
}

/// Requests, whatever becomes of them.
fn ask(rig: &Rig, requests: usize) {
    for request in 0..requests {
        _ = exchange(rig.clearcoat.origin, get_request(&format!("/p/{request}")));
    }
}

fn ask_for(rig: &Rig, time: Duration, path: impl Fn(usize) -> String) {
    let began = Instant::now();
    for request in 0.. {
        _ = exchange(rig.clearcoat.origin, get_request(&path(request)));
        if began.elapsed() > time {
            return;
        }
    }
}

fn ejections(rig: &Rig, role: &str, nodes: usize) -> Vec<f64> {
    let series = |number| format!("clearcoat_ejections_total{{node=\"{role}-{number}\",role=\"{role}\"}}");
    (1..=nodes).map(|number| rig.counter(&series(number))).collect()
}

#[test]
fn a_web_node_whose_checks_pass_and_whose_requests_fail_gets_none() {
    for (failure, answer, then) in [
        ("a 503", UNAVAILABLE, Then::KeepAlive),
        ("no answer", "", Then::Reset),
        ("a cut", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", Then::Reset),
        ("no HTTP", "nonsense\r\n\r\n", Then::Close),
    ] {
        let rig = Rig::start(&checks("5m"), Vec::new(), vec![always(answer, then), sound(), sound()]);
        eventually(failure, || {
            ask(&rig, 3);
            (rig.clearcoat.node("web-1")["state"] == "ejected").then_some(())
        });
        let before = rig.web[0].calls().len();
        ask(&rig, 30);
        assert_eq!(rig.web[0].calls().len(), before, "{failure}");
        let node = rig.clearcoat.node("web-1");
        assert_eq!((&node["gets_traffic"], &node["health"]), (&false.into(), &"up".into()), "{node}");
        assert!(node["why"].as_str().unwrap().contains("requests in a row failed"), "{node}");
        assert_eq!(ejections(&rig, "web", 3), [1.0, 0.0, 0.0], "{failure}");
        assert_eq!(rig.counter("clearcoat_node_ejected{node=\"web-1\",role=\"web\"}"), 1.0);
        rig.clearcoat.log().waits_for("node is ejected");
    }
}

#[test]
fn a_node_that_is_well_again_serves_when_its_time_is_over() {
    let is_failing = Arc::new(AtomicBool::new(true));
    let nodes = vec![failing(&is_failing, UNAVAILABLE, Then::KeepAlive), sound()];
    let rig = Rig::start(&checks("1s"), Vec::new(), nodes);
    eventually("it is ejected", || {
        ask(&rig, 3);
        (ejections(&rig, "web", 1) == [1.0]).then_some(())
    });
    is_failing.store(false, Ordering::SeqCst);
    eventually("it serves", || (rig.clearcoat.node("web-1")["state"] == "serving").then_some(()));
    let before = rig.web[0].calls().len();
    ask(&rig, 30);
    assert!(rig.web[0].calls().len() > before);
    rig.clearcoat.log().waits_for("node is ejected no more");
}

#[test]
fn what_fails_at_every_node_ejects_none() {
    let rig = Rig::start(&checks("5m"), Vec::new(), (0..3).map(|_| always(UNAVAILABLE, Then::KeepAlive)).collect());
    ask_for(&rig, LONG, |request| format!("/p/{request}"));
    assert_eq!(ejections(&rig, "web", 3), [0.0; 3]);
    assert!(rig.clearcoat.nodes().iter().all(|node| node["gets_traffic"] == true));
}

#[test]
fn a_client_that_asks_only_for_a_page_that_fails_ejects_nobody() {
    let node = || {
        Upstream::start(|call: &mut Call<'_>| match call.path() {
            "/fails" => call.send_then(UNAVAILABLE, Then::KeepAlive),
            _ => call.answer("page"),
        })
    };
    let rig = Rig::start(&checks("5m"), Vec::new(), vec![node(), node(), node()]);
    ask_for(&rig, LONG, |request| if request % 10 == 0 { "/".to_owned() } else { "/fails".to_owned() });
    assert_eq!(ejections(&rig, "web", 3), [0.0; 3]);
}

#[test]
fn a_reload_that_switches_ejection_off_brings_nodes_back() {
    let rig = Rig::start(&checks("5m"), Vec::new(), vec![always(UNAVAILABLE, Then::KeepAlive), sound()]);
    eventually("it is ejected", || {
        ask(&rig, 3);
        (rig.clearcoat.node("web-1")["state"] == "ejected").then_some(())
    });
    let off = rig.clearcoat.config().replace("[health.web]", "[health.web]\neject_after = 0");
    rig.clearcoat.configure(&off);
    rig.clearcoat.reload();
    eventually("it is back", || (rig.clearcoat.node("web-1")["state"] == "serving").then_some(()));
    ask_for(&rig, LONG, |request| format!("/p/{request}"));
    assert_eq!(ejections(&rig, "web", 1), [1.0]);
}

/// A cache that answers purges, and pages like this.
fn cache(answer: &'static str, then: Then) -> Upstream {
    Upstream::start(move |call: &mut Call<'_>| match call.is("PURGE") {
        true => call.answer("purged"),
        false => call.send_then(answer, then),
    })
}

fn read(rig: &Rig, pages: usize) {
    (0..pages).for_each(|page| _ = exchange(rig.clearcoat.edge, get_request(&format!("/p/{page}"))));
}

#[test]
fn a_varnish_that_answers_no_page_gets_none_and_every_purge() {
    let page = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\npage";
    let rig = Rig::start("", vec![cache("", Then::Reset), cache(page, Then::KeepAlive)], vec![sound()]);
    eventually("it is ejected", || {
        read(&rig, 20);
        (rig.clearcoat.node("varnish-1")["state"] == "ejected").then_some(())
    });
    let purges = || rig.varnish[0].calls().iter().filter(|call| call.head.starts_with("PURGE")).count();
    let before = purges();
    let answer = purge(rig.clearcoat.purge, &tag("cat_p_1")).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    eventually("it gets the purge", || (purges() > before).then_some(()));
}

#[test]
fn the_statuses_of_a_varnish_are_those_of_its_backend_and_eject_nobody() {
    let page = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\npage";
    let rig = Rig::start("", vec![cache(UNAVAILABLE, Then::KeepAlive), cache(page, Then::KeepAlive)], vec![sound()]);
    let began = Instant::now();
    while began.elapsed() < LONG {
        read(&rig, 10);
    }
    assert_eq!(ejections(&rig, "varnish", 2), [0.0; 2]);
}
