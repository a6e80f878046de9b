//! Health checks: one task a node, whatever the number of workers.
//!
//! A web node is asked for its health page. A Varnish is sent a `PURGE` without a pattern: Magento's VCL answers 400 to
//! an address that may purge and 405 to any other, without any side effect, so the check also proves that purges will
//! be accepted ([`would_obey`]).
//!
//! A Varnish that leaves a PURGE unanswered hangs, or its VCL alone does (it hands purges on to a backend, say). The two are
//! told apart by a request that varnishd refuses before any VCL sees it ([`ANSWERED_WITHOUT_VCL`]). It is asked on a
//! connection of its own when half of the timeout is over, so no check takes longer for it.
//!
//! A check of a web node may want a text in its answer: a page that says "maintenance" with status 200 is no health. The answer
//! is read until the text is found, and no further than [`LONGEST_ANSWER`].
//!
//! The first check is at once. A result that differs from the one before is confirmed soon, as with HAProxy's `fastinter`: a
//! dead node is noticed within little more than one interval, and one that is well again serves a moment after its first pass,
//! while a lost packet does not take a node out. A failed request also triggers a check
//! ([`Probe::check_now`]). A check that this machine could not carry out, because it is out of files or ports, says
//! nothing about the node ([`Verdict::NotAsked`]).

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};

use crate::config::{HeaderError, HealthChecks, VarnishChecks, WebChecks, reveal};
use crate::files::{is_ours, is_shortage};
use crate::fleet::{
    CheckResult, Event, FaultKind, Health, HealthState, NodeFault, NodeId, NodeSpec, Role, SendProxy, Thresholds,
    VarnishSettings, Verdict,
};
use crate::http_client::HttpConnection;
use crate::proxy_protocol;
use crate::purge::{PROBE_PATH, what_to_change, would_obey};
use crate::telemetry::causes;

/// The shortest time between two checks of one node, so that failing requests cannot cause a storm of checks.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);

/// A result is confirmed after the interval divided by this.
const CONFIRM: u32 = 10;

/// How much of an answer is searched for the expected text.
const LONGEST_ANSWER: usize = 64 * 1024;

/// Answered 400 by varnishd itself: a second `Host` is malformed (RFC 9112 section 3.2; Varnish 4 to 8,
/// `HTTP1_DissectRequest`).
const ANSWERED_WITHOUT_VCL: &[u8] =
    b"GET / HTTP/1.1\r\nHost: clearcoat\r\nHost: clearcoat\r\nConnection: close\r\n\r\n";

/// The checker of one node.
#[derive(Clone, Debug)]
pub struct Probe {
    role: Role,
    id: NodeId,
    target: SocketAddr,
    schedule: Schedule,
    kind: ProbeKind,
    wake: Arc<Notify>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Schedule {
    interval: Duration,
    /// Of a node that is down.
    interval_down: Duration,
    timeout: Duration,
    thresholds: Thresholds,
    jitter: f64,
}

#[derive(Clone, Debug, PartialEq)]
enum ProbeKind {
    Web { path: String, host: String, expect: Vec<u16>, expect_body: Option<String> },
    Varnish(VarnishSettings),
}

/// Why a check could not be carried out.
#[derive(Debug, thiserror::Error)]
enum CheckError {
    #[error("connecting failed")]
    Connect(#[source] std::io::Error),
    #[error("the connection broke")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error(transparent)]
    Http(#[from] hyper::Error),
    #[error("the check cannot be written as a request")]
    Request(#[from] http::Error),
}

impl Probe {
    /// A checker for this node, as configured for its role.
    pub fn new(node: &NodeSpec, config: &HealthChecks) -> Self {
        let (schedule, kind) = match &node.varnish {
            None => {
                let WebChecks {
                    path,
                    interval,
                    interval_down,
                    timeout,
                    rise,
                    fall,
                    jitter,
                    expect,
                    expect_body,
                    host,
                    ..
                } = config.web.clone();
                let host = host.unwrap_or_else(|| node.address.to_string());
                let thresholds = Thresholds { rise, fall };
                let schedule = Schedule { interval, interval_down, timeout, thresholds, jitter };
                (schedule, ProbeKind::Web { path, host, expect, expect_body })
            }
            Some(settings) => {
                let VarnishChecks { interval, interval_down, timeout, rise, fall, jitter, .. } = config.varnish;
                let thresholds = Thresholds { rise, fall };
                let schedule = Schedule { interval, interval_down, timeout, thresholds, jitter };
                (schedule, ProbeKind::Varnish(settings.clone()))
            }
        };
        let (role, id) = (node.role(), node.id.clone());
        Probe { role, id, target: node.address, schedule, kind, wake: Arc::default() }
    }

    /// Requests a check before the next regular one.
    pub fn check_now(&self) {
        self.wake.notify_one();
    }

    /// Checks the node once, within the timeout of its checks.
    pub async fn once(&self) -> Verdict {
        self.check(&mut Instant::now()).await
    }

    /// Whether it asks the same in the same way, as often.
    pub fn is_as(&self, other: &Probe) -> bool {
        (self.target, self.schedule, &self.kind) == (other.target, other.schedule, &other.kind)
    }

    /// Checks the node with this endpoint until the receiver of the events is dropped. `health` is what is known of it.
    ///
    /// A node of unknown health is checked at once, and then with a phase of its own, as are all others. Checkers that begin
    /// together, at a start or a reload, would otherwise ask all nodes in one moment, again and again, and a check of Magento asks
    /// its database.
    pub async fn run(self, endpoint_id: u64, mut health: HealthState, events: mpsc::Sender<Event>) {
        if health.health() != Health::Unknown {
            self.pause(self.schedule.pause_at(&health).mul_f64(fastrand::f64())).await;
        }
        let mut phase = fastrand::f64();
        loop {
            let mut began = Instant::now();
            let verdict = self.check(&mut began).await;
            if let Some(passed) = verdict.passed() {
                health.record(passed, self.schedule.thresholds);
            }
            let (role, id) = (self.role, self.id.clone());
            let check = CheckResult { role, id, endpoint_id, began, took: began.elapsed(), verdict };
            if events.send(Event::Checked(check)).await.is_err() {
                return;
            }
            let spread = 1.0 + self.schedule.jitter * (2.0 * fastrand::f64() - 1.0);
            let pause = self.schedule.pause_at(&health).mul_f64(std::mem::replace(&mut phase, 1.0));
            self.pause(pause.mul_f64(spread)).await;
        }
    }

    /// Waits for so long, or until somebody asks for a check.
    async fn pause(&self, pause: Duration) {
        tokio::time::sleep(SHORTEST_PAUSE).await;
        // The outcome does not matter: a check follows.
        _ = tokio::time::timeout(pause.saturating_sub(SHORTEST_PAUSE), self.wake.notified()).await;
    }

    /// Runs one check. `asked` is set to the time at which the request was sent on an established connection.
    async fn check(&self, asked: &mut Instant) -> Verdict {
        let patience = self.schedule.timeout;
        let answered = async {
            let mut ask = pin!(self.ask(asked));
            if let Ok(answered) = tokio::time::timeout(patience / 2, ask.as_mut()).await {
                return Ok(answered);
            }
            let mut is_answered_otherwise = false;
            let both = async {
                tokio::select! {
                    biased;
                    answered = ask.as_mut() => return answered,
                    answers = self.answers_without_vcl() => is_answered_otherwise = answers,
                }
                ask.await
            };
            tokio::time::timeout(patience / 2, both).await.map_err(|_| is_answered_otherwise)
        };
        match answered.await {
            Err(true) => Verdict::Failed(NodeFault::new(
                FaultKind::SilentToPurges,
                format!("no answer to a PURGE within {patience:?}, though varnishd answers other requests"),
            )),
            Err(false) => Verdict::Failed(NodeFault::new(FaultKind::Silent, format!("no answer within {patience:?}"))),
            Ok(Err(CheckError::Connect(error) | CheckError::Io(error))) if is_ours(&error) => {
                Verdict::NotAsked(error.to_string())
            }
            Ok(Err(CheckError::Header(error))) if error.os_error.is_some_and(is_shortage_number) => {
                Verdict::NotAsked(error.to_string())
            }
            Ok(Err(error)) => Verdict::Failed(NodeFault::new(error.kind(), causes(&error).to_string())),
            Ok(Ok(answer)) => self.kind.judge(answer),
        }
    }

    /// Whether varnishd answers what it answers without its VCL; false of a web node.
    async fn answers_without_vcl(&self) -> bool {
        let ProbeKind::Varnish(settings) = &self.kind else { return false };
        let exchange = async {
            let mut stream = self.connect(settings.send_proxy).await?;
            stream.write_all(ANSWERED_WITHOUT_VCL).await?;
            Ok::<_, CheckError>(stream.read(&mut [0; 16]).await? > 0)
        };
        exchange.await.unwrap_or(false)
    }

    async fn connect(&self, send_proxy: SendProxy) -> Result<TcpStream, CheckError> {
        let mut stream = TcpStream::connect(self.target).await.map_err(CheckError::Connect)?;
        if send_proxy == SendProxy::V2 {
            let mut header = Vec::new();
            proxy_protocol::write_v2_local(&mut header);
            stream.write_all(&header).await?;
        }
        Ok(stream)
    }

    async fn ask(&self, asked: &mut Instant) -> Result<CheckAnswer, CheckError> {
        let (own, send_proxy) = match &self.kind {
            ProbeKind::Web { .. } => (Vec::new(), SendProxy::Off),
            ProbeKind::Varnish(settings) => (reveal(&settings.headers).await?, settings.send_proxy),
        };
        let stream = self.connect(send_proxy).await?;
        *asked = Instant::now();
        let mut connection = HttpConnection::over(stream).await?;
        let (method, path, host) = match &self.kind {
            ProbeKind::Web { path, host, .. } => ("GET", path.as_str(), host.as_str()),
            ProbeKind::Varnish(_) => ("PURGE", PROBE_PATH, "clearcoat"),
        };
        let mut request = http::Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, host)
            .header(http::header::USER_AGENT, concat!("clearcoat/", env!("CARGO_PKG_VERSION")))
            .header(http::header::CONNECTION, "close");
        for (name, value) in own {
            request = request.header(name, value);
        }
        let answer = connection.send(request.body(Full::default())?).await?;
        let status = answer.status().as_u16();
        let has_text = match &self.kind {
            ProbeKind::Web { expect, expect_body: Some(text), .. } if expect.contains(&status) => {
                has_text(answer.into_body(), text.as_bytes()).await?
            }
            ProbeKind::Web { .. } | ProbeKind::Varnish(_) => true,
        };
        Ok(CheckAnswer { status, has_text })
    }
}

/// What a check was answered.
#[derive(Clone, Copy, Debug)]
struct CheckAnswer {
    status: u16,
    /// The expected text is in it, or none is expected.
    has_text: bool,
}

/// Whether the first [`LONGEST_ANSWER`] bytes of a body have this text in them. Reads no further than that.
async fn has_text(mut body: Incoming, text: &[u8]) -> hyper::Result<bool> {
    let mut read = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        // What was there before has no whole one.
        let from = read.len().saturating_sub(text.len());
        read.extend_from_slice(&data[..data.len().min(LONGEST_ANSWER - read.len())]);
        if memchr::memmem::find(&read[from..], text).is_some() {
            return Ok(true);
        }
        if read.len() == LONGEST_ANSWER {
            break;
        }
    }
    Ok(false)
}

impl Schedule {
    /// The time until the next check of a node of this health: soon while results say that it may be another one.
    fn pause_at(&self, health: &HealthState) -> Duration {
        match health.health() {
            _ if health.is_in_doubt() => self.interval / CONFIRM,
            Health::Down if !self.interval_down.is_zero() => self.interval_down,
            Health::Up | Health::Down | Health::Unknown => self.interval,
        }
    }
}

/// Whether the error with this number says that files or memory are short.
fn is_shortage_number(error: i32) -> bool {
    is_shortage(&std::io::Error::from_raw_os_error(error))
}

impl CheckError {
    fn kind(&self) -> FaultKind {
        match self {
            CheckError::Connect(error) | CheckError::Io(error) => FaultKind::of_connection(error),
            CheckError::Header(_) | CheckError::Request(_) => FaultKind::OurSettings,
            CheckError::Http(error) if error.is_parse() => FaultKind::Malformed,
            CheckError::Http(_) => FaultKind::Disconnects,
        }
    }
}

impl ProbeKind {
    fn judge(&self, CheckAnswer { status, has_text }: CheckAnswer) -> Verdict {
        let words = match self {
            ProbeKind::Web { path, expect, .. } if expect.contains(&status) && !has_text => {
                let words = format!("{path} answered {status} without the text of health.web.expect_body");
                return Verdict::Failed(NodeFault::new(FaultKind::Refuses, words));
            }
            ProbeKind::Web { expect, .. } if expect.contains(&status) => return Verdict::Passed,
            ProbeKind::Web { path, .. } => format!("{path} answered {status}"),
            ProbeKind::Varnish(_) if would_obey(status) => return Verdict::Passed,
            ProbeKind::Varnish(_) if status >= 500 => format!("PURGE answered {status}"),
            ProbeKind::Varnish(_) => format!("PURGE answered {status} {}", what_to_change(status)),
        };
        Verdict::Failed(NodeFault::new(FaultKind::of_status(status), words))
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    fn kind_of(verdict: Verdict) -> FaultKind {
        let Verdict::Failed(fault) = verdict else { panic!("{verdict:?}") };
        assert!(!fault.text.is_empty());
        fault.kind
    }

    fn answered(status: u16) -> CheckAnswer {
        CheckAnswer { status, has_text: true }
    }

    /// The pauses in ms after each of these results: `+` passed, `-` failed.
    fn pauses(schedule: Schedule, results: &str) -> Vec<u128> {
        let mut health = HealthState::default();
        let after = |result| {
            health.record(result == '+', schedule.thresholds);
            schedule.pause_at(&health).as_millis()
        };
        results.chars().map(after).collect()
    }

    #[test]
    fn a_change_is_confirmed_soon_and_a_down_node_asked_at_its_own_interval() {
        let (ms, interval_down) = (Duration::from_millis, Duration::from_millis(200));
        let thresholds = Thresholds { rise: 2, fall: 3 };
        let schedule = Schedule { interval: ms(1000), interval_down, timeout: ms(100), thresholds, jitter: 0.0 };
        let expected = [1000, 1000, 100, 100, 200, 200, 100, 1000, 1000];
        assert_eq!(pauses(schedule, "++----+++"), expected);
        // One that flaps is asked soon after each change that might be one, and at no other time.
        assert_eq!(pauses(schedule, "+-+-+"), [1000, 100, 1000, 100, 1000]);
        assert_eq!(pauses(schedule, "-+-+-"), [200, 100, 200, 100, 200]);
        assert_eq!(pauses(Schedule { interval_down: Duration::ZERO, ..schedule }, "+---"), [1000, 100, 100, 1000]);
    }

    #[tokio::test]
    async fn a_web_node_is_well_when_its_answer_has_the_expected_text() {
        const CHUNKED: &[u8] =
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nall is\r\n5\r\n well\r\n0\r\n\r\n";
        let verdict = async |text: &str, address| {
            let mut config = HealthChecks::default();
            config.web.expect_body = Some(text.to_owned());
            let spec = NodeSpec::new(Role::Web, NodeId::try_from("a").unwrap(), address);
            Probe::new(&spec, &config).check(&mut Instant::now()).await
        };
        let address = node(&[("GET", CHUNKED)]).await;
        // Also where it is cut into pieces.
        for text in ["all is well", "is w", "well", "a"] {
            assert_eq!(verdict(text, address).await, Verdict::Passed, "{text}");
        }
        let Verdict::Failed(fault) = verdict("all is lost", address).await else { panic!("passed") };
        assert_eq!(fault.kind, FaultKind::Refuses);
        assert!(fault.text.contains("health.web.expect_body"), "{fault}");
        // Another status is told first.
        let away = node(&[("GET", b"HTTP/1.1 503 Away\r\nContent-Length: 4\r\n\r\nwell")]).await;
        assert_eq!(kind_of(verdict("well", away).await), FaultKind::Fails);
    }

    #[tokio::test]
    async fn no_more_of_an_answer_is_read_than_is_searched() {
        static ENDLESS: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
            let mut answer = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
            answer.resize(answer.len() + LONGEST_ANSWER, b'.');
            answer.extend_from_slice(b"well");
            answer
        });
        // The answer does not end: whoever waits for its end waits for ever.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let held = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            _ = stream.read(&mut [0; 1024]).await;
            _ = stream.write_all(&ENDLESS).await;
            std::future::pending::<()>().await;
        });
        let mut config = HealthChecks::default();
        config.web.expect_body = Some("well".to_owned());
        let spec = NodeSpec::new(Role::Web, NodeId::try_from("a").unwrap(), address);
        let verdict = Probe::new(&spec, &config).check(&mut Instant::now()).await;
        assert_eq!(kind_of(verdict), FaultKind::Refuses);
        held.abort();
    }

    #[test]
    fn a_varnish_is_well_when_it_would_obey_a_purge() {
        let kind = ProbeKind::Varnish(VarnishSettings::default());
        for status in [200, 400, 404, 410] {
            assert_eq!(kind.judge(answered(status)), Verdict::Passed, "{status}");
        }
        for (status, expected, words) in
            [(405, FaultKind::Refuses, "acl purge"), (501, FaultKind::Fails, "answered 501")]
        {
            let Verdict::Failed(fault) = kind.judge(answered(status)) else { panic!("passed") };
            assert_eq!(fault.kind, expected);
            assert!(fault.text.contains(words), "{fault}");
        }
    }

    #[test]
    fn a_web_node_is_well_when_it_answers_as_expected() {
        let kind = ProbeKind::Web {
            path: "/health_check.php".into(),
            host: String::new(),
            expect: vec![200, 204],
            expect_body: None,
        };
        assert_eq!(kind.judge(answered(204)), Verdict::Passed);
        let failed = |kind, words: &str| Verdict::Failed(NodeFault::new(kind, words));
        assert_eq!(kind.judge(answered(500)), failed(FaultKind::Fails, "/health_check.php answered 500"));
        assert_eq!(kind.judge(answered(302)), failed(FaultKind::Refuses, "/health_check.php answered 302"));
    }

    /// A node (a fake: what it says is the test's) that answers requests of these methods so, and no other.
    async fn node(answers: &'static [(&'static str, &'static [u8])]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let mut held = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 1024];
                let read = stream.read(&mut request).await.unwrap();
                let is_it = |(method, _): &&(&str, _)| request[..read].starts_with(method.as_bytes());
                match answers.iter().find(is_it) {
                    // The checker may have gone.
                    Some((_, answer)) => _ = stream.write_all(answer).await,
                    None => held.push(stream),
                }
            }
        });
        address
    }

    async fn check(role: Role, address: SocketAddr) -> Verdict {
        let mut config = HealthChecks::default();
        config.varnish.timeout = Duration::from_millis(200);
        config.web.timeout = Duration::from_millis(200);
        let spec = NodeSpec::new(role, NodeId::try_from("a").unwrap(), address);
        Probe::new(&spec, &config).check(&mut Instant::now()).await
    }

    #[tokio::test]
    async fn what_a_node_does_in_place_of_an_answer_has_its_kind() {
        const BAD: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";
        /// A method, and its answer.
        type Said = &'static [(&'static str, &'static [u8])];
        const SAID: [(Said, FaultKind); 4] = [
            (&[("PURGE", b"hello\r\n\r\n")], FaultKind::Malformed),
            (&[("PURGE", b"")], FaultKind::Disconnects),
            (&[("GET", BAD)], FaultKind::SilentToPurges),
            (&[], FaultKind::Silent),
        ];
        for (answers, expected) in SAID {
            assert_eq!(kind_of(check(Role::Varnish, node(answers).await).await), expected, "{answers:?}");
        }
        // A web node is asked for its page alone.
        assert_eq!(kind_of(check(Role::Web, node(&[("PURGE", BAD)]).await).await), FaultKind::Silent);
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        for role in [Role::Varnish, Role::Web] {
            assert_eq!(kind_of(check(role, gone).await), FaultKind::NotListening);
        }
    }
}
