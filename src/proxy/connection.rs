//! One client connection: its requests, one after the other, and its rest between them.

use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use super::buffers::Buffers;
use super::client::{After, Client};
use super::deadline::{Deadline, Interrupt, Phase};
use super::exchange;
use super::failure::Failure;
use super::worker::Worker;
use super::{MAX_REQUEST_HEAD, Route};

/// How much is read at once while a head is awaited. More would only copy the start of a large body around.
const HEAD_READ: usize = 16 * 1024;

/// How long a client that was answered before it had sent everything may go on sending. As long as nginx gives it; a
/// limit in bytes would cut off just the large uploads that are refused for their size.
const LINGER_LIMIT: Duration = Duration::from_secs(30);

/// Serves a connection to its end.
pub(super) async fn serve<R: Route>(
    worker: Rc<Worker>,
    route: Rc<R>,
    stream: TcpStream,
    peer: SocketAddr,
    deadline: Deadline,
) {
    let address = peer.ip().to_canonical();
    let peer = address.to_string().into_boxed_str();
    let mut client = Client { worker, route, stream, peer, address, trusted: false, judged_by: None, deadline };
    let mut kept = None;
    while let Some(mut buffers) = next_bytes(&mut client, kept.take()).await {
        let after = match read_head(&mut client, &mut buffers).await {
            Ok(Some(len)) => exchange::handle(&mut client, &mut buffers, len).await,
            Ok(None) => After::Close,
            Err(failure) => exchange::refuse(&mut client, &mut buffers, &failure).await,
        };
        match after {
            After::KeepAlive if buffers.input.is_empty() => client.worker.stock.give_back(buffers),
            After::KeepAlive => kept = Some(buffers),
            After::Reset => {
                reset(&client);
                client.worker.stock.give_back(buffers);
                return;
            }
            After::Close | After::Linger => {
                client.worker.stock.give_back(buffers);
                end(&mut client, after).await;
                return;
            }
        }
    }
}

/// Waits for the first bytes of a request, holding no buffer meanwhile. `None` at the end of the connection.
async fn next_bytes<R: Route>(client: &mut Client<R>, kept: Option<Box<Buffers>>) -> Option<Box<Buffers>> {
    if kept.is_some() {
        return kept;
    }
    client.deadline.enter(Phase::Idle);
    let Client { worker, stream, deadline, .. } = client;
    std::future::poll_fn(|cx| match poll_some(cx, worker, stream, |bytes| first_buffers(worker, bytes)) {
        Poll::Ready(read) => Poll::Ready(read.ok().flatten()),
        Poll::Pending => deadline.poll(cx).map(|_| None),
    })
    .await
}

fn first_buffers(worker: &Worker, bytes: &[u8]) -> Option<Box<Buffers>> {
    if bytes.is_empty() {
        return None;
    }
    let mut buffers = worker.stock.take();
    buffers.input.extend_from_slice(bytes);
    Some(buffers)
}

/// Reads on until the head is complete. `None` where the client left in mid-head.
async fn read_head<R: Route>(client: &mut Client<R>, buffers: &mut Buffers) -> Result<Option<usize>, Failure> {
    client.deadline.enter(Phase::Header);
    loop {
        let found = buffers.input_scan.find(&buffers.input, MAX_REQUEST_HEAD).map_err(Failure::BadHead)?;
        if found.is_some() {
            return Ok(found);
        }
        let Client { worker, stream, deadline, .. } = &mut *client;
        let input = &mut buffers.input;
        let read = std::future::poll_fn(|cx| {
            let read = poll_some(cx, worker, stream, |bytes| {
                input.extend_from_slice(bytes);
                bytes.len()
            });
            match read {
                Poll::Ready(read) => Poll::Ready(read.map_err(Failure::ClientGone)),
                Poll::Pending => deadline.poll(cx).map(|_: Interrupt| Err(Failure::ClientTimeout)),
            }
        });
        if read.await? == 0 {
            return Ok(None);
        }
    }
}

/// Reads once into the worker's scratch buffer and hands the bytes on; none at the end of the stream.
fn poll_some<T>(
    cx: &mut Context<'_>,
    worker: &Worker,
    stream: &mut TcpStream,
    take: impl FnOnce(&[u8]) -> T,
) -> Poll<std::io::Result<T>> {
    let mut scratch = worker.scratch.borrow_mut();
    let mut buffer = ReadBuf::new(&mut scratch[..HEAD_READ]);
    match Pin::new(stream).poll_read(cx, &mut buffer) {
        Poll::Ready(Ok(())) => Poll::Ready(Ok(take(buffer.filled()))),
        Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
        Poll::Pending => Poll::Pending,
    }
}

/// Ends a connection. A socket that is closed with unread bytes is reset, and with it goes what the client has not
/// read of its answer yet: so whatever it still sends is read over until it closes, too.
async fn end<R: Route>(client: &mut Client<R>, after: After) {
    client.deadline.enter(Phase::Linger);
    let Client { worker, stream, deadline, .. } = client;
    // A client that is gone already needs no farewell.
    _ = deadline.limit(stream.shutdown()).await;
    if after != After::Linger {
        return;
    }
    let began = Instant::now();
    while began.elapsed() < LINGER_LIMIT {
        let read = std::future::poll_fn(|cx| match poll_some(cx, worker, stream, <[u8]>::len) {
            Poll::Ready(read) => Poll::Ready(read.unwrap_or(0)),
            Poll::Pending => deadline.poll(cx).map(|_| 0),
        });
        if read.await == 0 {
            return;
        }
        deadline.enter(Phase::Linger);
    }
}

/// Makes the close that follows a reset: a plain one would look like the end of an answer that ends with its
/// connection.
fn reset<R>(client: &Client<R>) {
    if let Err(error) = socket2::SockRef::from(&client.stream).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(%error, "a cut answer could not be reset");
    }
}
