//! Kept connections, on both sides; messages on them are never mixed up.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::data_path::rig::{Rig, always, get_request};
use crate::support::client::Ending;
use crate::support::eventually;
use crate::support::upstream::{Gate, Seen, Then, Upstream};

/// The number of connections that these requests arrived on.
fn connections(calls: &[Seen]) -> usize {
    let mut numbers: Vec<_> = calls.iter().map(|call| call.connection).collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers.len()
}

#[test]
fn many_requests_on_one_connection_use_one_connection_to_the_node() {
    let rig = Rig::start("", vec![Upstream::echo()], vec![Upstream::echo()]);
    for (mut client, node) in [(rig.edge(), &rig.varnish[0]), (rig.origin(), &rig.web[0])] {
        for number in 0..100 {
            let path = format!("/{number}");
            client.send(get_request(&path)).unwrap();
            let answer = client.answer(false).unwrap();
            assert_eq!((answer.text(), answer.header("Connection")), (path.as_str(), None));
        }
        assert_eq!((node.calls().len(), connections(&node.calls())), (100, 1));
    }
}

#[test]
fn a_client_may_close_and_the_nodes_connection_serves_the_next() {
    let rig = Rig::web([Upstream::echo()]);
    for fields in
        ["Connection: close\r\n", "Connection: x, CLOSE\r\n", "Connection: keep-alive\r\nConnection: close\r\n"]
    {
        let mut client = rig.origin();
        client.send(format!("GET /1 HTTP/1.1\r\nHost: a\r\n{fields}\r\n")).unwrap();
        let answer = client.answer(false).unwrap();
        assert_eq!((answer.text(), answer.header("Connection")), ("/1", Some("close")), "{fields}");
        assert_eq!(client.rest(), (Vec::new(), Ending::Clean), "{fields}");
    }
    assert_eq!(connections(&rig.web[0].calls()), 1, "{:?}", rig.web[0].calls());
}

#[test]
fn a_client_of_1_0_is_kept_where_it_asks_for_it() {
    let rig = Rig::web([Upstream::echo()]);
    let mut client = rig.origin();
    client.send("GET /1 HTTP/1.0\r\n\r\n").unwrap();
    let answer = client.answer(false).unwrap();
    assert_eq!((answer.text(), answer.header("Connection")), ("/1", Some("close")));
    assert_eq!(client.rest(), (Vec::new(), Ending::Clean));

    let mut client = rig.origin();
    for path in ["/2", "/3"] {
        client.send(format!("GET {path} HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n")).unwrap();
        let answer = client.answer(false).unwrap();
        assert_eq!((answer.text(), answer.header("Connection")), (path, Some("keep-alive")));
    }
    assert_eq!(connections(&rig.web[0].calls()), 1);
}

#[test]
fn a_node_that_wants_to_end_ends_and_the_clients_connection_goes_on() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
        "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.0 200 OK\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: Close\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    ] {
        let rig = Rig::web([always(answer, Then::Close)]);
        let mut client = rig.origin();
        for _ in 0..3 {
            client.send(get_request("/")).unwrap();
            let answer = client.answer(false).unwrap();
            assert_eq!((answer.status, answer.text(), answer.header("Connection")), (200, "ok", None), "{answer:?}");
        }
        assert_eq!(connections(&rig.web[0].calls()), 3, "{answer}");
        assert_eq!(rig.retries("web", "no_answer"), 0.0, "{answer}");
    }
}

#[test]
fn a_node_of_1_0_that_keeps_its_connection_is_used_again() {
    let rig =
        Rig::web([always("HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok", Then::KeepAlive)]);
    let mut client = rig.origin();
    for _ in 0..3 {
        client.send(get_request("/")).unwrap();
        assert_eq!(client.answer(false).unwrap().text(), "ok");
    }
    assert_eq!(connections(&rig.web[0].calls()), 1);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    // More than all buffers on the way hold at once.
    const REQUESTS: usize = 3000;
    let rig = Rig::web([Upstream::echo()]);
    let mut client = rig.origin();
    let padding = "x".repeat(200);
    let wire: String = (0..REQUESTS)
        .map(|number| format!("GET /{number} HTTP/1.1\r\nHost: a\r\nX-Padding: {padding}\r\n\r\n"))
        .collect();
    let mut writer = client.stream.try_clone().unwrap();
    let upload = "POST /upload HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    let writing = std::thread::spawn(move || writer.write_all(format!("{upload}{wire}").as_bytes()));
    assert_eq!(client.answer(false).unwrap().text(), "/upload");
    for number in 0..REQUESTS {
        assert_eq!(client.answer(false).unwrap().text(), format!("/{number}"));
    }
    writing.join().unwrap().unwrap();
    let calls = rig.web[0].calls();
    let paths = calls[1..].iter().map(|call| call.head.split(' ').nth(1).expect("a target"));
    assert!(paths.eq((0..REQUESTS).map(|number| format!("/{number}"))), "the node saw another order");
    assert_eq!(connections(&rig.web[0].calls()), 1);
}

/// Answers with method, path and body.
fn repeating() -> Upstream {
    Upstream::start(|call| {
        let start: Vec<_> = call.seen.head.split(' ').take(2).map(str::to_owned).collect();
        let Ok(body) = call.body() else { return Then::Close };
        call.answer(&format!("{} {}", start.join(" "), String::from_utf8_lossy(&body)))
    })
}

#[test]
fn pipelined_bodies_go_to_their_own_requests_however_the_bytes_are_cut() {
    let rig = Rig::web([repeating()]);
    let wire = [
        get_request("/1"),
        "POST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 33\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n".into(),
        get_request("/3"),
        "POST /4 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".into(),
        "5\r\nhello\r\n6;x\r\n world\r\n0\r\nT: t\r\n\r\n".into(),
        get_request("/5"),
        "PUT /6 HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".into(),
        "PUT /7 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into(),
        get_request("/8"),
    ]
    .concat();
    let expected = [
        "GET /1 ",
        "POST /2 GET /smuggled HTTP/1.1\r\nHost: a\r\n",
        "GET /3 ",
        "POST /4 hello world",
        "GET /5 ",
        "PUT /6 ",
        "PUT /7 ",
        "GET /8 ",
    ];
    for step in [wire.len(), 1, 2, 3, 5, 7, 64, 300] {
        let mut client = rig.origin();
        let mut writer = client.stream.try_clone().unwrap();
        let wire = wire.clone().into_bytes();
        let writing = std::thread::spawn(move || wire.chunks(step).try_for_each(|piece| writer.write_all(piece)));
        for expected in expected {
            let answer = client.answer(false).unwrap_or_else(|error| panic!("steps of {step}, {expected:?}: {error}"));
            assert_eq!((answer.status, answer.text()), (200, expected), "steps of {step}");
        }
        writing.join().unwrap().unwrap();
    }
    assert_eq!(connections(&rig.web[0].calls()), 1);
}

#[test]
fn bytes_after_a_chunked_body_are_kept_wherever_its_end_is_split() {
    let count = Arc::new(AtomicUsize::new(0));
    let rig = Rig::web([Upstream::start({
        let count = Arc::clone(&count);
        move |call| {
            let path = call.path().to_owned();
            if call.is("POST") {
                // The content has arrived, but not the end of the body.
                let mut start = Vec::new();
                if call.exactly(b"5\r\nhello\r\n".len(), |piece| start.extend_from_slice(piece)).is_err() {
                    return Then::Close;
                }
                count.fetch_add(1, Ordering::SeqCst);
                let mut end = Vec::new();
                if call.exactly(b"0\r\n\r\n".len(), |piece| end.extend_from_slice(piece)).is_err() {
                    return Then::Close;
                }
                assert_eq!((start, end), (b"5\r\nhello\r\n".to_vec(), b"0\r\n\r\n".to_vec()));
            }
            call.answer(&path)
        }
    })]);
    let end = "0\r\n\r\n";
    for cut in 0..end.len() {
        let mut client = rig.origin();
        let head = "POST /post HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        client.send(format!("{head}5\r\nhello\r\n{}", &end[..cut])).unwrap();
        eventually("the node has the content", || (count.load(Ordering::SeqCst) == cut + 1).then_some(()));
        client.send(format!("{}{}", &end[cut..], get_request("/behind"))).unwrap();
        assert_eq!(client.answer(false).unwrap().text(), "/post", "cut at {cut}");
        let answer = client.answer(false).unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
        assert_eq!((answer.status, answer.text()), (200, "/behind"), "cut at {cut}: {answer:?}");
    }
}

#[test]
fn an_answer_without_a_body_ends_where_it_ends() {
    let rig = Rig::web([Upstream::start(|call| {
        let answer = match call.path() {
            "/head" => "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
            "/head-chunked" => "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            "/head-open" => "HTTP/1.1 200 OK\r\n\r\n",
            "/204" => "HTTP/1.1 204 No Content\r\n\r\n",
            "/204-length" => "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
            "/304" => "HTTP/1.1 304 Not Modified\r\nContent-Length: 1000\r\nETag: x\r\n\r\n",
            "/304-chunked" => "HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n",
            "/empty" => "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            _ => "HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok",
        };
        call.send_then(answer, Then::KeepAlive)
    })]);
    let mut client = rig.origin();
    for (method, path, status, length) in [
        ("HEAD", "/head", 200, Some("1000")),
        ("HEAD", "/head-chunked", 200, None),
        ("HEAD", "/head-open", 200, None),
        ("GET", "/204", 204, None),
        ("GET", "/204-length", 204, None),
        ("GET", "/304", 304, Some("1000")),
        ("GET", "/304-chunked", 304, None),
        ("GET", "/empty", 200, Some("0")),
    ] {
        // The second request shows where the first answer ended.
        client.send(format!("{method} {path} HTTP/1.1\r\nHost: a\r\n\r\n{}", get_request("/ok"))).unwrap();
        let answer = client.answer(method == "HEAD").unwrap();
        let framing = (answer.header("Content-Length"), answer.header("Transfer-Encoding"));
        assert_eq!((answer.status, framing), (status, (length, None)), "{method} {path}: {answer:?}");
        let next = client.answer(false).unwrap_or_else(|error| panic!("behind {method} {path}: {error}"));
        assert_eq!(next.head.lines().next(), Some("HTTP/1.1 200 "), "{method} {path}");
        assert_eq!(next.text(), "ok", "{method} {path}");
    }
    assert_eq!(connections(&rig.web[0].calls()), 1);
}

const CHUNKED: &str = "HTTP/1.1 200 OK\r\nX_Y: z\r\nTransfer-Encoding: chunked\r\nTrailer: T\r\n\r\n\
    5;ext=\"x\"\r\nhello\r\n06\r\n world\r\n0\r\nT: trailer\r\n\r\n";

#[test]
fn the_frame_of_an_answer_suits_its_client() {
    let known = "HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world";
    let open = "HTTP/1.1 200 OK\r\n\r\nhello world";
    for (answer, then) in [(known, Then::KeepAlive), (CHUNKED, Then::KeepAlive), (open, Then::Close)] {
        let rig = Rig::web([always(answer, then)]);
        // Kept alive, and chunked if the length is unknown.
        let mut client = rig.origin();
        for _ in 0..2 {
            client.send(get_request("/")).unwrap();
            let answer = client.answer(false).unwrap();
            assert_eq!((answer.text(), answer.header("Connection")), ("hello world", None), "{answer:?}");
            assert_eq!(
                answer.header("Content-Length").is_some(),
                then == Then::KeepAlive && answer.header("Transfer-Encoding").is_none()
            );
            assert_eq!((answer.trailers.as_str(), answer.header("Trailer")), ("", None));
        }
        // To HTTP/1.0 unchunked, up to the end of the connection if the length is unknown.
        let mut client = rig.origin();
        client.send("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").unwrap();
        let plain = if answer == known {
            let answer = client.answer(false).unwrap();
            assert_eq!(answer.header("Connection"), Some("keep-alive"), "{answer:?}");
            answer
        } else {
            let answer = client.answer(false).unwrap();
            assert_eq!(answer.header("Connection"), Some("close"), "{answer:?}");
            assert_eq!(client.rest(), (Vec::new(), Ending::Clean));
            answer
        };
        assert_eq!((plain.text(), plain.header("Transfer-Encoding")), ("hello world", None), "{plain:?}");
    }
}

#[test]
fn extensions_and_trailers_go_no_further_in_either_direction() {
    let rig = Rig::web([Upstream::start(|call| {
        let body = call.body().map(|body| String::from_utf8_lossy(&body).into_owned());
        assert_eq!(body.unwrap(), "hello world");
        assert!(call.trailers.is_empty(), "{:?}", call.trailers);
        call.send_then(CHUNKED, Then::KeepAlive)
    })]);
    let mut client = rig.origin();
    let request = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: T\r\nConnection: close\r\n\r\n";
    client
        .send(format!("{request}00005 ;a=b\r\nhello\r\n6\r\n world\r\n000\r\nT: trailer\r\nHost: b\r\n\r\n"))
        .unwrap();
    let (bytes, ending) = client.rest();
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    let kept = "HTTP/1.1 200 OK\r\nX_Y: z\r\nVia: 1.1 clearcoat\r\nTransfer-Encoding: chunked\r\n\
        Connection: close";
    assert_eq!(head, kept);
    assert_eq!((body, ending), ("b\r\nhello world\r\n0\r\n\r\n", Ending::Clean));
    let head = &rig.web[0].calls()[0].head;
    assert!(!head.contains("Trailer") && head.contains("\r\nTransfer-Encoding: chunked\r\n"), "{head}");
}

#[test]
fn a_client_that_expects_100_gets_the_nodes_and_then_sends_its_body() {
    let asked = Gate::default();
    let rig = Rig::web([Upstream::start({
        let asked = asked.clone();
        move |call| {
            let path = call.path().to_owned();
            if path == "/plain" {
                return call.answer("plain");
            }
            assert_eq!(call.seen.header("Expect"), Some("100-continue"));
            if !call.wait(&asked) || call.send("HTTP/1.1 100 Continue\r\nX-From: node\r\n\r\n").is_err() {
                return Then::Close;
            }
            let Ok(body) = call.body() else { return Then::Close };
            call.answer(&String::from_utf8_lossy(&body))
        }
    })]);
    let mut client = rig.origin();
    client.send("PUT /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n").unwrap();
    eventually("the node has the head", || (rig.web[0].calls().len() == 1).then_some(()));
    asked.open();
    let interim = client.answer(false).unwrap();
    assert_eq!((interim.status, interim.header("X-From")), (100, Some("node")), "{interim:?}");
    client.send("hello").unwrap();
    assert_eq!(client.answer(false).unwrap().text(), "hello");
    // Both connections are usable afterwards.
    client.send(get_request("/plain")).unwrap();
    assert_eq!(client.answer(false).unwrap().text(), "plain");
    assert_eq!(connections(&rig.web[0].calls()), 1);
    // A client that does not wait for the 100.
    client.send("PUT /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhello").unwrap();
    assert_eq!(client.answer(false).unwrap().status, 100);
    assert_eq!(client.answer(false).unwrap().text(), "hello");
}

#[test]
fn a_refusal_instead_of_100_closes_as_the_body_may_still_come() {
    let rig = Rig::web([always("HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno", Then::KeepAlive)]);
    for _ in 0..2 {
        let mut client = rig.origin();
        client.send("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n").unwrap();
        let answer = client.answer(false).unwrap();
        assert_eq!((answer.status, answer.text(), answer.header("Connection")), (417, "no", Some("close")));
        assert_eq!(client.rest(), (Vec::new(), Ending::Clean));
    }
    assert_eq!(connections(&rig.web[0].calls()), 2, "a connection that waits for a body was used again");
}

/// Interim heads of a node: hints, processing, and permission for the body.
const INTERIM: &str = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\nConnection: close\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n\
    HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </b.css>\r\n\r\n";

#[test]
fn from_a_web_node_only_an_expected_100_precedes_the_answer() {
    let rig = Rig::web([Upstream::start(|call| {
        assert!(call.body().is_ok());
        call.send_then(format!("{INTERIM}HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"), Then::KeepAlive)
    })]);
    // At the origin, where Varnish would take them for the answer, and at the edge past the caches.
    for mut client in [rig.origin(), rig.edge()] {
        for _ in 0..2 {
            client.send(get_request("/")).unwrap();
            assert_eq!(client.answer(false).unwrap().text(), "ok");
        }
        client.send("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-Continue\r\n\r\nhi").unwrap();
        let status = [(); 2].map(|()| client.answer(false).unwrap().status);
        assert_eq!(status, [100, 200]);
    }
    let mut client = rig.origin();
    client.send("GET / HTTP/1.0\r\n\r\n").unwrap();
    assert_eq!(client.answer(false).unwrap().text(), "ok");
}

#[test]
fn what_a_cache_sends_before_the_answer_reaches_those_who_can_read_it() {
    let answer = format!("{INTERIM}HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    let rig = Rig::start("", vec![Upstream::start(move |call| call.send_then(&answer, Then::KeepAlive))], Vec::new());
    let mut client = rig.edge();
    client.send(get_request("/")).unwrap();
    let hint = client.answer(false).unwrap();
    assert_eq!((hint.status, hint.header("Link"), hint.header("Connection")), (103, Some("</a.css>"), None));
    let status = [(); 4].map(|()| client.answer(false).unwrap().status);
    assert_eq!(status, [102, 100, 103, 200]);
    let mut client = rig.edge();
    client.send("GET / HTTP/1.0\r\n\r\n").unwrap();
    assert_eq!(client.answer(false).unwrap().text(), "ok");
}

#[test]
fn an_answer_that_comes_byte_by_byte_is_the_same_answer() {
    let rig = Rig::web([Upstream::start(|call| {
        let wire = format!("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n{CHUNKED}");
        let sent = wire.bytes().try_for_each(|byte| call.send([byte]));
        if sent.is_ok() { Then::KeepAlive } else { Then::Close }
    })]);
    let mut client = rig.origin();
    for _ in 0..2 {
        client.send(get_request("/")).unwrap();
        assert_eq!(client.answer(false).unwrap().text(), "hello world");
    }
    assert_eq!(connections(&rig.web[0].calls()), 1);
}

#[test]
fn the_largest_head_of_an_answer_that_is_allowed_passes() {
    let start = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Magento-Tags: ";
    let tags = "t".repeat(128 * 1024 - start.len() - "\r\n\r\n".len());
    let rig = Rig::web([Upstream::start({
        let tags = tags.clone();
        move |call| call.send_then(format!("{start}{tags}\r\n\r\nok"), Then::KeepAlive)
    })]);
    let mut client = rig.origin();
    for _ in 0..2 {
        client.send(get_request("/")).unwrap();
        let answer = client.answer(false).unwrap();
        assert_eq!((answer.text(), answer.header("X-Magento-Tags") == Some(&tags)), ("ok", true));
    }
}
