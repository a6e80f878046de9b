//! The control plane's HTTP server: hyper, with limits. It serves purges, metrics and status, never shop traffic.
//!
//! No client is refused for lack of room: `room.rs` says why, and which connections make room.

mod body;
mod limit;
mod room;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::shutdown::{Shutdown, Stage};
use crate::telemetry::causes;
pub use body::ResponseBody;
use limit::{Limited, Meter};
use room::{Guest, Room};

/// An answer of the control plane: complete and with its length, but for the stream of events.
pub type Response = http::Response<ResponseBody>;

/// From the end of one request to the end of the next head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// The time limit of a body: most are ignored, so the limit is short.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Handles the requests of a listener.
pub trait Handler: Send + Sync + 'static {
    /// Whether the body of this request is used. If not, it is read and discarded.
    fn wants_body(&self, _head: &http::request::Parts, _peer: SocketAddr) -> bool {
        false
    }

    /// Answers a request; its body is empty unless it was wanted. Runs to its end even if the client disconnects.
    fn handle(&self, request: http::Request<Bytes>, peer: SocketAddr) -> impl Future<Output = Response> + Send;
}

/// Serves a listener until the process drains, then finishes the requests in flight.
///
/// `max_connections` limits concurrent connections; a shop has tens of clients here. `max_request` limits a request,
/// head and body together, in bytes: a longer one is answered 413.
pub async fn serve<H: Handler>(
    listener: TcpListener,
    handler: Arc<H>,
    max_connections: usize,
    max_request: usize,
    shutdown: Shutdown,
) {
    serve_in(Room::new(max_connections), listener, handler, max_request, shutdown).await;
}

async fn serve_in<H: Handler>(
    room: Room,
    listener: TcpListener,
    handler: Arc<H>,
    max_request: usize,
    shutdown: Shutdown,
) {
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            let place = room.enter().await;
            listener.accept().await.map(|(stream, peer)| (place.seat(), stream, peer))
        };
        let accepted = tokio::select! {
            accepted = next => accepted,
            Some(_ended) = connections.join_next() => continue,
            () = shutdown.reached(Stage::Closing) => break,
        };
        match accepted {
            Ok((guest, stream, peer)) => {
                let handler = Arc::clone(&handler);
                connections.spawn(serve_connection(guest, stream, peer, handler, max_request, shutdown.clone()));
            }
            Err(error) => {
                tracing::warn!(error = %causes(&error), "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    tokio::select! {
        () = async { while connections.join_next().await.is_some() {} } => {}
        () = shutdown.reached(Stage::Stopping) => {}
    }
}

async fn serve_connection<H: Handler>(
    guest: Guest,
    stream: TcpStream,
    peer: SocketAddr,
    handler: Arc<H>,
    max_request: usize,
    shutdown: Shutdown,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(error = %causes(&error), "the client left at once");
        return;
    }
    let (stream, meter) = Limited::new(stream, max_request);
    let service = service_fn(|request: http::Request<Incoming>| {
        // Spawned here: hyper drops this future, perhaps before its first poll, if the client has hung up. The request
        // is carried out all the same.
        let answer = tokio::spawn(answer(Arc::clone(&handler), request, peer, meter.clone()));
        guest.request_began();
        let (meter, guest) = (&meter, &guest);
        async move {
            let response = answer.await.unwrap_or_else(|error| {
                tracing::error!(error = %causes(&error), "a request handler panicked");
                text(500, "internal error\n")
            });
            meter.next_request();
            guest.request_ended();
            Ok::<_, Infallible>(response)
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        // A client that half-closes after its request (`nc -N` does so) still wants its answer.
        .half_close(true)
        .max_headers(limit::MAX_FIELDS)
        // Our limit applies first, and is answered as documented.
        .max_buf_size(max_request + 64 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        // Received bytes are read before a connection is closed for others.
        biased;
        result = connection.as_mut() => result,
        () = guest.must_leave() => {
            tracing::debug!(%peer, "an idle control connection was closed, because others wait for its place");
            return;
        }
        () = shutdown.reached(Stage::Closing) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%peer, error = %causes(&error), "a control connection failed");
    }
}

async fn answer<H: Handler>(
    handler: Arc<H>,
    request: http::Request<Incoming>,
    peer: SocketAddr,
    meter: Meter,
) -> Response {
    let (head, body) = request.into_parts();
    let wanted = handler.wants_body(&head, peer);
    let read = async {
        if wanted {
            return Ok(body.collect().await?.to_bytes());
        }
        read_over(body).await.map(|()| Bytes::new())
    };
    // An unused body has to be read before the next request. If it breaks off, the connection ends but the request is
    // carried out, unless we refused the body or the request depends on it.
    let body = match tokio::time::timeout(BODY_TIMEOUT, read).await {
        Ok(Ok(body)) => body,
        Ok(Err(error)) => {
            tracing::debug!(error = %causes(&error), "a request body broke off");
            if meter.is_over() {
                // The client has been told already, and its connection has ended.
                return text(413, "request is too large\n");
            }
            Bytes::new()
        }
        Err(_) => {
            tracing::debug!("a request body timed out");
            Bytes::new()
        }
    };
    handler.handle(http::Request::from_parts(head, body), peer).await
}

async fn read_over(mut body: Incoming) -> Result<(), hyper::Error> {
    while let Some(frame) = body.frame().await {
        frame?;
    }
    Ok(())
}

/// An answer with a JSON body.
pub fn json(status: u16, body: &impl serde::Serialize) -> Response {
    match serde_json::to_vec(body) {
        Ok(body) => response(status, "application/json", body),
        Err(error) => response(500, "text/plain; charset=utf-8", error.to_string().into_bytes()),
    }
}

/// An answer with a text body.
pub fn text(status: u16, body: impl Into<String>) -> Response {
    response(status, "text/plain; charset=utf-8", body.into().into_bytes())
}

/// An answer with any body.
pub fn response(status: u16, content_type: &'static str, body: impl Into<Bytes>) -> Response {
    answer_with(status, content_type, ResponseBody::Whole(Full::new(body.into())))
}

/// An answer that is a stream of server-sent events, each of them one item.
pub fn events(events: tokio::sync::mpsc::Receiver<Bytes>) -> Response {
    answer_with(200, "text/event-stream", ResponseBody::Events(events))
}

fn answer_with(status: u16, content_type: &'static str, body: ResponseBody) -> Response {
    let mut response = http::Response::new(body);
    // The statuses are constants of this crate, all of them valid.
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    headers.insert(http::header::CACHE_CONTROL, http::HeaderValue::from_static("no-store"));
    response
}
