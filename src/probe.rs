//! Health checks: one task a node, whatever the number of workers.
//!
//! A web node is asked for its health page. A Varnish is sent a `PURGE` without a pattern: Magento's VCL answers 400 to
//! an address that may purge and 405 to any other, without any side effect, so the check also proves that purges will
//! be accepted ([`would_obey`]).
//!
//! The first check is at once. A failed check after a passed one is repeated soon: a dead node is noticed within little
//! more than one interval, while a lost packet does not take a node out. A failed request also triggers a check
//! ([`Probe::check_now`]). A check that this machine could not carry out, because it is out of files or ports, says
//! nothing about the node ([`Verdict::NotAsked`]).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::Full;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};

use crate::config::{HeaderError, HealthChecks, VarnishChecks, WebChecks, reveal};
use crate::files::is_ours;
use crate::fleet::{CheckResult, Event, NodeId, NodeSpec, Role, SendProxy, VarnishSettings, Verdict};
use crate::http_client::HttpConnection;
use crate::proxy_protocol;
use crate::purge::{PROBE_PATH, what_to_change, would_obey};
use crate::telemetry::causes;

/// The shortest time between two checks of one node, so that failing requests cannot cause a storm of checks.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);

/// A failed check is confirmed after the interval divided by this.
const CONFIRM: u32 = 10;

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

#[derive(Clone, Copy, Debug)]
struct Schedule {
    interval: Duration,
    timeout: Duration,
    fall: u32,
    jitter: f64,
}

#[derive(Clone, Debug)]
enum ProbeKind {
    Web { path: String, host: String, expect: Vec<u16> },
    Varnish(VarnishSettings),
}

/// Why a check could not be carried out.
#[derive(Debug, thiserror::Error)]
enum CheckError {
    #[error("connecting failed")]
    Connect(#[from] std::io::Error),
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
                let WebChecks { path, interval, timeout, fall, jitter, expect, host, .. } = config.web.clone();
                let host = host.unwrap_or_else(|| node.address.to_string());
                (Schedule { interval, timeout, fall, jitter }, ProbeKind::Web { path, host, expect })
            }
            Some(settings) => {
                let VarnishChecks { interval, timeout, fall, jitter, .. } = config.varnish;
                (Schedule { interval, timeout, fall, jitter }, ProbeKind::Varnish(settings.clone()))
            }
        };
        let (role, id) = (node.role(), node.id.clone());
        Probe { role, id, target: node.address, schedule, kind, wake: Arc::default() }
    }

    /// Requests a check before the next regular one.
    pub fn check_now(&self) {
        self.wake.notify_one();
    }

    /// Checks until the receiver of the events is dropped.
    pub async fn run(self, events: mpsc::Sender<Event>) {
        let mut failures = 0;
        loop {
            let mut began = Instant::now();
            let verdict = self.check(&mut began).await;
            failures = match verdict {
                Verdict::Passed => 0,
                Verdict::Failed(_) => failures + 1,
                Verdict::NotAsked(_) => failures,
            };
            let (role, id, address) = (self.role, self.id.clone(), self.target);
            let check = CheckResult { role, id, address, began, took: began.elapsed(), verdict };
            if events.send(Event::Checked(check)).await.is_err() {
                return;
            }
            let unconfirmed = failures > 0 && failures < self.schedule.fall;
            let pause = if unconfirmed { self.schedule.interval / CONFIRM } else { self.schedule.interval };
            let spread = 1.0 + self.schedule.jitter * (2.0 * fastrand::f64() - 1.0);
            let pause = pause.mul_f64(spread).max(SHORTEST_PAUSE);
            tokio::time::sleep(SHORTEST_PAUSE).await;
            // The outcome does not matter: a check follows.
            _ = tokio::time::timeout(pause - SHORTEST_PAUSE, self.wake.notified()).await;
        }
    }

    /// Runs one check. `asked` is set to the time at which the request was sent on an established connection.
    async fn check(&self, asked: &mut Instant) -> Verdict {
        match tokio::time::timeout(self.schedule.timeout, self.ask(asked)).await {
            Err(_) => Verdict::Failed(format!("no answer within {:?}", self.schedule.timeout)),
            Ok(Err(CheckError::Connect(error))) if is_ours(&error) => Verdict::NotAsked(error.to_string()),
            Ok(Err(error)) => Verdict::Failed(causes(&error).to_string()),
            Ok(Ok(status)) => self.kind.judge(status),
        }
    }

    async fn ask(&self, asked: &mut Instant) -> Result<u16, CheckError> {
        let (own, send_proxy) = match &self.kind {
            ProbeKind::Web { .. } => (Vec::new(), SendProxy::Off),
            ProbeKind::Varnish(settings) => (reveal(&settings.headers).await?, settings.send_proxy),
        };
        let mut stream = TcpStream::connect(self.target).await?;
        *asked = Instant::now();
        if send_proxy == SendProxy::V2 {
            let mut header = Vec::new();
            proxy_protocol::write_v2_local(&mut header);
            stream.write_all(&header).await?;
        }
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
        Ok(answer.status().as_u16())
    }
}

impl ProbeKind {
    fn judge(&self, status: u16) -> Verdict {
        match self {
            ProbeKind::Web { expect, .. } if expect.contains(&status) => Verdict::Passed,
            ProbeKind::Web { path, .. } => Verdict::Failed(format!("{path} answered {status}")),
            ProbeKind::Varnish(_) if would_obey(status) => Verdict::Passed,
            ProbeKind::Varnish(_) => Verdict::Failed(format!("PURGE answered {status} {}", what_to_change(status))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_varnish_is_well_when_it_would_obey_a_purge() {
        let kind = ProbeKind::Varnish(VarnishSettings::default());
        for status in [200, 400, 404, 410] {
            assert_eq!(kind.judge(status), Verdict::Passed, "{status}");
        }
        let Verdict::Failed(reason) = kind.judge(405) else { panic!("passed") };
        assert!(reason.contains("acl purge"), "{reason}");
    }

    #[test]
    fn a_web_node_is_well_when_it_answers_as_expected() {
        let kind = ProbeKind::Web { path: "/health_check.php".into(), host: String::new(), expect: vec![200, 204] };
        assert_eq!(kind.judge(204), Verdict::Passed);
        assert_eq!(kind.judge(500), Verdict::Failed("/health_check.php answered 500".into()));
    }
}
