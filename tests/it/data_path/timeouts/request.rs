//! The limit of a whole request: 504 before its answer, a cut within it, whatever moves meanwhile, and nobody is blamed.

use super::*;

const LIMIT: [(&str, &str); 1] = [("request", "2s")];

#[test]
fn a_request_that_takes_too_long_is_answered_504_or_its_answer_is_cut() {
    let timed = Timed::start(&LIMIT, node(&Gate::default()));
    let began = Instant::now();
    let answer = ask(&mut timed.edge(), "/silent?1");
    assert_eq!((answer.status, answer.text()), (504, "the request took too long\n"));
    assert_by_the_limit(began);
    let http2 = timed.http2();
    assert_eq!(http2.get("/silent?2").expect("an answer").status, 504);
    // A node that sends all the time, and an event stream: both are answers.
    for path in ["/drips?1", "/events?1"] {
        let mut client = timed.edge();
        client.send(get_request(path)).unwrap();
        assert_eq!(client.head().unwrap().status, 200);
        assert_eq!(client.rest().1, Ending::Reset, "{path}");
    }
    for path in ["/drips?2", "/events?2"] {
        let cut = http2.ask(request("GET", path).body(()).unwrap(), true).head().and_then(Begun::rest);
        assert!(matches!(cut, Err(Broken::Reset(_))), "{path}: {cut:?}");
    }
    assert_eq!(http2.get("/next").unwrap().status, 200, "the next request on the same connection has its own time");
    for path in ["/silent?1", "/silent?2"] {
        assert_eq!(timed.ended(path), as_told(504, "PH", "deadline_exceeded"), "{path}");
    }
    for path in ["/drips?1", "/drips?2", "/events?1", "/events?2"] {
        assert_eq!(timed.ended(path), as_told(200, "PD", "deadline_exceeded"), "{path}");
    }
    assert_eq!(timed.secure.rig.clearcoat.metric("clearcoat_edge_failures_total{reason=\"deadline_exceeded\"}"), 6.0);
    assert_not_blamed(&timed.secure.rig, "the request took longer than timeouts.request");
}

#[test]
fn a_client_that_drips_its_upload_has_the_same_limit() {
    let timed = Timed::start(&LIMIT, node(&Gate::opened()));
    let mut client = timed.edge();
    client.send("POST /upload HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
    let began = Instant::now();
    while is_quiet(&client.stream) && began.elapsed() < Duration::from_secs(10) {
        client.send("1\r\nx\r\n").unwrap();
        std::thread::sleep(PACE);
    }
    assert_eq!(timed.ended("/upload"), as_told(504, "PH", "deadline_exceeded"));
    assert_by_the_limit(began);
}

#[test]
fn connecting_and_all_tries_count_for_it() {
    let checks = "[health.varnish]\ntrial = false\ninterval = \"1h\"\nfall = 100\n";
    let timed = Timed::start_with(&LIMIT, checks, node(&Gate::opened()));
    let _queue = timed.secure.rig.varnish[0].becomes_deaf();
    let began = Instant::now();
    assert_eq!(ask(&mut timed.edge(), "/page").status, 504);
    assert_by_the_limit(began);
    assert_eq!(timed.ended("/page"), as_told(504, "PC", "deadline_exceeded"));
}

#[test]
fn neither_a_tunnel_nor_a_client_at_rest_is_a_request() {
    let timed = Timed::start(&LIMIT, node(&Gate::opened()));
    let (mut tunnel, mut resting, http2) = (timed.edge(), timed.edge(), timed.http2());
    tunnel.send(ASK).unwrap();
    assert_eq!(tunnel.head().unwrap().status, 101);
    assert_eq!(ask(&mut resting, "/").status, 200);
    assert_eq!(http2.get("/").unwrap().status, 200);
    std::thread::sleep(LONGER);
    tunnel.send("x").unwrap();
    assert_eq!(tunnel.take(1).unwrap(), b"e");
    assert_eq!(ask(&mut resting, "/").status, 200);
    assert_eq!(http2.get("/").unwrap().status, 200);
}
