//! Who gets a place if there are few. Real sockets; the clock is advanced for waits.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::*;
use crate::shutdown;

/// Answers `GET /` at once, and everything else once the gate is open.
struct Gated {
    open: watch::Receiver<bool>,
    begun: Arc<AtomicUsize>,
}

impl Handler for Gated {
    async fn handle(&self, request: http::Request<Bytes>, _peer: SocketAddr) -> Response {
        self.begun.fetch_add(1, Ordering::SeqCst);
        if request.uri().path() != "/" {
            _ = self.open.clone().wait_for(|open| *open).await;
        }
        text(200, "done")
    }
}

struct Rig {
    address: SocketAddr,
    gate: watch::Sender<bool>,
    /// The number of requests that reached the handler.
    begun: Arc<AtomicUsize>,
    _stop: shutdown::ShutdownHandle,
    server: JoinHandle<()>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn rig(places: usize) -> Rig {
    rig_of(places, 1024).await
}

async fn rig_of(places: usize, max_request: usize) -> Rig {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (gate, open) = watch::channel(false);
    let (stop, shutdown) = shutdown::channel();
    let begun = Arc::new(AtomicUsize::new(0));
    let handler = Arc::new(Gated { open, begun: Arc::clone(&begun) });
    let server = tokio::spawn(serve_in(Room::new(places), listener, handler, max_request, shutdown));
    Rig { address, gate, begun, _stop: stop, server }
}

impl Rig {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn ask(&self, path: &str) -> TcpStream {
        let mut client = self.connect().await;
        client.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).await.unwrap();
        client
    }
}

/// Reads an answer; an empty text at the end of the connection.
async fn answer(client: &mut TcpStream) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"done") && client.read_buf(&mut text).await.is_ok_and(|read| read > 0) {}
    String::from_utf8(text).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_client_without_a_place_waits_until_a_request_ends_however_long() {
    let rig = rig(2).await;
    let mut clients = vec![rig.ask("/slow").await, rig.ask("/slow").await, rig.ask("/slow").await];
    tokio::time::sleep(20 * HEAD_TIMEOUT).await;
    assert_eq!(rig.begun.load(Ordering::SeqCst), 2);
    rig.gate.send_replace(true);
    for client in &mut clients {
        assert!(answer(client).await.starts_with("HTTP/1.1 200 OK\r\n"));
    }
}

#[tokio::test]
async fn connections_at_rest_make_room_long_before_their_time() {
    let rig = rig(2).await;
    let mut silent = rig.connect().await;
    let mut kept = rig.ask("/").await;
    assert!(answer(&mut kept).await.ends_with("done"));
    let mut third = rig.ask("/").await;
    let answered = tokio::time::timeout(HEAD_TIMEOUT / 2, answer(&mut third)).await;
    assert!(answered.unwrap().ends_with("done"));
    for client in [&mut silent, &mut kept] {
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn where_there_is_room_a_connection_at_rest_stays() {
    let rig = rig(3).await;
    let mut kept = [rig.ask("/").await, rig.ask("/").await];
    for client in &mut kept {
        assert!(answer(client).await.ends_with("done"));
    }
    tokio::time::sleep(HEAD_TIMEOUT / 2).await;
    for client in &mut kept {
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        assert!(answer(client).await.ends_with("done"));
    }
}

/// Sends a request that hyper answers by itself, and returns the complete output.
async fn refused(rig: &Rig, request: String) -> String {
    let mut client = rig.connect().await;
    client.write_all(request.as_bytes()).await.unwrap();
    let mut text = Vec::new();
    while client.read_buf(&mut text).await.is_ok_and(|read| read > 0) {}
    String::from_utf8(text).unwrap()
}

#[tokio::test]
async fn what_the_library_cannot_read_is_refused_with_a_text() {
    let rig = rig_of(2, 1 << 20).await;
    let fields = |count: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(count));
    let line = |line: &str| format!("{line}\r\nHost: a\r\n\r\n");
    for (request, status, error) in [
        (fields(101), "413 Content Too Large", "more than 100 header fields"),
        (fields(10_000), "413 Content Too Large", "more than 100 header fields"),
        (
            line(&format!("GET /{} HTTP/1.1", "x".repeat(70_000))),
            "413 Content Too Large",
            "the request target is too long",
        ),
        (line("GET /a<b HTTP/1.1"), "400 Bad Request", "the request is malformed: a method"),
        (line("GET /a b HTTP/1.1"), "400 Bad Request", "the request is malformed"),
        (line("GE(T / HTTP/1.1"), "400 Bad Request", "the request is malformed"),
        (line("GET / HTTP/1.1\r\nA : b"), "400 Bad Request", "the request is malformed"),
    ] {
        let answer = refused(&rig, request.clone()).await;
        let begin = &request[..request.len().min(40)];
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\n")),
            "{begin}: {answer}"
        );
        assert!(answer.contains(&format!("{{\"error\":\"{error}")), "{begin}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{begin}: {answer}");
    }
    assert!(refused(&rig, fields(99).replacen("A: b", "Connection: close", 1)).await.ends_with("done"));
    // After a request that was answered.
    let answers = refused(&rig, fields(1) + &fields(101)).await;
    assert!(answers.starts_with("HTTP/1.1 200 OK") && answers.ends_with("more than 100 header fields\"}"), "{answers}");
}
