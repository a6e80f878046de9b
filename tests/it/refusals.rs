//! Requests that the purge listener refuses: with a reason, and without a trace in the journal.

use std::io::Write;

use crate::support::client::{Answer, Connection, exchange, get, purge, tag};
use crate::support::fleet::{Fleet, Plan};

/// No Varnish is needed to refuse, and without one the start costs nothing.
fn nobody(config: &'static str) -> Fleet {
    Fleet::start(&Plan { varnish: 0, web: 0, config, ..Plan::default() })
}

fn error(answer: &Answer) -> String {
    answer.json()["error"].as_str().unwrap_or_else(|| panic!("no error in {answer:?}")).to_owned()
}

fn assert_nothing_accepted(fleet: &Fleet) {
    assert_eq!(fleet.clearcoat.fleet()["head"], 0);
}

#[test]
fn a_purge_no_varnish_would_execute_gets_400_with_the_header_at_fault() {
    let fleet = nobody("");
    for (pattern, reason) in
        [("((^|,)cat_p_1", "parenthes"), ("foo && req.url ~ x", "second ban condition"), ("", "empty")]
    {
        let answer = purge(fleet.clearcoat.purge, pattern).expect("an answer");
        assert_eq!(answer.status, 400, "{pattern}: {answer:?}");
        let error = error(&answer);
        assert!(error.starts_with("X-Magento-Tags-Pattern: ") && error.contains(reason), "{pattern}: {error}");
    }
    for (headers, named) in [
        ("X-Pool: shop[\r\n", "X-Pool: "),
        ("", "X-Magento-Tags-Pattern or X-Pool"),
        ("User-Agent: curl/8.0\r\nAccept: */*\r\n", "X-Magento-Tags-Pattern or X-Pool"),
        // A valid header does not excuse an invalid one.
        ("X-Magento-Tags-Pattern: cat_p_1\r\nX-Pool: (\r\n", "X-Pool: "),
    ] {
        let request = format!("PURGE / HTTP/1.1\r\nHost: a\r\n{headers}\r\n");
        let answer = exchange(fleet.clearcoat.purge, request).expect("an answer");
        assert_eq!(answer.status, 400, "{headers}: {answer:?}");
        assert!(error(&answer).contains(named), "{headers}: {answer:?}");
    }
    assert_nothing_accepted(&fleet);
    assert_eq!(fleet.clearcoat.metric("clearcoat_purges_total{kind=\"none\",result=\"refused\"}"), 6.0);
    // Magento sends one before a pattern that is longer than its chunks: harmless.
    assert_eq!(fleet.clearcoat.metric("clearcoat_purges_total{kind=\"none\",result=\"empty\"}"), 1.0);
}

#[test]
fn a_method_that_purges_nothing_is_answered_405_and_the_health_page_200() {
    let fleet = nobody("");
    for method in ["GET", "POST", "DELETE", "REFRESH"] {
        let request = format!("{method} / HTTP/1.1\r\nHost: a\r\nX-Magento-Tags-Pattern: .*\r\n\r\n");
        let answer = exchange(fleet.clearcoat.purge, request).expect("an answer");
        assert_eq!((answer.status, answer.header("Allow")), (405, Some("PURGE, BAN")), "{method}");
    }
    assert_eq!(get(fleet.clearcoat.purge, "/healthz").expect("an answer").status, 200);
    assert_nothing_accepted(&fleet);
}

#[test]
fn a_request_beyond_the_limit_is_answered_413() {
    let fleet = nobody("");
    let large = "x".repeat(1 << 20);
    let in_one_header = format!("PURGE / HTTP/1.1\r\nHost: a\r\nX-Magento-Tags-Pattern: {large}\r\n\r\n");
    let head = "PURGE / HTTP/1.1\r\nHost: a\r\nX-Magento-Tags-Pattern: .*\r\n";
    let in_the_body = format!("{head}Content-Length: {}\r\n\r\n{large}", large.len());
    let in_chunks = format!("{head}Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{large}\r\n0\r\n\r\n", large.len());
    for request in [in_one_header, in_the_body, in_chunks] {
        let mut connection = Connection::open(fleet.clearcoat.purge).expect("a connection");
        // A client that is still sending when the answer arrives may find the connection closed.
        _ = connection.stream.write_all(request.as_bytes());
        let answer = connection.answer(false).unwrap_or_else(|error| panic!("{error}: {}", &request[..90]));
        assert_eq!((answer.status, error(&answer).as_str()), (413, "request is too large"));
    }
    let in_many_headers = format!("PURGE / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X-Pool: shop\r\n".repeat(200));
    let answer = exchange(fleet.clearcoat.purge, in_many_headers).expect("an answer");
    assert_eq!((answer.status, error(&answer).as_str()), (413, "more than 100 header fields"));
    assert_nothing_accepted(&fleet);

    // Nothing of it is accepted later either: the next purge is the first one.
    assert_eq!(purge(fleet.clearcoat.purge, ".*").expect("an answer").json()["position"], 1);

    // The limit is per request, not per connection.
    let mut kept = Connection::open(fleet.clearcoat.purge).expect("a connection");
    let body = "x".repeat(900_000);
    for _ in 0..3 {
        kept.send(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len())).expect("sent");
        assert_eq!(kept.answer(false).expect("an answer").status, 200);
    }
}

#[test]
fn a_stranger_may_not_purge() {
    let fleet = nobody("[purge]\nlisten = [\"127.0.0.1:0\"]\nallow = [\"192.0.2.0/24\"]\n");
    let answer = purge(fleet.clearcoat.purge, ".*").expect("an answer");
    assert_eq!(answer.status, 403);
    assert!(error(&answer).contains("127.0.0.1") && error(&answer).contains("purge.allow"), "{answer:?}");
    assert_nothing_accepted(&fleet);
    assert_eq!(fleet.clearcoat.metric("clearcoat_purges_total{kind=\"none\",result=\"forbidden\"}"), 1.0);
    // A liveness check of the listener purges nothing.
    assert_eq!(get(fleet.clearcoat.purge, "/healthz").expect("an answer").status, 200);
}

#[test]
fn where_a_token_is_wanted_only_the_right_one_purges() {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    writeln!(file, "correct-horse-battery-staple").expect("written");
    let config = format!("[purge]\nlisten = [\"127.0.0.1:0\"]\ntoken_file = \"{}\"\n", file.path().display());
    let fleet = nobody(config.leak());
    let send = |authorization: &str| {
        let request = format!("PURGE / HTTP/1.1\r\nHost: a\r\nX-Magento-Tags-Pattern: .*\r\n{authorization}\r\n");
        exchange(fleet.clearcoat.purge, request).expect("an answer").status
    };
    for wrong in [
        "",
        "Authorization: Bearer\r\n",
        "Authorization: Bearer correct-horse-battery-stapl\r\n",
        "Authorization: Bearer correct-horse-battery-staple2\r\n",
        "Authorization: Basic correct-horse-battery-staple\r\n",
    ] {
        assert_eq!(send(wrong), 403, "{wrong}");
    }
    assert_nothing_accepted(&fleet);
    assert_eq!(send("Authorization: Bearer correct-horse-battery-staple\r\n"), 200);
    assert_eq!(send("authorization: bearer correct-horse-battery-staple\r\n"), 200);
}

#[test]
fn without_any_varnish_a_purge_is_accepted_all_the_same() {
    let fleet = nobody("");
    let answer = purge(fleet.clearcoat.purge, &tag("cat_p_1")).expect("an answer");
    assert_eq!(
        answer.json(),
        serde_json::json!({"position": 1, "applied": [], "pending": [], "fenced": [], "invalidated": 0})
    );
}
