//! The requests that the command sends and how it reads the answers, over real sockets.

use clap::Parser;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::super::{Cli, CliCommand};
use super::*;
use crate::purge::TagSet;

fn parsed(arguments: &[&str]) -> PurgeCommand {
    let cli = Cli::try_parse_from(["clearcoat", "purge"].iter().chain(arguments)).unwrap();
    let CliCommand::Purge(purge) = cli.command else { panic!("not a purge") };
    *purge
}

fn answer(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// Runs the command against a listener that gives this answer to everything. Returns what it printed, and what was
/// written to each connection with the listener's own address replaced by the one in Magento's captures.
async fn run_against(answer: &str, arguments: &[&str]) -> (anyhow::Result<String>, Vec<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answer = answer.to_owned();
    let (wrote, mut written) = tokio::sync::mpsc::unbounded_channel();
    let server = tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") && connection.read_buf(&mut request).await.unwrap() > 0 {}
            wrote.send(String::from_utf8(request).unwrap()).unwrap();
            connection.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    let endpoint = format!("http://{address}");
    let mut out = Vec::new();
    let result = parsed(&[&["--endpoint", &endpoint], arguments].concat()).run_to(&mut out).await;
    server.abort();
    let mut requests = Vec::new();
    while let Ok(request) = written.try_recv() {
        requests.push(request.replace(&format!("Host: {address}"), "Host: 127.0.0.1"));
    }
    (result.map(|()| String::from_utf8(out).unwrap()), requests)
}

const DONE: &str = r#"{"position":42,"applied":["varnish-1","varnish-3"],"fenced":["varnish-2"],"invalidated":17}"#;

#[tokio::test]
async fn the_bytes_are_those_that_magento_writes() {
    let flush = "PURGE / HTTP/1.1\r\nX-Magento-Tags-Pattern: .*\r\nHost: 127.0.0.1\r\n\r\n";
    let soft_flush = flush.replace(".*\r\n", ".*\r\nX-Magento-Purge-Soft: 1\r\n");
    // A listener that does not know the third header obeys the other two.
    let all = flush.replace(".*\r\n", ".*\r\nX-Pool: .*\r\nX-Clearcoat-Flush: all\r\n");
    let three_tags = "PURGE / HTTP/1.1\r\nX-Magento-Tags-Pattern: \
        ((^|,)cat_p_1(,|$))|((^|,)cat_p_42(,|$))|((^|,)cat_c_3(,|$))\r\nHost: 127.0.0.1\r\n\r\n";
    for (arguments, bytes) in [
        (&["--pattern", ".*"][..], flush),
        (&["--all"], &all),
        (&["--all", "--soft"], &soft_flush),
        (&["--tag", "cat_p_1", "--tag", "cat_p_42", "--tag", "cat_c_3"], three_tags),
    ] {
        let (result, requests) = run_against(&answer("200 Purged", DONE), arguments).await;
        result.unwrap();
        assert_eq!(requests, [bytes]);
    }
}

#[tokio::test]
async fn pools_pages_soft_purges_and_tokens_have_their_headers() {
    let mut token = tempfile::NamedTempFile::new().unwrap();
    token.write_all(b"s3cret\n").unwrap();
    let token = token.path().to_str().unwrap();
    for (arguments, head) in [
        (&["--pool", "^web"][..], "/ HTTP/1.1\r\nX-Pool: ^web\r\nHost: 127.0.0.1"),
        (&["--pattern", "cms_[bp]"], "/ HTTP/1.1\r\nX-Magento-Tags-Pattern: cms_[bp]\r\nHost: 127.0.0.1"),
        (&["--url", "https://shop.example/a?b=c#d"], "/a?b=c HTTP/1.1\r\nHost: shop.example"),
        (
            &["--all", "--soft", "--token-file", token],
            "/ HTTP/1.1\r\nX-Magento-Tags-Pattern: .*\r\nX-Magento-Purge-Soft: 1\r\n\
             Authorization: Bearer s3cret\r\nHost: 127.0.0.1",
        ),
    ] {
        let (result, requests) = run_against(&answer("200 Purged", DONE), arguments).await;
        result.unwrap();
        assert_eq!(requests, [format!("PURGE {head}\r\n\r\n")]);
    }
}

#[tokio::test]
async fn json_is_printed_as_it_came() {
    let (result, _) = run_against(&answer("200 Purged", DONE), &["--all", "--json"]).await;
    assert_eq!(result.unwrap(), format!("{DONE}\n"));
}

#[tokio::test]
async fn a_refusal_fails_with_its_text_and_ends_the_chunks() {
    let tags: Vec<String> = (0..600).map(|id| format!("--tag=cat_p_{id}")).collect();
    let tags: Vec<&str> = tags.iter().map(String::as_str).collect();
    let refusal = answer("503 Service Unavailable", r#"{"error":"the journal is full"}"#);
    let (result, requests) = run_against(&refusal, &tags).await;
    let error = format!("{:#}", result.unwrap_err());
    assert!(error.ends_with(" answered 503 Service Unavailable: the journal is full"), "{error}");
    assert_eq!(requests.len(), 1);
}

#[tokio::test]
async fn a_200_of_somebody_else_is_a_failure() {
    let (result, _) = run_against(&answer("200 Purged", "<html>Purged</html>"), &["--all"]).await;
    assert!(format!("{:#}", result.unwrap_err()).contains("is that its purge listener (purge.listen, port 6081)?"));
}

#[tokio::test]
async fn nobody_listening_is_a_failure() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let error = parsed(&["--all", "--endpoint", &endpoint]).run().await.unwrap_err();
    assert!(format!("{error:#}").starts_with(&format!("cannot connect to {endpoint}: ")), "{error:#}");
}

#[test]
fn many_tags_go_in_chunks_as_long_as_magentos() {
    let tags: Vec<String> = (0..1000).map(|id| format!("cat_p_{id}")).collect();
    let chunks = patterns(&tags);
    assert!(chunks.iter().all(|chunk| chunk.len() <= MAX_PATTERN));
    assert!(chunks[0].len() + 1 + to_magento(["cat_p_350"]).len() > MAX_PATTERN);
    let rejoined: Vec<String> =
        chunks.iter().flat_map(|chunk| chunk.split(")|(").map(str::to_owned).collect::<Vec<_>>()).collect();
    assert_eq!(rejoined.len(), tags.len());
    for chunk in &chunks {
        assert!(TagSet::from_magento(chunk).is_some());
    }
}

#[test]
fn an_answer_is_one_line_for_people() {
    let line = |json: &str| serde_json::from_str::<AcceptedAnswer>(json).unwrap().to_string();
    assert_eq!(line(DONE), "purged at position 42: applied by varnish-1, varnish-3; fenced: varnish-2");
    assert_eq!(
        line(r#"{"position":1,"applied":[],"fenced":["a"]}"#),
        "purged at position 1: applied by none; fenced: a"
    );
    assert_eq!(line(r#"{"position":1,"applied":["a"],"fenced":[]}"#), "purged at position 1: applied by a");
    assert_eq!(line(r#"{"position":1,"applied":[],"fenced":[]}"#), "purged at position 1: no Varnish is there");
}
