//! An HTTP/2 client with explicit steps: a test decides when it sends, stalls, resets or holds back.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use h2::client::{Builder, ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use hyper::body::Bytes;
use rustls::pki_types::ServerName;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

use super::PATIENCE;
use super::tls::Client;

/// A connection, whose frames are read and written by its own thread.
pub struct Http2 {
    runtime: Arc<Runtime>,
    sender: SendRequest<Bytes>,
    driver: Mutex<Option<JoinHandle<Result<(), h2::Error>>>>,
}

/// A complete answer.
#[derive(Debug)]
pub struct Http2Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

impl Http2Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("a text body")
    }
}

/// Why an answer is incomplete.
#[derive(Debug, PartialEq, Eq)]
pub enum Broken {
    /// Its stream was reset for this reason.
    Reset(Reason),
    /// The connection ended, or was shut down by GOAWAY.
    Gone(String),
}

impl From<h2::Error> for Broken {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => Broken::Reset(reason),
            _ => Broken::Gone(error.to_string()),
        }
    }
}

/// One request in flight.
pub struct Stream {
    runtime: Arc<Runtime>,
    answer: Option<ResponseFuture>,
    body: SendStream<Bytes>,
}

/// An answer that has begun.
pub struct Begun {
    runtime: Arc<Runtime>,
    pub head: Response<()>,
    body: RecvStream,
}

/// A request for this path of the shop.
pub fn request(method: &str, path: &str) -> http::request::Builder {
    Request::builder().method(method).uri(format!("https://shop.test{path}"))
}

impl Http2 {
    /// Opens a connection with a large window: an unread stream does not block others.
    pub fn open(address: SocketAddr) -> Self {
        Self::open_with(address, Builder::new().initial_connection_window_size(256 * 1024 * 1024))
    }

    /// Opens a connection with settings of its own.
    pub fn open_with(address: SocketAddr, settings: &Builder) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = Arc::new(runtime.expect("a runtime"));
        let opened = limited(&runtime, async {
            let socket = tokio::net::TcpStream::connect(address).await.expect("the edge accepts");
            socket.set_nodelay(true).expect("a socket option");
            let config = Client::of(&rustls::version::TLS13, &[b"h2"]).config();
            let name = ServerName::try_from("shop.test").expect("a server name");
            let session = TlsConnector::from(config).connect(name, socket).await.expect("a handshake");
            assert_eq!(session.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
            settings.handshake(session).await.expect("an HTTP/2 connection")
        });
        let (sender, connection) = opened;
        let driver = Mutex::new(Some(runtime.spawn(connection)));
        Http2 { runtime, sender, driver }
    }

    /// Sends the head of a request, once the server allows another stream. `end`: it has no body.
    pub fn ask(&self, request: Request<()>, end: bool) -> Stream {
        self.try_ask(request, end).expect("a connection that takes requests")
    }

    pub fn try_ask(&self, request: Request<()>, end: bool) -> Result<Stream, Broken> {
        let sender = self.sender.clone();
        let sent = limited(&self.runtime, async move { sender.ready().await?.send_request(request, end) });
        let (answer, body) = sent?;
        Ok(Stream { runtime: Arc::clone(&self.runtime), answer: Some(answer), body })
    }

    pub fn get(&self, path: &str) -> Result<Http2Answer, Broken> {
        self.try_ask(request("GET", path).body(()).expect("a request"), true)?.answer()
    }

    /// Sends a complete request and reads its complete answer, concurrently.
    pub fn exchange(&self, request: Request<()>, body: &[u8]) -> Result<Http2Answer, Broken> {
        let mut stream = self.try_ask(request, false)?;
        let answer = stream.answer.take().expect("asked once");
        let runtime = Arc::clone(&self.runtime);
        let reading = runtime.spawn(async move { read(answer.await?).await });
        // A server that has answered may not read the rest.
        _ = stream.send(body, true);
        limited(&runtime, reading).expect("a task that does not panic")
    }

    /// Waits for the end of the connection; an error if it was cut, or ended for a reason.
    pub fn ended(&self) -> Result<(), h2::Error> {
        let driver = self.driver.lock().unwrap().take().expect("it ends once");
        limited(&self.runtime, driver).expect("a task that does not panic")
    }

    /// Aborts the connection.
    pub fn cut(&self) {
        if let Some(driver) = self.driver.lock().unwrap().take() {
            driver.abort();
        }
    }
}

impl Stream {
    /// Sends a piece of the body, within the server's window.
    pub fn send(&mut self, mut bytes: &[u8], end: bool) -> Result<(), h2::Error> {
        let Stream { runtime, body, .. } = self;
        if bytes.is_empty() {
            return body.send_data(Bytes::new(), end);
        }
        limited(runtime, async {
            while !bytes.is_empty() {
                body.reserve_capacity(bytes.len().min(64 * 1024));
                let room = std::future::poll_fn(|cx| body.poll_capacity(cx)).await;
                let room = room.unwrap_or_else(|| Err(Reason::CANCEL.into()))?;
                let (piece, rest) = bytes.split_at(room.min(bytes.len()));
                body.send_data(Bytes::copy_from_slice(piece), end && rest.is_empty())?;
                bytes = rest;
            }
            Ok(())
        })
    }

    pub fn trailers(&mut self, trailers: HeaderMap) {
        self.body.send_trailers(trailers).expect("an open stream");
    }

    /// Cancels the request.
    pub fn reset(&mut self, reason: Reason) {
        self.body.send_reset(reason);
    }

    /// Waits for the reason with which the server resets the stream.
    pub fn was_reset(&mut self) -> Reason {
        let Stream { runtime, body, .. } = self;
        limited(runtime, std::future::poll_fn(|cx| body.poll_reset(cx))).expect("a reset stream")
    }

    pub fn head(&mut self) -> Result<Begun, Broken> {
        let answer = self.answer.take().expect("asked once");
        let (head, body) = limited(&self.runtime, answer)?.into_parts();
        Ok(Begun { runtime: Arc::clone(&self.runtime), head: Response::from_parts(head, ()), body })
    }

    /// Reads the complete answer. An error if it does not end properly.
    pub fn answer(mut self) -> Result<Http2Answer, Broken> {
        let answer = self.answer.take().expect("asked once");
        limited(&self.runtime, async { read(answer.await?).await })
    }
}

impl Begun {
    /// The next piece of the body. `take`: reopens the window by as much.
    pub fn piece(&mut self, take: bool) -> Option<Result<Bytes, Broken>> {
        let piece = limited(&self.runtime, self.body.data())?;
        Some(piece.map_err(Broken::from).inspect(|piece| {
            if take {
                self.body.flow_control().release_capacity(piece.len()).expect("what was received");
            }
        }))
    }

    /// Reads the rest of the body.
    pub fn rest(mut self) -> Result<Vec<u8>, Broken> {
        let mut body = Vec::new();
        while let Some(piece) = self.piece(true) {
            body.extend_from_slice(&piece?);
        }
        Ok(body)
    }
}

async fn read(answer: Response<RecvStream>) -> Result<Http2Answer, Broken> {
    let (head, mut incoming) = answer.into_parts();
    let mut body = Vec::new();
    while let Some(piece) = incoming.data().await {
        let piece = piece?;
        incoming.flow_control().release_capacity(piece.len())?;
        body.extend_from_slice(&piece);
    }
    Ok(Http2Answer { status: head.status.as_u16(), headers: head.headers, body })
}

/// Runs a step, which must complete in time.
fn limited<F: Future>(runtime: &Runtime, step: F) -> F::Output {
    runtime.block_on(async { tokio::time::timeout(PATIENCE, step).await }).expect("an end to it")
}
