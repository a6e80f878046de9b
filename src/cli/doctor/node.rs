//! One node, asked from here: would it take a purge, what does it answer, and what does its management port say?
//!
//! A pattern that no regular expression library compiles is sent to each Varnish, to see whether a ban that fails is told. It
//! must do no harm whatever a VCL makes of it, so: its one tag is a random name that no page has, also when a VCL cuts the
//! pattern into words, closes its parenthesis, or takes its marks away; and its path is a random one of our own, which no page has
//! either, for a VCL that sees the URL alone. At worst a ban is added that no page matches.

use std::net::SocketAddr;
use std::time::{Duration, UNIX_EPOCH};

use http::{Request, Response, header};
use http_body_util::Full;
use hyper::body::Bytes;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::finding::Finding;
use super::managed::{ManagedVarnish, ManagementAccess, NotManaged, seconds_ahead};
use super::parameters::ParameterContext;
use crate::admin::advice_for;
use crate::config::{Config, StaticNode, reveal};
use crate::fleet::{NodeId, NodeSpec, PurgeDialect, Role, SendProxy, VarnishSettings, Verdict};
use crate::http_client::{self, HttpConnection};
use crate::probe::Probe;
use crate::proxy_protocol;
use crate::purge::PROBE_PATH;
use crate::varnish::management::ManagementError;

/// For a name, and for each request.
const STEP: Duration = Duration::from_millis(1500);

/// For all that is asked at a management port.
const MANAGEMENT_LIMIT: Duration = Duration::from_secs(5);

/// In bytes. The answer to a purge is a line.
const MAX_ANSWER: usize = 64 * 1024;

/// Clocks may differ by this much, in seconds: what says the time is rounded, and was on its way.
const CLOCK_TOLERANCE: i64 = 2;

/// A node to be looked at.
#[derive(Clone, Debug)]
pub(super) struct NodeTarget {
    pub(super) role: Role,
    pub(super) id: NodeId,
    place: NodePlace,
    management: Management,
}

#[derive(Clone, Debug)]
enum NodePlace {
    /// Its address is known.
    Known(Box<NodeSpec>),
    /// It is in the configuration, by a name or an address; a running clearcoat may have it at this one.
    Configured(Box<StaticNode>, Option<SocketAddr>),
}

/// What is configured of its management port.
#[derive(Clone, Debug, Default)]
struct Management {
    access: Option<ManagementAccess>,
    /// The port at its own host.
    port: Option<u16>,
    secret_file: Option<std::path::PathBuf>,
}

/// What came of looking at a node.
#[derive(Debug)]
pub(super) struct NodeResult {
    /// It answers, and would take a purge, or passes its check.
    pub(super) answers: bool,
    /// Nothing says where its management port is.
    pub(super) is_unmanaged: bool,
    pub(super) findings: Vec<Finding>,
}

impl NodeTarget {
    /// A node of the configuration. `in_use` is the address at which a running clearcoat has it.
    pub(super) fn configured(node: &StaticNode, in_use: Option<SocketAddr>, config: &Config) -> Self {
        let mut management = Management::of_fleet(config);
        management.secret_file = node.management_secret_file.clone().or(management.secret_file);
        let secret_file = management.secret_file.clone();
        management.access = node.management.clone().map(|address| ManagementAccess { address, secret_file });
        NodeTarget {
            role: node.role,
            id: node.id.clone(),
            place: NodePlace::Configured(Box::new(node.clone()), in_use),
            management,
        }
    }

    /// A node of a registry. Its management port is not asked: whoever may write a record would have our proof sent to himself,
    /// for a challenge of any varnishd.
    pub(super) fn registered(spec: NodeSpec) -> Self {
        let (role, id) = (spec.role(), spec.id.clone());
        NodeTarget { role, id, place: NodePlace::Known(Box::new(spec)), management: Management::default() }
    }

    /// Looks at it.
    pub(super) async fn examine(self, config: &Config) -> NodeResult {
        let (role, id) = (self.role, self.id.clone());
        let mut result = match self.spec(config).await {
            Ok(spec) => self.examine_at(spec, config).await,
            Err(why) => NodeResult::unwell(
                Finding::error("name-unresolved", format!("its name has no address: {why}"))
                    .why("It gets no requests and no purges.")
                    .change("the address in its [[node]], or the resolver of this machine"),
            ),
        };
        result.findings = result.findings.into_iter().map(|finding| finding.of(role, &id)).collect();
        result
    }

    async fn spec(&self, config: &Config) -> Result<NodeSpec, String> {
        let (node, in_use) = match &self.place {
            NodePlace::Known(spec) => return Ok(NodeSpec::clone(spec)),
            NodePlace::Configured(node, in_use) => (node, *in_use),
        };
        let found = timeout(STEP, tokio::net::lookup_host(node.address.as_str())).await;
        let addresses = found.map_err(|_| format!("no answer within {STEP:?}"))?.map_err(|error| error.to_string())?;
        let addresses: Vec<SocketAddr> = addresses.collect();
        // As long as a name has the address that is in use, clearcoat keeps that.
        let kept = in_use.filter(|address| addresses.contains(address));
        let mut spec = node.spec(kept.or_else(|| addresses.first().copied()).ok_or_else(|| "none".to_owned())?);
        if let Some(settings) = &mut spec.varnish {
            settings.headers = settings.headers.over(&config.purge.headers);
        }
        Ok(spec)
    }

    async fn examine_at(self, spec: NodeSpec, config: &Config) -> NodeResult {
        let Some(settings) = spec.varnish.clone() else { return check(&spec, config).await };
        let access = self.management.at(spec.address);
        let managed = async {
            match &access {
                Some(access) => {
                    let asked = timeout(MANAGEMENT_LIMIT, ManagedVarnish::ask(access)).await;
                    Some(asked.unwrap_or(Err(NotManaged::Port(ManagementError::Timeout(MANAGEMENT_LIMIT)))))
                }
                None => None,
            }
        };
        let purges = async {
            let mut result = check(&spec, config).await;
            let asked = if result.answers { ask_all(spec.address, &settings).await } else { PurgeAnswers::default() };
            result.findings.extend(asked.malformed(&settings));
            (result, asked)
        };
        let ((mut result, asked), managed) = tokio::join!(purges, managed);
        result.is_unmanaged = access.is_none();
        let managed = match (managed, &access) {
            (Some(Err(error)), Some(access)) => {
                result.findings.push(error.finding(access));
                None
            }
            (Some(Ok(managed)), _) => Some(managed),
            _ => None,
        };
        result.findings.extend(asked.vcl(managed.as_ref()));
        result
            .findings
            .extend(clock_difference(asked.date_ahead, managed.as_ref().and_then(|managed| managed.clock_ahead)));
        if let Some(managed) = managed {
            let context = ParameterContext {
                header_limit: settings.header_limit,
                max_answer_head: config.limits.max_answer_head,
                max_fields: config.limits.max_fields,
                idle_limit: config.timeouts.node_keep_alive,
            };
            result.findings.extend(managed.findings(&context));
        }
        result
    }
}

impl Management {
    fn of_fleet(config: &Config) -> Self {
        let checks = &config.health.varnish;
        let port = Some(checks.management_port).filter(|port| *port != 0);
        Management { access: None, port, secret_file: checks.management_secret_file.clone() }
    }

    fn at(&self, address: SocketAddr) -> Option<ManagementAccess> {
        let at_its_host = || {
            let address = SocketAddr::new(address.ip(), self.port?).to_string();
            Some(ManagementAccess { address, secret_file: self.secret_file.clone() })
        };
        self.access.clone().or_else(at_its_host)
    }
}

impl NodeResult {
    fn unwell(finding: Finding) -> Self {
        NodeResult { answers: false, is_unmanaged: false, findings: vec![finding] }
    }
}

/// Its health check, as clearcoat makes it.
async fn check(spec: &NodeSpec, config: &Config) -> NodeResult {
    let role = spec.role();
    // It has a timeout of its own, which is configured.
    match Probe::new(spec, &config.health).once().await {
        Verdict::Passed => NodeResult { answers: true, is_unmanaged: false, findings: Vec::new() },
        Verdict::NotAsked(why) => NodeResult::unwell(
            Finding::warning("not-asked", format!("it could not be asked from here: {why}"))
                .change("what is missing is missing here: files, ports or memory"),
        ),
        Verdict::Failed(fault) => {
            let why = match role {
                Role::Varnish => "It serves nobody while it cannot be told of purges.",
                Role::Web => "It gets no requests while its check fails.",
            };
            let finding = Finding::error(fault.kind.as_str(), &*fault.text).why(why);
            NodeResult::unwell(finding.change(advice_for(role, fault.kind, spec.address)))
        }
    }
}

/// What a Varnish answered.
#[derive(Debug, Default)]
struct PurgeAnswers {
    /// How its VCL answers our probe, if it knows it.
    probe: Option<ProbeAnswer>,
    /// The status of the answer to the malformed pattern.
    malformed: Option<u16>,
    /// How far the `Date` of its answers is ahead of our clock, in seconds.
    date_ahead: Option<i64>,
}

/// What our VCL answers to the probe.
#[derive(Debug, Deserialize)]
struct ProbeAnswer {
    vcl: String,
    clearcoat: u32,
}

async fn ask_all(address: SocketAddr, settings: &VarnishSettings) -> PurgeAnswers {
    let token = format!("{:032x}", fastrand::u128(..));
    let pattern = format!("((^|,)clearcoat_doctor_{token}(,|$)");
    let path = format!("/.clearcoat/doctor/{token}");
    let (probe, malformed) =
        tokio::join!(ask(address, settings, PROBE_PATH, None), ask(address, settings, &path, Some(&pattern)));
    // A node that does not answer again has just passed its check: its next one tells.
    let date_ahead = probe.as_ref().and_then(date_ahead);
    PurgeAnswers {
        probe: probe.and_then(|answer| serde_json::from_slice(answer.body()).ok()),
        malformed: malformed.map(|answer| answer.status().as_u16()),
        date_ahead,
    }
}

/// The answer to a purge; `None` if there was none in time.
async fn ask(
    address: SocketAddr,
    settings: &VarnishSettings,
    path: &str,
    pattern: Option<&str>,
) -> Option<Response<Bytes>> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        if settings.send_proxy == SendProxy::V2 {
            let mut preamble = Vec::new();
            proxy_protocol::write_v2_local(&mut preamble);
            tokio::io::AsyncWriteExt::write_all(&mut stream, &preamble).await?;
        }
        let mut request = Request::builder().method("PURGE").uri(path).header(header::HOST, "clearcoat");
        for (name, value) in reveal(&settings.headers).await? {
            request = request.header(name, value);
        }
        if let Some(pattern) = pattern {
            request = request.header("X-Magento-Tags-Pattern", pattern);
        }
        let request = request.header(header::CONNECTION, "close").body(Full::default())?;
        let mut connection = HttpConnection::with_title_case(stream).await?;
        let (head, body) = connection.send(request).await?.into_parts();
        let body = http_client::read(body, MAX_ANSWER).await.map_err(anyhow::Error::from_boxed)?;
        anyhow::Ok(Response::from_parts(head, body))
    };
    timeout(STEP, exchange).await.ok()?.ok()
}

fn date_ahead(answer: &Response<Bytes>) -> Option<i64> {
    let date = httpdate::parse_http_date(answer.headers().get(header::DATE)?.to_str().ok()?).ok()?;
    Some(seconds_ahead(date.duration_since(UNIX_EPOCH).ok()?.as_secs()))
}

impl PurgeAnswers {
    fn malformed(&self, settings: &VarnishSettings) -> Option<Finding> {
        let status = self.malformed.filter(|status| (200..300).contains(status))?;
        let what = format!("its VCL answers {status} to a pattern that cannot be compiled");
        let why = "A purge that this Varnish cannot carry out counts as done, and its pages stay.";
        if self.probe.as_ref().is_some_and(|probe| probe.vcl == "6") {
            return Some(
                Finding::info("malformed-accepted", what).why("Varnish 6.0 tells no VCL that a ban does not compile."),
            );
        }
        if settings.delivery == PurgeDialect::MagentoPlain {
            let why = "A VCL that takes patterns apart does so; the trial shows whether it purges.";
            return Some(Finding::info("malformed-accepted", what).why(why));
        }
        let change = "load the VCL of `clearcoat vcl`; or, from Varnish 6.6 on, write `if (!std.ban(\"…\")) { return (synth(400, \
                      std.ban_error())); }` in the place of `ban(\"…\");` in yours, and `import std;`";
        Some(Finding::warning("malformed-accepted", what).why(why).change(change))
    }

    /// Whose VCL it is.
    fn vcl(&self, managed: Option<&ManagedVarnish>) -> Option<Finding> {
        if let Some(ProbeAnswer { vcl, clearcoat }) = &self.probe {
            return Some(Finding::info(
                "vcl",
                format!("its VCL is clearcoat's, for Varnish {vcl} (version {clearcoat})"),
            ));
        }
        self.malformed?;
        let kind = managed.and_then(ManagedVarnish::vcl_kind).unwrap_or("another than clearcoat's");
        Some(
            Finding::info("vcl", format!("its VCL is {kind}"))
                .change("docs/vcl.md, \"Keep your own VCL\", has what it needs"),
        )
    }
}

/// Clocks that differ. `date` is by its answers, `own` by its management port.
fn clock_difference(date: Option<i64>, own: Option<i64>) -> Option<Finding> {
    let differs = |ahead: Option<i64>| ahead.filter(|ahead| ahead.abs() > CLOCK_TOLERANCE);
    let words = |ahead: i64| format!("{} s {}", ahead.abs(), if ahead > 0 { "ahead of" } else { "behind" });
    let why = "Browsers and Varnish reckon the age of a page by these times, and logs of two machines cannot be laid side by side.";
    let (what, change) = match (differs(own), differs(date)) {
        (Some(own), _) => (
            format!("its clock is {} that of this machine", words(own)),
            "synchronise both: `timedatectl set-ntp true`",
        ),
        (None, Some(date)) if own.is_some() => {
            (format!("its answers have a Date {} its own clock", words(date)), "take out of its VCL what writes Date")
        }
        (None, Some(date)) => {
            let change = "synchronise both (`timedatectl set-ntp true`); if they are, its VCL writes Date";
            (format!("its answers have a Date {} the clock of this machine", words(date)), change)
        }
        (None, None) => return None,
    };
    Some(Finding::warning("clock-differs", what).why(why).change(change))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_told_from_a_date_that_a_vcl_writes() {
        let said = |date, own| clock_difference(date, own).map(|finding| serde_json::to_string(&finding).unwrap());
        assert_eq!(said(Some(2), Some(-2)), None);
        assert_eq!(said(None, None), None);
        assert!(said(Some(3600), Some(0)).unwrap().contains("a Date 3600 s ahead of its own clock"));
        assert!(said(Some(-60), Some(-60)).unwrap().contains("its clock is 60 s behind"));
        assert!(said(Some(-60), None).unwrap().contains("if they are, its VCL writes Date"));
    }

    #[test]
    fn a_vcl_that_takes_any_pattern_is_named_where_that_could_be_otherwise() {
        let answers = |status| PurgeAnswers { malformed: Some(status), ..PurgeAnswers::default() };
        let settings = VarnishSettings::default();
        assert!(answers(200).malformed(&settings).unwrap().change_is_given());
        assert_eq!(answers(400).malformed(&settings), None);
        let plain = VarnishSettings { delivery: PurgeDialect::MagentoPlain, ..VarnishSettings::default() };
        assert!(!answers(200).malformed(&plain).unwrap().change_is_given());
    }
}
