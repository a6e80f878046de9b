//! The control plane's HTTP server: hyper, with bounds. Purges, metrics and status come in here; shop traffic never does.
//!
//! Nobody is turned away for want of room: why, and who makes room, is in `room.rs`.

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
use limit::{Limited, Meter};
use room::{Guest, Room};

/// An answer of the control plane: always whole, always with its length.
pub type Response = http::Response<Full<Bytes>>;

/// From the end of one request to the end of the head of the next.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a body may take that was announced: it is not wanted, so nobody should wait for it for long.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// What a listener does with a request.
pub trait Handler: Send + Sync + 'static {
    /// Whether the body of this request means anything. If not, it is read over and never held.
    fn wants_body(&self, _head: &http::request::Parts, _peer: SocketAddr) -> bool {
        false
    }

    /// Answers a request; its body is empty unless it was wanted. Runs to its end also when the client goes away.
    fn handle(&self, request: http::Request<Bytes>, peer: SocketAddr) -> impl Future<Output = Response> + Send;
}

/// Serves a listener until the process drains, then finishes the requests that are under way.
///
/// `max_connections`: at once; a shop has tens of clients here. `max_request` bounds a request, head and body together, in
/// bytes: one beyond it is answered 413.
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
            () = shutdown.reached(Stage::Draining) => break,
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
        // Spawned here and now: hyper drops what this returns, perhaps without having polled it once, when it sees
        // that the client has hung up. What a head asks for is carried out all the same.
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
        // A client that has said all it wants to say (`nc -N` does so) still wants its answer.
        .half_close(true)
        .max_headers(limit::MAX_FIELDS)
        // Ours trips first, and answers as documented.
        .max_buf_size(max_request + 64 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        // What has come is read before anybody is made to leave.
        biased;
        result = connection.as_mut() => result,
        () = guest.must_leave() => {
            tracing::debug!(%peer, "a control connection at rest was closed: others wait for its place");
            return;
        }
        () = shutdown.reached(Stage::Draining) => {
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
    // A body that means nothing has to be read over before the next request. One that breaks off takes the connection
    // with it, and not what its head asked for; unless it broke off because we refused it, or all is in the body.
    let body = match tokio::time::timeout(BODY_TIMEOUT, read).await {
        Ok(Ok(body)) => body,
        Ok(Err(error)) => {
            tracing::debug!(error = %causes(&error), "a request body broke off");
            if meter.is_over() {
                return text(413, "request is too large\n");
            }
            Bytes::new()
        }
        Err(_) => {
            tracing::debug!("a request body did not come in time");
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
pub fn response(status: u16, content_type: &'static str, body: Vec<u8>) -> Response {
    let mut response = http::Response::new(Full::new(Bytes::from(body)));
    // The statuses are constants of this crate, all of them valid.
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    headers.insert(http::header::CACHE_CONTROL, http::HeaderValue::from_static("no-store"));
    response
}
