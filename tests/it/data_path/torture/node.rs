//! A node: reads requests, compares every byte, and answers or aborts as the exchange says.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

use super::expect::check_request;
use super::generate;
use super::ledger::{Run, Violation};
use super::message::{Afterwards, Exchange, Exit, Framing, Interim, Mishap, NodeCut, Number};
use super::pace::{Pace, narrow};
use super::parse::{BodyCheck, Head, Incoming, Trouble, shown};

/// The number of an answer's last bytes that are sent together with surplus bytes. A surplus that arrives later could
/// not be distinguished from the next answer.
const WITH_SURPLUS: usize = 16;

/// A listener on a free port, optionally with narrow connections.
pub fn listen(is_narrow: bool) -> std::io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    if is_narrow {
        narrow(&socket)?;
    }
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    socket.listen(1024)
}

/// Serves until a violation is seen.
pub async fn serve(run: Rc<Run>, listener: TcpListener) -> Violation {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted.expect("a connection");
                connections.spawn_local(connection(Rc::clone(&run), stream));
            }
            Some(ended) = connections.join_next() => {
                if let Err(violation) = ended.expect("a node does not panic") {
                    return violation;
                }
            }
        }
    }
}

/// Counts a connection with requests while it is open.
struct Open<'r>(&'r Run);

impl<'r> Open<'r> {
    fn new(run: &'r Run) -> Self {
        run.node_connections.set(run.node_connections.get() + 1);
        Open(run)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.node_connections.set(self.0.node_connections.get() - 1);
    }
}

async fn connection(run: Rc<Run>, mut stream: TcpStream) -> Result<(), Violation> {
    let violation = |number, what| Violation { number, seen_by: "the node", what };
    let address = stream.local_addr().map_err(|error| violation(None, format!("no address: {error}")))?;
    stream.set_nodelay(true).map_err(|error| violation(None, format!("a socket option: {error}")))?;
    let open = Open::new(&run);
    let (source, sink) = stream.split();
    let mut wire = Wire { run: &run, address, incoming: Incoming::new(source, Pace::at_once()), sink, last: None };
    let exit = match wire.serve().await {
        Ok(exit) => exit,
        Err(Trouble::Left | Trouble::Ended(_)) => Exit::Close,
        Err(Trouble::Wrong(what)) => return Err(violation(wire.last, what)),
    };
    if exit == Exit::Reset {
        let reset = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        reset.map_err(|error| violation(None, format!("the socket cannot be reset: {error}")))?;
    }
    drop(stream);
    drop(open);
    Ok(())
}

/// A connection of clearcoat's.
struct Wire<'w> {
    run: &'w Run,
    address: SocketAddr,
    incoming: Incoming<ReadHalf<'w>>,
    sink: WriteHalf<'w>,
    /// The current or last request.
    last: Option<Number>,
}

impl Wire<'_> {
    /// Serves until the connection is to be closed, or has been.
    async fn serve(&mut self) -> Result<Exit, Trouble> {
        loop {
            self.incoming.set_pace(Pace::at_once());
            self.incoming.begin().await?;
            let head = match self.incoming.head().await {
                Err(Trouble::Ended(_)) => return self.broken_head(),
                head => head?,
            };
            let mut words = head.first_line.split(' ');
            let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            if let Some(status) = health_check(method, target) {
                let answer = format!("HTTP/1.1 {status} As asked\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                // The checker may not want the answer any more.
                _ = self.sink.write_all(answer.as_bytes()).await;
                return Ok(Exit::Close);
            }
            self.last = Number::of_target(target);
            let number =
                self.last.ok_or_else(|| Trouble::Wrong(format!("nobody asked for {}", shown(target.as_bytes()))))?;
            let conversation = self.run.conversation(number.conversation);
            let Some(exchange) = conversation.exchanges.get(number.index as usize) else {
                self.last = None;
                return Err(Trouble::Wrong(format!("there is no exchange {number}")));
            };
            if let Some(exit) = self.exchange(&head, exchange).await? {
                return Ok(exit);
            }
        }
    }

    /// A truncated head must be from a client that left.
    fn broken_head(&mut self) -> Result<Exit, Trouble> {
        let started = String::from_utf8_lossy(self.incoming.buffered()).into_owned();
        let number = started.split(' ').nth(1).and_then(Number::of_target);
        let is_left = |number: Number| {
            let conversation = self.run.conversation(number.conversation);
            conversation.exchanges.get(number.index as usize).is_some_and(Exchange::is_left)
        };
        if number.is_some_and(is_left) {
            return Ok(Exit::Close);
        }
        Err(Trouble::Wrong(format!("a head breaks off: {}", shown(started.as_bytes()))))
    }

    /// Serves one request. Returns how to close the connection, if at all.
    async fn exchange(&mut self, head: &Head, exchange: &Exchange) -> Result<Option<Exit>, Trouble> {
        let Exchange { number, request, answer, .. } = exchange;
        check_request(head, request, self.address).map_err(Trouble::Wrong)?;
        let times = self.run.begun(*number);
        let purpose = 16 + u64::from(number.index) * 8 + u64::from(times % 8);
        let mut random = generate::random(self.run.seed, number.conversation, purpose);
        self.incoming.set_pace(Pace::new(&mut random));
        let mut pace = Pace::new(&mut random);
        let cut = match exchange.mishap {
            Some(Mishap::NodeCuts { at, exit, always }) if always || times == 1 => Some((at, exit)),
            _ => None,
        };
        if let Some((NodeCut::BeforeBody, exit)) = cut {
            return self.leave(exit).await.map(Some);
        }
        let mut sent = self.interims(&mut pace, &answer.interim, true).await;
        let mut body = BodyCheck::new(request.body.framing, &request.body.content);
        match body.advance(&mut self.incoming, answer.early.unwrap_or(usize::MAX)).await {
            Ok(true) => self.run.completed(*number),
            Ok(false) => {}
            Err(Trouble::Ended(_)) if exchange.is_left() => return Ok(Some(Exit::Close)),
            Err(Trouble::Ended(ending)) => {
                let (at, of) = (body.at, request.body.content.len());
                return Err(Trouble::Wrong(format!("the request ends ({ending:?}) after {at} of {of} B of its body")));
            }
            Err(trouble) => return Err(trouble),
        }
        if let Some((NodeCut::BeforeAnswer, exit)) = cut {
            return self.leave(exit).await.map(Some);
        }
        sent = sent.and(self.interims(&mut pace, &answer.interim, false).await);
        sent = sent.and(self.answer(&mut pace, exchange, cut.map(|(at, _)| at)).await);
        match sent {
            Err(_gone) if exchange.is_left() => return Ok(Some(Exit::Close)),
            sent => sent.map_err(|error| Trouble::Wrong(format!("clearcoat does not take the answer: {error}")))?,
        }
        if let Some((_, exit)) = cut {
            return self.leave(exit).await.map(Some);
        }
        if answer.early.is_some() {
            self.run.count("answered early");
            if answer.body.framing == Framing::UntilClose {
                half_close(&mut self.sink).await;
            }
            match body.advance(&mut self.incoming, usize::MAX).await {
                Ok(_) => self.run.completed(*number),
                // An answer that is no longer needed may be cut.
                Err(Trouble::Ended(_)) => return Ok(Some(Exit::Close)),
                Err(trouble) => return Err(trouble),
            }
        }
        self.afterwards(exchange).await
    }

    async fn interims(&mut self, pace: &mut Pace, interim: &[Interim], before_body: bool) -> std::io::Result<()> {
        for interim in interim.iter().filter(|interim| interim.before_body == before_body) {
            pace.write(&mut self.sink, &interim.head, 0).await?;
            self.run.count("interim answers");
        }
        Ok(())
    }

    /// Sends the answer, up to the cut if there is one.
    async fn answer(&mut self, pace: &mut Pace, exchange: &Exchange, cut: Option<NodeCut>) -> std::io::Result<()> {
        let answer = &exchange.answer;
        let mut bytes = answer.head.clone();
        let mut together = 0;
        match cut {
            Some(NodeCut::Head(at)) => bytes.truncate(at),
            Some(NodeCut::Body(at)) => bytes.extend_from_slice(&answer.body.wire[..at]),
            _ => {
                bytes.extend_from_slice(&answer.body.wire);
                if let Afterwards::Surplus(surplus) = &answer.afterwards {
                    bytes.extend_from_slice(surplus);
                    together = surplus.len() + WITH_SURPLUS;
                }
            }
        }
        pace.write(&mut self.sink, &bytes, together).await
    }

    async fn afterwards(&mut self, exchange: &Exchange) -> Result<Option<Exit>, Trouble> {
        let answer = &exchange.answer;
        match answer.afterwards {
            Afterwards::Keeps => Ok(None),
            Afterwards::Surplus(_) => self.nothing_more("surplus bytes").await.map(Some),
            Afterwards::ClosesUnannounced if answer.body.framing != Framing::UntilClose => Ok(Some(Exit::Close)),
            Afterwards::Closes | Afterwards::ClosesUnannounced => {
                half_close(&mut self.sink).await;
                self.nothing_more("the end of the connection").await.map(Some)
            }
        }
    }

    /// Checks that the connection is not used any more.
    async fn nothing_more(&mut self, behind: &str) -> Result<Exit, Trouble> {
        self.incoming.begin().await?;
        Err(Trouble::Wrong(format!("behind {behind} came {}", shown(self.incoming.buffered()))))
    }

    /// Aborts. After a half-close it continues to read, since closing with unread bytes would be a reset.
    async fn leave(&mut self, exit: Exit) -> Result<Exit, Trouble> {
        self.run.count("broken off by a node");
        if exit == Exit::HalfClose {
            half_close(&mut self.sink).await;
            loop {
                self.incoming.some(usize::MAX).await?;
            }
        }
        Ok(exit)
    }
}

/// An error means that the connection has ended, which is the goal.
async fn half_close<W: AsyncWrite + Unpin>(sink: &mut W) {
    _ = sink.shutdown().await;
}

/// The configured status, if this is a health check.
fn health_check(method: &str, target: &str) -> Option<u16> {
    match (method, target) {
        ("GET", "/health_check.php") => Some(200),
        ("PURGE", "/.clearcoat/probe") => Some(400),
        _ => None,
    }
}
