//! Bans as `PURGE` requests, pipelined over one connection that is kept.
//!
//! Varnish answers requests of one connection in their order (RFC 9112 section 9.3.2), so a batch costs one round
//! trip however many bans it has. The status of every answer is looked at, which Magento never does: a node that says
//! anything but 2xx has not dropped the page.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::config::{self, HeaderError};
use crate::fleet::{NodeSpec, PurgeHeaders, SendProxy};
use crate::http1::{BadChunk, BadHead, ChunkedDecoder, Framing, HeadScan, Method, ResponseHead};
use crate::proxy_protocol;
use crate::purge::{Ban, Forward, what_to_change};

/// Requests that are on their way at once. Far below what the socket buffers hold in answers, so that neither side
/// can block the other.
const PIPELINE: usize = 32;

/// The largest head and the largest body that an answer to a purge may have, in bytes.
const MAX_HEAD: usize = 16 * 1024;
const MAX_BODY: usize = 64 * 1024;

/// The most header fields of an answer to a purge.
const MAX_FIELDS: usize = 100;

/// What our own VCL answers to `X-Clearcoat-Flush: all`, with the value `all`. A VCL that does not know the flush answers
/// the pattern or the pool beside it and says 200 all the same.
const FLUSHED: &[u8] = b"x-clearcoat-flushed";

/// The connection to one Varnish.
#[derive(Debug)]
pub struct Link {
    address: SocketAddr,
    send_proxy: SendProxy,
    headers: PurgeHeaders,
    timeout: Duration,
    connection: Option<Connection>,
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
    head: ResponseHead,
    /// The last answer says that everything was dropped.
    flushed_all: bool,
}

/// What a Varnish made of a batch.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Delivered {
    /// The objects it says it dropped. Only a VCL that purges by key knows the number; a ban does not.
    pub invalidated: u64,
    /// Forwarded requests that it refused, with the status. That is the fault of the request, not of the node.
    pub refused: Vec<(Forward, u16)>,
    /// It was told to drop everything ([`Ban::Everything`]) and has not shown that its VCL knows how: pages without tags
    /// and pools may be left.
    pub partial_flush: bool,
}

/// Why a batch was not delivered.
#[derive(Debug, thiserror::Error)]
pub enum DeliveryError {
    /// What its VCL knows us by is not to be had.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// No connection.
    #[error("connecting failed: {0}")]
    Connect(#[source] io::Error),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The answer is not HTTP.
    #[error("the answer is malformed: {0}")]
    Malformed(#[from] BadHead),
    /// The body of the answer is not HTTP.
    #[error("the answer is malformed: {0}")]
    MalformedBody(#[from] BadChunk),
    /// A body longer than anybody needs to answer a purge.
    #[error("the answer is longer than {MAX_BODY} bytes")]
    Endless,
    /// The node understood and said no: its configuration is at fault, and trying again soon is of no use.
    #[error("the node answered {status} {}", what_to_change(*.status))]
    Refused {
        /// The status of the answer.
        status: u16,
    },
    /// The node failed.
    #[error("the node answered {status}")]
    Failed {
        /// The status of the answer.
        status: u16,
    },
}

impl Link {
    /// A link that is not connected yet. `timeout` bounds connecting, and each round trip.
    pub fn new(address: SocketAddr, send_proxy: SendProxy, timeout: Duration) -> Self {
        Link { address, send_proxy, headers: PurgeHeaders::default(), timeout, connection: None }
    }

    /// A link to this node, whose purges carry what its VCL knows purgers by.
    pub fn to(node: &NodeSpec, timeout: Duration) -> Self {
        Link { headers: node.headers.clone(), ..Link::new(node.address, node.send_proxy, timeout) }
    }

    /// Sends bans and waits until all of them are applied. A kept connection may have been closed meanwhile; bans are
    /// idempotent, so that is tried once more on a new one at once.
    ///
    /// # Errors
    /// [`DeliveryError`]; some of the bans may have been applied.
    pub async fn deliver(&mut self, bans: &[Ban]) -> Result<Delivered, DeliveryError> {
        if self.connection.is_some() {
            match self.try_deliver(bans).await {
                Err(DeliveryError::Io(_)) => {}
                result => return result,
            }
        }
        self.try_deliver(bans).await
    }

    /// Sends one request of our own, whole, and gives the status and the body of its answer. A kept connection may have
    /// been closed meanwhile, as with [`Link::deliver`].
    ///
    /// # Errors
    /// [`DeliveryError`]; no status is one.
    pub async fn ask(&mut self, request: &[u8]) -> Result<(u16, Vec<u8>), DeliveryError> {
        if self.connection.is_some() {
            match self.try_ask(request).await {
                Err(DeliveryError::Io(_)) => {}
                result => return result,
            }
        }
        self.try_ask(request).await
    }

    async fn try_ask(&mut self, request: &[u8]) -> Result<(u16, Vec<u8>), DeliveryError> {
        let mut connection = self.connect().await?;
        let exchange = async {
            connection.stream.write_all(request).await?;
            connection.answer().await
        };
        let body = self.bounded(exchange).await??;
        let status = connection.head.status;
        if connection.head.keep_alive && connection.input.is_empty() {
            self.connection = Some(connection);
        }
        Ok((status, body))
    }

    async fn try_deliver(&mut self, bans: &[Ban]) -> Result<Delivered, DeliveryError> {
        let mut delivered = Delivered::default();
        let own = self.bounded(config::reveal(&self.headers)).await??;
        for group in bans.chunks(PIPELINE) {
            let mut connection = self.connect().await?;
            let keep = self.bounded(connection.round_trip(group, &own, &mut delivered)).await??;
            if keep {
                self.connection = Some(connection);
            }
        }
        Ok(delivered)
    }

    async fn connect(&mut self) -> Result<Connection, DeliveryError> {
        if let Some(connection) = self.connection.take() {
            return Ok(connection);
        }
        let mut stream = self.bounded(TcpStream::connect(self.address)).await?.map_err(DeliveryError::Connect)?;
        stream.set_nodelay(true).map_err(DeliveryError::Connect)?;
        if self.send_proxy == SendProxy::V2 {
            // A purge is our own word: the node is to compare our address with its ACL.
            let mut header = Vec::new();
            proxy_protocol::write_v2_local(&mut header);
            self.bounded(stream.write_all(&header)).await?.map_err(DeliveryError::Connect)?;
        }
        Ok(Connection { stream, input: Vec::new(), head: ResponseHead::default(), flushed_all: false })
    }

    async fn bounded<T>(&self, step: impl Future<Output = T>) -> Result<T, DeliveryError> {
        tokio::time::timeout(self.timeout, step).await.map_err(|_| DeliveryError::Timeout(self.timeout))
    }
}

impl Connection {
    /// Sends a group and reads all its answers. Says whether the connection can be used again.
    async fn round_trip(
        &mut self,
        bans: &[Ban],
        own: &[(String, String)],
        delivered: &mut Delivered,
    ) -> Result<bool, DeliveryError> {
        let mut requests = Vec::new();
        bans.iter().for_each(|ban| write_request(&mut requests, ban, own));
        self.stream.write_all(&requests).await?;
        for (index, ban) in bans.iter().enumerate() {
            let body = self.answer().await?;
            delivered.partial_flush |= *ban == Ban::Everything && !self.flushed_all;
            match (self.head.status, ban) {
                (status @ 200..=299, ban) => match (invalidated(&body), ban) {
                    // A VCL that knows nothing of keys may take this for a purge of the URL `/` and say that it is done.
                    (None, Ban::Keys { .. }) => return Err(DeliveryError::Refused { status }),
                    (count, _) => delivered.invalidated += count.unwrap_or(0),
                },
                (status @ 500..=599, _) => return Err(DeliveryError::Failed { status }),
                // "Not in cache": what many a VCL answers to a purge of a page that it does not hold. It is gone.
                (404 | 410, Ban::Forward(_)) => {}
                (status, Ban::Forward(forward)) => delivered.refused.push((forward.clone(), status)),
                (status, _) => return Err(DeliveryError::Refused { status }),
            }
            if !self.head.keep_alive {
                let unanswered = index + 1 < bans.len();
                return if unanswered { Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()) } else { Ok(false) };
            }
        }
        Ok(self.input.is_empty())
    }

    async fn answer(&mut self) -> Result<Vec<u8>, DeliveryError> {
        let mut scan = HeadScan::default();
        let len = loop {
            if let Some(len) = scan.find(&self.input, MAX_HEAD)? {
                break len;
            }
            self.read_more().await?;
        };
        self.head.parse(&self.input, len, Method::Other, MAX_FIELDS)?;
        let flushed_all = |(name, value): (&[u8], &[u8])| name.eq_ignore_ascii_case(FLUSHED) && value == b"all";
        self.flushed_all = self.head.kept_fields(&self.input).any(flushed_all);
        self.input.drain(..len);
        match self.head.framing {
            Framing::None => Ok(Vec::new()),
            Framing::Length(length) => {
                let length = usize::try_from(length).ok().filter(|&length| length <= MAX_BODY);
                let length = length.ok_or(DeliveryError::Endless)?;
                while self.input.len() < length {
                    self.read_more().await?;
                }
                Ok(self.input.drain(..length).collect())
            }
            Framing::Chunked => self.chunked_body().await,
            Framing::UntilClose => {
                while self.read_some().await? > 0 {
                    if self.input.len() > MAX_BODY {
                        return Err(DeliveryError::Endless);
                    }
                }
                Ok(std::mem::take(&mut self.input))
            }
        }
    }

    async fn chunked_body(&mut self) -> Result<Vec<u8>, DeliveryError> {
        let mut decoder = ChunkedDecoder::default();
        let mut body = Vec::new();
        loop {
            let (content, consumed) = decoder.decode_in_place(&mut self.input)?;
            body.extend_from_slice(&self.input[..content]);
            self.input.drain(..consumed);
            if decoder.is_done() {
                return Ok(body);
            }
            if body.len() > MAX_BODY {
                return Err(DeliveryError::Endless);
            }
            self.read_more().await?;
        }
    }

    async fn read_more(&mut self) -> io::Result<()> {
        if self.read_some().await? == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    async fn read_some(&mut self) -> io::Result<usize> {
        self.input.reserve(4096);
        self.stream.read_buf(&mut self.input).await
    }
}

/// The request in the bytes that Magento itself would write, as far as it would. `own` are the fields by which the node
/// knows us; what a sender wrote under their names is dropped.
fn write_request(out: &mut Vec<u8>, ban: &Ban, own: &[(String, String)]) {
    let mut push = |parts: &[&str]| parts.iter().for_each(|part| out.extend_from_slice(part.as_bytes()));
    let soft_header = |soft: bool| if soft { "X-Magento-Purge-Soft: 1\r\n" } else { "" };
    match ban {
        Ban::Tags { pattern, soft } => {
            push(&["PURGE / HTTP/1.1\r\nX-Magento-Tags-Pattern: ", pattern, "\r\n", soft_header(*soft)]);
            push(&["Host: clearcoat\r\n"]);
        }
        Ban::Keys { keys, soft } => {
            let header = if *soft { "xkey-softpurge: " } else { "xkey-purge: " };
            push(&["PURGE / HTTP/1.1\r\n", header, keys, "\r\nHost: clearcoat\r\n"]);
        }
        Ban::Pool { pattern, soft } => {
            push(&["PURGE / HTTP/1.1\r\nX-Pool: ", pattern, "\r\n", soft_header(*soft), "Host: clearcoat\r\n"]);
        }
        // Our own VCL takes the third header as "all there is"; others know the first two.
        Ban::Everything => push(&[
            "PURGE / HTTP/1.1\r\nX-Magento-Tags-Pattern: .*\r\nX-Pool: .*\r\n",
            "X-Clearcoat-Flush: all\r\nHost: clearcoat\r\n",
        ]),
        Ban::Forward(Forward { method, target, headers }) => {
            // A request without a host was one of HTTP/1.0, and only as such a Varnish takes it.
            let has_host = headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host"));
            let version = if has_host { " HTTP/1.1\r\n" } else { " HTTP/1.0\r\nConnection: keep-alive\r\n" };
            push(&[method, " ", target, version]);
            let is_own = |name: &str| own.iter().any(|(mine, _)| mine.eq_ignore_ascii_case(name));
            let kept = headers.iter().filter(|(name, _)| !is_own(name));
            kept.for_each(|(name, value)| push(&[name, ": ", value, "\r\n"]));
        }
    }
    own.iter().for_each(|(name, value)| push(&[name, ": ", value, "\r\n"]));
    push(&["\r\n"]);
}

/// The number in `{"invalidated": N}`, as VCLs that purge by key answer.
fn invalidated(body: &[u8]) -> Option<u64> {
    #[derive(serde::Deserialize)]
    struct Answer {
        invalidated: u64,
    }
    serde_json::from_slice::<Answer>(body).ok().map(|answer| answer.invalidated)
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// A scripted node (a fake: what it says is the test's): answers the bytes of each script on a connection of its
    /// own, once it has read as many requests as given, and returns what it read.
    async fn node(scripts: Vec<(usize, &'static str)>) -> (SocketAddr, tokio::task::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut seen = Vec::new();
            for (requests, answer) in scripts {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut input = Vec::new();
                while String::from_utf8_lossy(&input).matches("\r\n\r\n").count() < requests {
                    assert_ne!(stream.read_buf(&mut input).await.unwrap(), 0);
                }
                stream.write_all(answer.as_bytes()).await.unwrap();
                seen.push(String::from_utf8(input).unwrap());
            }
            seen
        });
        (address, task)
    }

    fn tags(pattern: &str) -> Ban {
        Ban::Tags { pattern: pattern.into(), soft: false }
    }

    fn keys(keys: &str, soft: bool) -> Ban {
        Ban::Keys { keys: keys.into(), soft }
    }

    const OK: &str = "HTTP/1.1 200 Purged\r\nContent-Length: 0\r\n\r\n";

    #[tokio::test]
    async fn a_batch_is_pipelined_and_every_answer_counts() {
        let answers = "HTTP/1.1 200 Purged\r\nContent-Length: 21\r\n\r\n{ \"invalidated\": 17 }HTTP/1.1 200 Purged\r\n\
                       Transfer-Encoding: chunked\r\n\r\n11\r\n{\"invalidated\":3}\r\n0\r\n\r\n";
        let (address, node) = node(vec![(2, answers)]).await;
        let mut link = Link::new(address, SendProxy::Off, Duration::from_secs(5));
        let delivered = link.deliver(&[tags("a"), Ban::Everything]).await.unwrap();
        assert_eq!(delivered, Delivered { invalidated: 20, refused: vec![], partial_flush: true });
        let seen = node.await.unwrap();
        assert_eq!(
            seen[0],
            "PURGE / HTTP/1.1\r\nX-Magento-Tags-Pattern: a\r\nHost: clearcoat\r\n\r\nPURGE / HTTP/1.1\r\n\
             X-Magento-Tags-Pattern: .*\r\nX-Pool: .*\r\nX-Clearcoat-Flush: all\r\nHost: clearcoat\r\n\r\n"
        );
    }

    #[tokio::test]
    async fn a_node_has_dropped_everything_where_it_shows_that_it_knows_how() {
        for (field, partial) in [
            ("X-Clearcoat-Flushed: all", false),
            ("x-clearcoat-flushed: all", false),
            ("X-Clearcoat-Flushed: tags", true),
        ] {
            let answer = format!("HTTP/1.1 200 Purged\r\n{field}\r\nContent-Length: 0\r\n\r\n");
            let (address, _node) = node(vec![(1, answer.leak())]).await;
            let mut link = Link::new(address, SendProxy::Off, Duration::from_secs(5));
            let delivered = link.deliver(&[Ban::Everything]).await.unwrap();
            assert_eq!(delivered.partial_flush, partial, "{field}");
        }
    }

    #[tokio::test]
    async fn keys_are_sent_in_the_headers_of_vmod_xkey_and_the_answers_counted() {
        let answers = "HTTP/1.1 200 Purged\r\nContent-Length: 17\r\n\r\n{\"invalidated\":4}HTTP/1.1 200 Purged\r\n\
                       Content-Length: 17\r\n\r\n{\"invalidated\":2}";
        let (address, node) = node(vec![(2, answers)]).await;
        let mut link = Link::new(address, SendProxy::Off, Duration::from_secs(5));
        let bans = [keys("a b", false), keys("c", true)];
        assert_eq!(link.deliver(&bans).await.unwrap(), Delivered { invalidated: 6, ..Delivered::default() });
        assert_eq!(
            node.await.unwrap()[0],
            "PURGE / HTTP/1.1\r\nxkey-purge: a b\r\nHost: clearcoat\r\n\r\n\
             PURGE / HTTP/1.1\r\nxkey-softpurge: c\r\nHost: clearcoat\r\n\r\n"
        );
    }

    #[tokio::test]
    async fn a_node_that_cannot_say_how_many_pages_keys_dropped_has_not_dropped_them() {
        let (address, _node) = node(vec![(1, OK)]).await;
        let mut link = Link::new(address, SendProxy::Off, Duration::from_secs(5));
        let error = link.deliver(&[keys("a", false)]).await.unwrap_err();
        assert!(matches!(error, DeliveryError::Refused { status: 200 }), "{error}");
        assert!(error.to_string().contains("delivery"), "{error}");
    }

    #[tokio::test]
    async fn a_kept_connection_that_was_closed_is_replaced_at_once() {
        let (address, node) = node(vec![(1, OK), (1, OK)]).await;
        let mut link = Link::new(address, SendProxy::Off, Duration::from_secs(5));
        link.deliver(&[tags("a")]).await.unwrap();
        link.deliver(&[tags("b")]).await.unwrap();
        assert_eq!(node.await.unwrap().len(), 2);
    }

    #[tokio::test]
    async fn a_refusal_names_what_to_change_and_a_failure_does_not() {
        for (answer, expected) in [
            ("HTTP/1.1 405 Not Allowed\r\nContent-Length: 0\r\n\r\n", "acl purge"),
            ("HTTP/1.1 400 Bad\r\nContent-Length: 0\r\n\r\n", "X-Magento-Tags-Pattern"),
            ("HTTP/1.1 503 Down\r\nContent-Length: 0\r\n\r\n", "answered 503"),
            ("HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "malformed"),
        ] {
            let (address, _node) = node(vec![(1, answer)]).await;
            let error =
                Link::new(address, SendProxy::Off, Duration::from_secs(5)).deliver(&[tags("a")]).await.unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[tokio::test]
    async fn a_refused_url_is_the_fault_of_the_request() {
        let forward = Forward { method: "PURGE".into(), target: "/x".into(), headers: vec![] };
        let (address, _node) = node(vec![(1, "HTTP/1.1 400 Bad\r\nContent-Length: 0\r\n\r\n")]).await;
        let mut link = Link::new(address, SendProxy::Off, Duration::from_secs(5));
        let delivered = link.deliver(&[Ban::Forward(forward.clone())]).await.unwrap();
        assert_eq!(delivered.refused, [(forward, 400)]);
    }

    #[tokio::test]
    async fn a_url_that_the_node_does_not_hold_is_gone() {
        let forward = Forward { method: "PURGE".into(), target: "/x".into(), headers: vec![] };
        for status in ["404 Not in cache", "410 Gone"] {
            let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
            let (address, node) = node(vec![(1, answer.leak())]).await;
            let mut link = Link::new(address, SendProxy::Off, Duration::from_secs(5));
            assert_eq!(link.deliver(&[Ban::Forward(forward.clone())]).await.unwrap(), Delivered::default());
            // It came without a host, and goes so.
            assert_eq!(node.await.unwrap(), ["PURGE /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"]);
        }
        // Of tags that is no answer: nobody asked for a page.
        let (address, _node) = node(vec![(1, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")]).await;
        let error = Link::new(address, SendProxy::Off, Duration::from_secs(5)).deliver(&[tags("a")]).await.unwrap_err();
        assert!(matches!(error, DeliveryError::Refused { status: 404 }), "{error}");
    }

    #[tokio::test]
    async fn a_node_that_never_answers_costs_the_timeout_and_no_more() {
        let (address, _node) = node(vec![(2, "")]).await;
        let error =
            Link::new(address, SendProxy::Off, Duration::from_millis(50)).deliver(&[tags("a")]).await.unwrap_err();
        assert!(matches!(error, DeliveryError::Timeout(_)), "{error}");
    }
}
