//! Heads: which are forwarded, in which form, and which are refused.

use h2::client::Builder;
use http::HeaderMap;

use crate::data_path::tls::Secure;
use crate::support::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, Frames, HEADERS, field, frame, get_frame, request_fields,
};
use crate::support::http2::{Http2, Http2Answer, Stream, request};
use crate::support::upstream::{Then, Upstream};

/// Checks that only a final valid request has reached the node.
fn nothing_reached(secure: &Secure) {
    assert_eq!(Http2::open(secure.address()).get("/marker").unwrap().text(), "/marker");
    let (_, calls) = secure.rig.varnish[0].all_traffic();
    assert!(calls.len() == 1 && calls[0].head.starts_with("GET /marker "), "{calls:?}");
}

fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
    fields.iter().map(|(name, value)| (name.parse().expect("a name"), value.parse().expect("a value"))).collect()
}

fn ask(client: &Http2, method: &str, path: &str, fields: &[(&'static str, &str)]) -> Http2Answer {
    let mut request = request(method, path).body(()).expect("a request");
    request.headers_mut().extend(headers(fields));
    client.ask(request, true).answer().unwrap_or_else(|broken| panic!("{method} {path} {fields:?}: {broken:?}"))
}

#[test]
fn a_request_is_forwarded_as_http_1_1_with_one_cookie_and_no_hop_fields() {
    let secure = Secure::start("", "", vec![Upstream::echo()]);
    let client = Http2::open(secure.address());
    let fields = [
        ("cookie", "a=1"),
        ("te", "trailers"),
        ("cookie", "b=2"),
        ("x_spoofed", "y"),
        ("cookie", "c=3"),
        ("x-kept", "z"),
    ];
    assert_eq!(ask(&client, "GET", "/p?q=1", &fields).text(), "/p?q=1");
    let head = secure.rig.varnish[0].calls().pop().unwrap().head;
    assert_eq!(
        head,
        "GET /p?q=1 HTTP/1.1\r\nHost: shop.test\r\nx-kept: z\r\nCookie: a=1; b=2; c=3\r\n\
         X-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: shop.test\r\nVia: 2.0 clearcoat\r\n\r\n"
    );
}

#[test]
fn the_end_of_a_request_is_found_as_its_client_says_it() {
    let secure = Secure::start(
        "",
        "",
        vec![Upstream::start(|call| {
            let framing =
                ["Content-Length", "Transfer-Encoding"].map(|name| call.seen.header(name).unwrap_or("none").to_owned());
            match call.body() {
                Ok(body) => call.answer(&format!("{} {} {}", body.len(), framing[0], framing[1])),
                Err(_) => Then::Close,
            }
        })],
    );
    let client = Http2::open(secure.address());
    let post = |length: Option<&str>, body: &[u8]| {
        let mut request = request("POST", "/").body(()).unwrap();
        request.headers_mut().extend(length.map(|length| (http::header::CONTENT_LENGTH, length.parse().unwrap())));
        client.exchange(request, body).unwrap().text().to_owned()
    };
    assert_eq!(post(Some("5"), b"hello"), "5 5 none");
    assert_eq!(post(None, b"hello"), "5 none chunked");
    // The end came in a separate frame, so that the head could not include the length.
    assert_eq!(post(None, b""), "0 none chunked");
    assert_eq!(post(Some("0"), b""), "0 0 none");
    // Here the end came with the head.
    assert_eq!(ask(&client, "POST", "/", &[]).text(), "0 none none");
    assert_eq!(ask(&client, "POST", "/", &[("content-length", "0")]).text(), "0 0 none");
    let mut stream = client.ask(request("POST", "/").body(()).unwrap(), false);
    stream.send(b"hello", false).unwrap();
    stream.trailers(headers(&[("x-checksum", "1")]));
    assert_eq!(stream.answer().unwrap().text(), "5 none chunked");
}

#[test]
fn answers_without_a_body_keep_the_length_that_they_announce() {
    let secure = Secure::start(
        "",
        "",
        vec![Upstream::start(|call| {
            let answer = match call.path() {
                "/head" => "200 OK\r\nContent-Length: 1234",
                "/204" => "204 No Content\r\nX: y",
                "/304" => "304 Not Modified\r\nETag: \"x\"",
                _ => "200 OK\r\nContent-Length: 0",
            };
            call.send_then(format!("HTTP/1.1 {answer}\r\n\r\n"), Then::KeepAlive)
        })],
    );
    let client = Http2::open(secure.address());
    for (method, path, status, length) in [
        ("HEAD", "/head", 200, Some("1234")),
        ("GET", "/204", 204, None),
        ("GET", "/304", 304, None),
        ("GET", "/0", 200, Some("0")),
    ] {
        let answer = ask(&client, method, path, &[]);
        assert_eq!((answer.status, answer.header("content-length"), answer.text()), (status, length, ""), "{path}");
    }
    // If there can be no body, the HEADERS frame ends the stream.
    let mut frames = Frames::open(secure.address(), &[]);
    assert!(frames.send(get_frame(1, "/304")));
    let head = frames.wait_for("the answer", |frame| frame.kind == HEADERS).unwrap();
    assert_eq!(head.flags & END_STREAM, END_STREAM, "{head:?}");
}

#[test]
fn authority_and_host_that_disagree_are_answered_400_and_reach_no_node() {
    let secure = Secure::start("", "", vec![Upstream::echo()]);
    let client = Http2::open(secure.address());
    for hosts in [&["other.test"][..], &["shop.test:444"], &["shop.test", "other.test"], &["shop.test", "shop.test"]] {
        let fields: Vec<_> = hosts.iter().map(|host| ("host", *host)).collect();
        for method in ["GET", "POST"] {
            let answer = ask(&client, method, "/", &fields);
            assert_eq!(answer.status, 400, "{method} {hosts:?}");
            assert!(answer.text().contains("Host"), "{answer:?}");
        }
        // An answer to HEAD has no body, whatever its head says.
        let answer = ask(&client, "HEAD", "/", &fields);
        assert_eq!((answer.status, answer.text()), (400, ""), "{hosts:?}");
    }
    nothing_reached(&secure);
    // The same host in both places is valid, and is written once.
    assert_eq!(ask(&client, "GET", "/", &[("host", "SHOP.test")]).status, 200);
    let head = secure.rig.varnish[0].calls().pop().unwrap().head;
    assert_eq!(head.to_ascii_lowercase().matches("\r\nhost:").count(), 1, "{head}");
    // Without an authority the Host field counts; without both the request is invalid.
    for (host, status) in
        [(&["a.test"][..], 200), (&["a.test", "a.test"], 400), (&["a.test", "b.test"], 400), (&[], 400)]
    {
        let mut fields = [field(":method", "GET"), field(":scheme", "https"), field(":path", "/")].concat();
        host.iter().for_each(|host| fields.extend(field("host", host)));
        let mut frames = Frames::open(secure.address(), &[]);
        assert!(frames.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, fields)));
        let answer = frames.wait_for("the answer", |frame| frame.kind == HEADERS).unwrap();
        // 200 and 400 are fields of the static table (RFC 7541 appendix A).
        assert_eq!(answer.payload[0], if status == 200 { 0x88 } else { 0x8c }, "{host:?}: {answer:?}");
    }
}

#[test]
fn methods_that_purge_or_tunnel_are_answered_405() {
    let secure = Secure::start("", "", vec![Upstream::echo()]);
    let client = Http2::open(secure.address());
    for method in ["PURGE", "BAN", "purge", "TRACE"] {
        let answer = ask(&client, method, "/", &[("x-magento-tags-pattern", ".*")]);
        assert_eq!((answer.status, answer.header("allow").is_some()), (405, true), "{method}");
    }
    let connect = http::Request::connect("shop.test:443").body(()).unwrap();
    assert_eq!(client.ask(connect, false).answer().unwrap().status, 405);
    nothing_reached(&secure);
}

#[test]
fn what_http_2_forbids_in_a_head_resets_its_stream_and_reaches_no_node() {
    let secure = Secure::start("", "", vec![Upstream::echo()]);
    let fields = |more: Vec<u8>| [request_fields("GET", "/"), more].concat();
    let cases = [
        ("an uppercase name", fields(field("X-Upper", "y"))),
        ("connection", fields(field("connection", "close"))),
        ("transfer-encoding", fields(field("transfer-encoding", "chunked"))),
        ("upgrade", fields(field("upgrade", "websocket"))),
        ("keep-alive", fields(field("keep-alive", "5"))),
        ("proxy-connection", fields(field("proxy-connection", "close"))),
        ("te: gzip", fields(field("te", "gzip"))),
        ("a pseudo-field behind others", fields([field("a", "b"), field(":path", "/other")].concat())),
        ("two paths", fields(field(":path", "/other"))),
        ("an unknown pseudo-field", fields(field(":unknown", "x"))),
        ("no path", [field(":method", "GET"), field(":scheme", "https"), field(":authority", "a")].concat()),
        ("a line end in a value", fields(field("x", "a\r\nEvil: yes"))),
        ("a line end in a name", fields(field("x\r\ny", "a"))),
        ("a zero in a value", fields(field("x", "a\0b"))),
        ("a line end in the path", request_fields("GET", "/a HTTP/1.1\r\nEvil: yes\r\n")),
        ("a space in the path", request_fields("GET", "/a b")),
        ("a line end in the method", request_fields("GET / HTTP/1.1\r\nX: ", "/")),
        ("two lengths", fields([field("content-length", "0"), field("content-length", "1")].concat())),
    ];
    for (what, fields) in cases {
        let mut frames = Frames::open(secure.address(), &[]);
        // The connection may be closed before all of it is written.
        _ = frames.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, fields));
        let refused = |head: &[u8]| head.first() == Some(&0x8c);
        let end = frames.wait_for(what, |frame| matches!(frame.kind, HEADERS | 3 | 7));
        let is_refusal = end.as_ref().is_none_or(|frame| frame.kind != HEADERS || refused(&frame.payload));
        assert!(is_refusal, "{what}: {end:?}");
    }
    nothing_reached(&secure);
}

#[test]
fn a_body_that_is_not_as_long_as_announced_is_no_request() {
    let secure = Secure::start(
        "",
        "",
        vec![Upstream::start(|call| match call.body() {
            Ok(body) => call.answer(&format!("whole: {}", body.len())),
            Err(_) => Then::Close,
        })],
    );
    for (length, sent) in [("5", "hell"), ("5", "hello!"), ("0", "x"), ("5", "")] {
        let fields = [request_fields("POST", "/"), field("content-length", length)].concat();
        let mut frames = Frames::open(secure.address(), &[]);
        let body = frame(DATA, END_STREAM, 1, sent);
        assert!(frames.send([frame(HEADERS, END_HEADERS, 1, fields), body].concat()));
        let end = frames.wait_for("the stream is refused", |frame| matches!(frame.kind, HEADERS | 3 | 7));
        assert!(end.as_ref().is_none_or(|frame| frame.kind != HEADERS), "{length}, {sent:?}: {end:?}");
    }
    secure.rig.becomes_idle();
}

#[test]
fn heads_beyond_the_limits_are_answered_431_and_the_connection_goes_on() {
    let secure = Secure::start("", "[limits]\nmax_head = 4096\nmax_fields = 20", vec![Upstream::echo()]);
    let client = Http2::open(secure.address());
    let large = "x".repeat(5000);
    assert_eq!(ask(&client, "GET", "/large", &[("x-large", &large)]).status, 431);
    assert_eq!(ask(&client, "GET", "/many", &[("a", "1"); 30]).status, 431);
    let answer = ask(&client, "HEAD", "/many", &[("a", "1"); 30]);
    assert_eq!((answer.status, answer.text()), (431, ""));
    // A much too large head ends its connection.
    let huge = "x".repeat(100_000);
    let mut builder = Builder::new();
    builder.max_header_list_size(1024 * 1024);
    let other = Http2::open_with(secure.address(), &builder);
    let stream = other.try_ask(request("GET", "/huge").header("x-huge", huge).body(()).unwrap(), true);
    let refused = stream.and_then(Stream::answer);
    assert!(refused.as_ref().map_or(true, |answer| answer.status == 431), "{refused:?}");
    nothing_reached(&secure);
    // Cookie crumbs are joined into one field upstream.
    assert_eq!(ask(&client, "GET", "/crumbs", &[("cookie", "a=1"); 30]).status, 200);
}

#[test]
fn a_long_head_of_an_answer_passes_in_several_frames() {
    let tags = (0..6000).map(|number| format!("cat_p_{number}")).collect::<Vec<_>>().join(",");
    assert!((50_000..65_000).contains(&tags.len()), "{}", tags.len());
    let secure = Secure::start(
        "",
        "",
        vec![Upstream::start({
            let tags = tags.clone();
            move |call| {
                call.send_then(
                    format!("HTTP/1.1 200 OK\r\nX-Magento-Tags: {tags}\r\nContent-Length: 2\r\n\r\nok"),
                    Then::KeepAlive,
                )
            }
        })],
    );
    let mut builder = Builder::new();
    builder.max_header_list_size(1024 * 1024);
    let client = Http2::open_with(secure.address(), &builder);
    let answer = client.get("/").unwrap();
    assert_eq!((answer.status, answer.header("x-magento-tags"), answer.text()), (200, Some(&tags[..]), "ok"));
    let mut frames = Frames::open(secure.address(), &[]);
    assert!(frames.send(get_frame(1, "/")));
    assert!(frames.wait_for("the head goes on", |frame| frame.kind == CONTINUATION).is_some());
}

#[test]
fn an_interim_answer_is_not_passed_on_and_the_final_one_is_right() {
    let secure = Secure::start(
        "",
        "",
        vec![Upstream::start(|call| {
            let interim =
                "HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n";
            let begun = call.send(interim);
            match begun.and_then(|()| call.body()) {
                Ok(body) => call.answer(&format!("final {}", body.len())),
                Err(_) => Then::Close,
            }
        })],
    );
    let client = Http2::open(secure.address());
    let answer = client.get("/").unwrap();
    assert_eq!((answer.status, answer.header("link"), answer.text()), (200, None, "final 0"));
    let expecting = request("POST", "/").header("expect", "100-continue").body(()).unwrap();
    assert_eq!(client.exchange(expecting, b"hello").unwrap().text(), "final 5");
    let output = secure.curl(&["--http2", "--include", "--data", "hello"], "/");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.starts_with("HTTP/2 200 ") && said.ends_with("final 5"), "{said}");
}

#[test]
fn answers_say_http_2_what_the_nodes_said_and_nothing_of_their_hop() {
    let secure = Secure::start(
        "",
        "",
        vec![Upstream::start(|call| {
            let answer = "HTTP/1.1 200 Fine\r\nConnection: keep-alive, x-secret\r\nX-Secret: s\r\nKeep-Alive: 5\r\nSet-Cookie: a=1\r\n\
            Set-Cookie: b=2\r\nX-Kept: z\r\nTransfer-Encoding: chunked\r\nTrailer: x-t\r\n\r\n2\r\nok\r\n0\r\nX-T: 1\r\n\r\n";
            call.send_then(answer, Then::KeepAlive)
        })],
    );
    let answer = Http2::open(secure.address()).get("/").unwrap();
    assert_eq!((answer.status, answer.text(), answer.header("x-kept")), (200, "ok", Some("z")));
    let cookies: Vec<_> = answer.headers.get_all("set-cookie").iter().collect();
    assert_eq!(cookies, ["a=1", "b=2"]);
    for dropped in ["connection", "keep-alive", "x-secret", "transfer-encoding", "content-length"] {
        assert_eq!(answer.header(dropped), None, "{dropped}");
    }
    assert_eq!(answer.header("via"), Some("1.1 clearcoat"));
}
