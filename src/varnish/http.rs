//! Bans as `PURGE` requests, pipelined over one connection that is kept.
//!
//! Varnish answers requests of one connection in their order (RFC 9112 section 9.3.2), so a batch costs one round
//! trip however many bans it has. The status of every answer is looked at, which Magento never does: a node that says
//! anything but 2xx has not dropped the page.
//!
//! What was answered stays answered: whatever ends a round trip early, the caller knows which requests came through.
//! And a request that is not answered is told from a node that does not answer: after a short patience the node is asked
//! on another connection whether it would obey a purge ([`PurgeEndpoint::obeys`]). One that would has its reasons not to answer
//! this request; one that does not answer that either hangs.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::config::{self, HeaderError};
use crate::files::is_ours;
use crate::fleet::{FaultKind, SecretHeaders, SendProxy, VarnishSettings};
use crate::http1::{BadChunk, BadHead, ChunkedDecoder, Framing, HeadLimits, HeadScan, Method, ResponseHead};
use crate::proxy_protocol;
use crate::purge::{Ban, Forward, PROBE_PATH, what_to_change, would_obey};

/// The most requests that may be on their way at once. Far below what the socket buffers hold in answers, so that
/// neither side can block the other.
pub const PIPELINE: usize = 32;

/// The largest head that an answer to a purge may have, and its largest body in bytes.
const HEAD_LIMITS: HeadLimits = HeadLimits { bytes: 16 * 1024, fields: 100 };
const MAX_BODY: usize = 64 * 1024;

/// What our own VCL answers to `X-Clearcoat-Flush: all`, with the value `all`. A VCL that does not know the flush answers
/// the pattern or the pool beside it and says 200 all the same.
const FLUSHED: &[u8] = b"x-clearcoat-flushed";

/// Where a Varnish takes purges.
#[derive(Clone, Debug)]
pub struct PurgeEndpoint {
    address: SocketAddr,
    send_proxy: SendProxy,
    headers: SecretHeaders,
    timeout: Duration,
}

/// The connection to one Varnish.
#[derive(Debug)]
pub struct PurgeClient {
    target: PurgeEndpoint,
    connection: Option<PurgeConnection>,
}

#[derive(Debug)]
struct PurgeConnection {
    stream: TcpStream,
    input: Vec<u8>,
    head: ResponseHead,
    /// The last answer said that a flush dropped everything.
    flushed_all: bool,
}

/// The result of one purge request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The node carried it out.
    Done {
        /// The objects it says it dropped. Only a VCL that purges by key knows the number; a ban does not.
        invalidated: u64,
        /// It says that pages without tags and without a pool were dropped, too.
        flushed_all: bool,
    },
    /// The node refused or failed.
    Failed {
        /// The status of its answer. A 2xx of a VCL that does not say how many pages a key dropped is none that counts.
        status: u16,
    },
}

/// Why a purge was not delivered.
#[derive(Debug, thiserror::Error)]
pub enum DeliveryError {
    /// What its VCL knows us by is not to be had.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// No connection.
    #[error("connecting failed")]
    Connect(#[source] io::Error),
    /// The connection broke.
    #[error("the connection broke")]
    Io(#[from] io::Error),
    /// No answer in time, to anything.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// No answer in time, from a node that answers others.
    #[error("no answer within {0:?}, though the node answers other requests")]
    Unanswered(Duration),
    /// The answer is not HTTP.
    #[error("the answer is malformed")]
    Malformed(#[from] BadHead),
    /// The body of the answer is not HTTP.
    #[error("the answer is malformed")]
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

impl DeliveryError {
    /// Its kind.
    pub fn kind(&self) -> FaultKind {
        match self {
            DeliveryError::Header(_) => FaultKind::OurSettings,
            DeliveryError::Connect(error) | DeliveryError::Io(error) if is_ours(error) => FaultKind::OurShortage,
            DeliveryError::Connect(error) | DeliveryError::Io(error) => FaultKind::of_connection(error),
            DeliveryError::Timeout(_) => FaultKind::Silent,
            DeliveryError::Unanswered(_) => FaultKind::SilentToPurges,
            DeliveryError::Malformed(_) | DeliveryError::MalformedBody(_) | DeliveryError::Endless => {
                FaultKind::Malformed
            }
            DeliveryError::Refused { .. } => FaultKind::Refuses,
            DeliveryError::Failed { .. } => FaultKind::Fails,
        }
    }

    /// A node that answers anything with this status.
    pub fn of_status(status: u16) -> Self {
        if status >= 500 { DeliveryError::Failed { status } } else { DeliveryError::Refused { status } }
    }
}

impl PurgeEndpoint {
    /// Asks the node, on a connection of its own, whether it would obey a purge: the question of the health check, which
    /// drops nothing.
    ///
    /// # Errors
    /// [`DeliveryError`]: it would not, or did not say.
    pub async fn obeys(&self) -> Result<(), DeliveryError> {
        let own = self.bounded(config::reveal(&self.headers)).await??;
        let mut connection = self.connect().await?;
        let mut request = format!("PURGE {PROBE_PATH} HTTP/1.1\r\nHost: clearcoat\r\nConnection: close\r\n");
        own.iter().for_each(|(name, value)| request.extend([name, ": ", value, "\r\n"]));
        request.push_str("\r\n");
        self.bounded(connection.stream.write_all(request.as_bytes())).await??;
        self.bounded(connection.answer()).await??;
        let status = connection.head.status;
        if would_obey(status) { Ok(()) } else { Err(DeliveryError::of_status(status)) }
    }

    async fn connect(&self) -> Result<PurgeConnection, DeliveryError> {
        let mut stream = self.bounded(TcpStream::connect(self.address)).await?.map_err(DeliveryError::Connect)?;
        stream.set_nodelay(true).map_err(DeliveryError::Connect)?;
        if self.send_proxy == SendProxy::V2 {
            // A purge is our own word: the node is to compare our address with its ACL.
            let mut header = Vec::new();
            proxy_protocol::write_v2_local(&mut header);
            self.bounded(stream.write_all(&header)).await?.map_err(DeliveryError::Connect)?;
        }
        Ok(PurgeConnection { stream, input: Vec::new(), head: ResponseHead::default(), flushed_all: false })
    }

    async fn bounded<T>(&self, step: impl Future<Output = T>) -> Result<T, DeliveryError> {
        tokio::time::timeout(self.timeout, step).await.map_err(|_| DeliveryError::Timeout(self.timeout))
    }

    /// The next answer, for which one waits `patience` before the node is asked whether it answers anything.
    async fn await_answer(
        &self,
        connection: &mut PurgeConnection,
        patience: Duration,
    ) -> Result<Vec<u8>, DeliveryError> {
        let mut answer = std::pin::pin!(connection.answer());
        if let Ok(answered) = tokio::time::timeout(patience.min(self.timeout), answer.as_mut()).await {
            return answered;
        }
        tokio::select! {
            biased;
            answered = answer.as_mut() => return answered,
            obeyed = self.obeys() => if obeyed.is_ok() {
                return Err(DeliveryError::Unanswered(patience));
            },
        }
        self.bounded(answer).await?
    }
}

/// The answer to a request of our own.
#[derive(Debug)]
pub struct OwnPage {
    /// The status code.
    pub status: u16,
    /// The value of `X-Clearcoat-Seal`, if there is one.
    pub seal: Option<Vec<u8>>,
    /// The body.
    pub body: Vec<u8>,
}

impl PurgeClient {
    /// A link to this node that is not connected yet. Its purges carry what its VCL knows purgers by. `timeout` bounds
    /// connecting, writing, and each answer.
    pub fn to(address: SocketAddr, settings: &VarnishSettings, timeout: Duration) -> Self {
        let VarnishSettings { send_proxy, ref headers, .. } = *settings;
        PurgeClient {
            target: PurgeEndpoint { address, send_proxy, headers: headers.clone(), timeout },
            connection: None,
        }
    }

    /// Where it leads.
    pub fn target(&self) -> &PurgeEndpoint {
        &self.target
    }

    /// Connects if there is no connection.
    ///
    /// # Errors
    /// [`DeliveryError`]: there is none.
    pub async fn connect(&mut self) -> Result<(), DeliveryError> {
        if self.connection.is_none() {
            self.connection = Some(self.target.connect().await?);
        }
        Ok(())
    }

    /// Sends requests and reads their answers, of which `answers` gets one for each request in its order, as far as they
    /// came: if the node closed the connection after an answer, there may be fewer, and that is no error. A kept
    /// connection may have been closed meanwhile; bans are idempotent, so that is tried once more on a new one at once.
    ///
    /// # Errors
    /// [`DeliveryError`] of the first request without an answer.
    pub async fn round_trip(
        &mut self,
        bans: &[&Ban],
        patience: Duration,
        answers: &mut Vec<Answer>,
    ) -> Result<(), DeliveryError> {
        answers.clear();
        if let Some(kept) = self.connection.take() {
            match self.try_round_trip(kept, bans, patience, answers).await {
                Err(DeliveryError::Io(_)) if answers.is_empty() => {}
                result => return result,
            }
        }
        let connection = self.target.connect().await?;
        self.try_round_trip(connection, bans, patience, answers).await
    }

    /// Sends one request of our own, whole, and gives its answer. A kept connection may have
    /// been closed meanwhile, as with [`PurgeClient::round_trip`].
    ///
    /// # Errors
    /// [`DeliveryError`]; no status is one.
    pub async fn ask(&mut self, request: &[u8]) -> Result<OwnPage, DeliveryError> {
        if let Some(kept) = self.connection.take() {
            match self.try_ask(kept, request).await {
                Err(DeliveryError::Io(_)) => {}
                result => return result,
            }
        }
        let connection = self.target.connect().await?;
        self.try_ask(connection, request).await
    }

    async fn try_ask(&mut self, mut connection: PurgeConnection, request: &[u8]) -> Result<OwnPage, DeliveryError> {
        let exchange = async {
            connection.stream.write_all(request).await?;
            connection.answer().await
        };
        let body = self.target.bounded(exchange).await??;
        let (status, seal) = (connection.head.status, connection.head.seal().map(<[u8]>::to_vec));
        if connection.head.keep_alive && connection.input.is_empty() {
            self.connection = Some(connection);
        }
        Ok(OwnPage { status, seal, body })
    }

    async fn try_round_trip(
        &mut self,
        mut connection: PurgeConnection,
        bans: &[&Ban],
        patience: Duration,
        answers: &mut Vec<Answer>,
    ) -> Result<(), DeliveryError> {
        let own = self.target.bounded(config::reveal(&self.target.headers)).await??;
        let mut requests = Vec::new();
        bans.iter().for_each(|ban| write_request(&mut requests, ban, &own));
        self.target.bounded(connection.stream.write_all(&requests)).await??;
        for ban in bans {
            let body = match self.target.await_answer(&mut connection, patience).await {
                Ok(body) => body,
                // A node that closes after each answer need not announce it.
                Err(DeliveryError::Io(_)) if !answers.is_empty() => return Ok(()),
                Err(error) => return Err(error),
            };
            answers.push(connection.judge(ban, &body));
            if !connection.head.keep_alive {
                return Ok(());
            }
        }
        if connection.input.is_empty() {
            self.connection = Some(connection);
        }
        Ok(())
    }
}

impl PurgeConnection {
    /// What an answer says about this request.
    fn judge(&self, ban: &Ban, body: &[u8]) -> Answer {
        let flushed_all = self.flushed_all;
        match (self.head.status, invalidated(body), ban) {
            // A VCL that knows nothing of keys may take this for a purge of the URL `/` and say that it is done.
            (status @ 200..=299, None, Ban::Keys { .. }) => Answer::Failed { status },
            (200..=299, count, _) => Answer::Done { invalidated: count.unwrap_or(0), flushed_all },
            // A page that was not there need not go. (The VCLs of Varnish's own tutorials answer so.)
            (404 | 410, _, Ban::Forward(_)) => Answer::Done { invalidated: 0, flushed_all },
            (status, ..) => Answer::Failed { status },
        }
    }

    async fn answer(&mut self) -> Result<Vec<u8>, DeliveryError> {
        let mut scan = HeadScan::default();
        let len = loop {
            if let Some(len) = self.head.read(&self.input, Method::Other, &mut scan, HEAD_LIMITS)? {
                break len;
            }
            self.read_more().await?;
        };
        let says_so = |(name, value): (&[u8], &[u8])| name.eq_ignore_ascii_case(FLUSHED) && value == b"all";
        self.flushed_all = self.head.kept_fields().any(says_so);
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
    struct InvalidatedBody {
        invalidated: u64,
    }
    serde_json::from_slice::<InvalidatedBody>(body).ok().map(|answer| answer.invalidated)
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

    /// A client of this address.
    async fn sent(link: &mut PurgeClient, bans: &[Ban]) -> (Vec<Answer>, Result<(), DeliveryError>) {
        let (bans, mut answers) = (bans.iter().collect::<Vec<_>>(), Vec::new());
        let result = link.round_trip(&bans, Duration::from_secs(5), &mut answers).await;
        (answers, result)
    }

    fn link(address: SocketAddr, timeout: Duration) -> PurgeClient {
        PurgeClient::to(address, &VarnishSettings::default(), timeout)
    }

    fn patient(address: SocketAddr) -> PurgeClient {
        link(address, Duration::from_secs(5))
    }

    fn done(invalidated: u64) -> Answer {
        Answer::Done { invalidated, flushed_all: false }
    }

    fn forward(target: &str) -> Ban {
        Ban::Forward(Forward { method: "PURGE".into(), target: target.into(), headers: vec![] })
    }

    #[tokio::test]
    async fn a_batch_is_pipelined_and_every_answer_counts() {
        let answers = "HTTP/1.1 200 Purged\r\nContent-Length: 21\r\n\r\n{ \"invalidated\": 17 }HTTP/1.1 200 Purged\r\n\
                       Transfer-Encoding: chunked\r\n\r\n11\r\n{\"invalidated\":3}\r\n0\r\n\r\n";
        let (address, node) = node(vec![(2, answers)]).await;
        let (answers, result) = sent(&mut patient(address), &[tags("a"), Ban::Everything]).await;
        result.unwrap();
        assert_eq!(answers, [done(17), done(3)]);
        let seen = node.await.unwrap();
        assert_eq!(
            seen[0],
            "PURGE / HTTP/1.1\r\nX-Magento-Tags-Pattern: a\r\nHost: clearcoat\r\n\r\nPURGE / HTTP/1.1\r\n\
             X-Magento-Tags-Pattern: .*\r\nX-Pool: .*\r\nX-Clearcoat-Flush: all\r\nHost: clearcoat\r\n\r\n"
        );
    }

    #[tokio::test]
    async fn a_node_has_dropped_everything_where_it_shows_that_it_knows_how() {
        for (field, flushed_all) in [
            ("X-Clearcoat-Flushed: all", true),
            ("x-clearcoat-flushed: all", true),
            ("X-Clearcoat-Flushed: tags", false),
            ("X-Other: all", false),
        ] {
            let answer = format!("HTTP/1.1 200 Purged\r\n{field}\r\nContent-Length: 0\r\n\r\n");
            let (address, _node) = node(vec![(1, answer.leak())]).await;
            let (answers, _) = sent(&mut patient(address), &[Ban::Everything]).await;
            assert_eq!(answers, [Answer::Done { invalidated: 0, flushed_all }], "{field}");
        }
    }

    #[tokio::test]
    async fn keys_are_sent_in_the_headers_of_vmod_xkey_and_the_answers_counted() {
        let answers = "HTTP/1.1 200 Purged\r\nContent-Length: 17\r\n\r\n{\"invalidated\":4}HTTP/1.1 200 Purged\r\n\
                       Content-Length: 17\r\n\r\n{\"invalidated\":2}";
        let (address, node) = node(vec![(2, answers)]).await;
        let (answers, _) = sent(&mut patient(address), &[keys("a b", false), keys("c", true)]).await;
        assert_eq!(answers, [done(4), done(2)]);
        assert_eq!(
            node.await.unwrap()[0],
            "PURGE / HTTP/1.1\r\nxkey-purge: a b\r\nHost: clearcoat\r\n\r\n\
             PURGE / HTTP/1.1\r\nxkey-softpurge: c\r\nHost: clearcoat\r\n\r\n"
        );
    }

    #[tokio::test]
    async fn a_node_that_cannot_count_what_keys_dropped_has_not_dropped_it() {
        let (address, _node) = node(vec![(1, OK)]).await;
        let (answers, _) = sent(&mut patient(address), &[keys("a", false)]).await;
        assert_eq!(answers, [Answer::Failed { status: 200 }]);
        let error = DeliveryError::of_status(200).to_string();
        assert!(error.contains("delivery"), "{error}");
    }

    #[tokio::test]
    async fn a_kept_connection_that_was_closed_is_replaced_at_once() {
        let (address, node) = node(vec![(1, OK), (1, OK)]).await;
        let mut link = patient(address);
        assert_eq!(sent(&mut link, &[tags("a")]).await.0, [done(0)]);
        assert_eq!(sent(&mut link, &[tags("b")]).await.0, [done(0)]);
        assert_eq!(node.await.unwrap().len(), 2);
    }

    #[tokio::test]
    async fn what_was_answered_before_the_connection_ended_was_answered() {
        let closing = "HTTP/1.1 200 Purged\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        for script in [closing, OK] {
            let (address, _node) = node(vec![(3, script)]).await;
            let (answers, result) = sent(&mut patient(address), &[tags("a"), tags("b"), tags("c")]).await;
            assert_eq!(answers, [done(0)]);
            result.unwrap();
        }
    }

    #[tokio::test]
    async fn a_refusal_names_what_to_change_and_a_failure_does_not() {
        for (status, expected) in [(405, "acl purge"), (400, "X-Magento-Tags-Pattern"), (503, "answered 503")] {
            let error = DeliveryError::of_status(status).to_string();
            assert!(error.contains(expected), "{error}");
        }
        let (address, _node) = node(vec![(1, "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n")]).await;
        let error = sent(&mut patient(address), &[tags("a")]).await.1.unwrap_err();
        assert!(matches!(error, DeliveryError::Malformed(_)), "{error}");
    }

    #[tokio::test]
    async fn a_page_that_was_not_there_is_gone() {
        let answers = "HTTP/1.1 404 Not in cache\r\nContent-Length: 0\r\n\r\n\
                       HTTP/1.1 404 Not in cache\r\nContent-Length: 0\r\n\r\n";
        let (address, _node) = node(vec![(2, answers)]).await;
        let (answers, _) = sent(&mut patient(address), &[forward("/x"), tags("a")]).await;
        assert_eq!(answers, [done(0), Answer::Failed { status: 404 }]);
    }

    #[tokio::test]
    async fn a_request_that_came_without_a_host_goes_without_one() {
        let (address, node) = node(vec![(1, "HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n")]).await;
        assert_eq!(sent(&mut patient(address), &[forward("/x")]).await.0, [done(0)]);
        assert_eq!(node.await.unwrap(), ["PURGE /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"]);
    }

    #[tokio::test]
    async fn a_node_that_never_answers_costs_the_timeout_and_no_more() {
        let (address, _node) = node(vec![(2, "")]).await;
        let error = sent(&mut link(address, Duration::from_millis(50)), &[tags("a")]).await.1.unwrap_err();
        assert!(matches!(error, DeliveryError::Timeout(_)), "{error}");
    }

    #[tokio::test]
    async fn a_request_without_an_answer_is_told_from_a_node_without_one() {
        let obeys = "HTTP/1.1 400 Nothing to purge\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (silent, _) = listener.accept().await.unwrap();
            let (mut second, _) = listener.accept().await.unwrap();
            second.write_all(obeys.as_bytes()).await.unwrap();
            std::future::pending::<()>().await;
            drop(silent);
        });
        let mut link = link(address, Duration::from_secs(60));
        let (bans, mut answers) = ([&forward("/x")], Vec::new());
        let error = link.round_trip(&bans, Duration::from_millis(20), &mut answers).await.unwrap_err();
        assert!(matches!(error, DeliveryError::Unanswered(_)), "{error}");
    }
}
