//! What a running clearcoat knows of its nodes: from its admin listener, in its own words.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use http::Request;
use http_body_util::Full;
use serde::Deserialize;

use super::finding::Finding;
use crate::cli::http::Endpoint;
use crate::config::Config;
use crate::fleet::{NodeId, NodeSpec, PurgeDialect, Role, SendProxy};

/// For both answers together.
const PATIENCE: Duration = Duration::from_secs(2);

/// In bytes: room for tens of thousands of nodes.
const MAX_ANSWER: usize = 16 << 20;

/// Fewer open files than this are used up by a few thousand readers.
const FEW_FILES: f64 = 8192.0;

/// What a running clearcoat says.
#[derive(Debug)]
pub(super) struct RunningClearcoat {
    fleet: RunningFleet,
    /// The values of `/metrics`, by their series.
    metrics: HashMap<String, f64>,
}

#[derive(Debug, Deserialize)]
struct RunningFleet {
    #[serde(default)]
    problems: Vec<RunningProblem>,
    nodes: Vec<RunningNode>,
}

#[derive(Debug, Deserialize)]
struct RunningProblem {
    severity: String,
    what: String,
    why: String,
    advice: String,
}

/// A node as it is in the fleet.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct RunningNode {
    pub(super) role: Role,
    pub(super) id: NodeId,
    /// Of a name that does not resolve: the name.
    address: String,
    state: String,
    gets_traffic: bool,
    #[serde(default)]
    why: String,
    #[serde(default)]
    advice: String,
    #[serde(default)]
    trial: String,
    #[serde(default)]
    trial_finding: String,
    #[serde(default)]
    seals_not: String,
    delivery: Option<PurgeDialect>,
    header_limit: Option<usize>,
    send_proxy: Option<SendProxy>,
}

impl RunningClearcoat {
    /// Asks the admin listener.
    ///
    /// # Errors
    /// Nobody is there, or it is no admin listener of this version.
    pub(super) async fn ask(admin: &Endpoint) -> anyhow::Result<Self> {
        let asked = async {
            let get = async |path: &str| -> anyhow::Result<Vec<u8>> {
                let answer = admin.send(Request::get(path).body(Full::default())?, MAX_ANSWER).await?;
                anyhow::ensure!(answer.status().is_success(), "{admin}{path} answered {}", answer.status());
                Ok(answer.body().to_vec())
            };
            let fleet = serde_json::from_slice(&get("/api/v1/fleet").await?)
                .with_context(|| format!("{admin} is no admin listener of this version of clearcoat"))?;
            let metrics = parse_metrics(&String::from_utf8_lossy(&get("/metrics").await?));
            Ok(RunningClearcoat { fleet, metrics })
        };
        let seconds = PATIENCE.as_secs();
        tokio::time::timeout(PATIENCE, asked)
            .await
            .with_context(|| format!("{admin} has not answered within {seconds} s"))?
    }

    /// Its nodes.
    pub(super) fn nodes(&self) -> &[RunningNode] {
        &self.fleet.nodes
    }

    /// What is wrong beside single nodes.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let problem = |problem: &RunningProblem| {
            let new = if problem.severity == "critical" { Finding::error } else { Finding::warning };
            new("problem", format!("{}: {}", problem.what, problem.why)).change(&problem.advice)
        };
        let mut findings: Vec<Finding> = self.fleet.problems.iter().map(problem).collect();
        if let Some(&limit) = self.metrics.get("process_max_fds").filter(|limit| **limit < FEW_FILES) {
            let what = format!("clearcoat may have {limit} open files");
            let why = "Each request needs two; when they are used up, readers wait and are answered 503.";
            let change = "LimitNOFILE=1048576 in its unit, or `ulimit -Hn 1048576` before it starts; then a restart";
            findings.push(Finding::warning("few-open-files", what).why(why).change(change));
        }
        if let Some(&tags) = self.metrics.get("clearcoat_unsealable_tags").filter(|tags| **tags > 0.0) {
            let what = format!("{tags} tags are of ESI blocks: purges of these wait for every Varnish");
            findings.push(
                Finding::info("unsealable-tags", what).why("The seal of a page covers no block that a cache fills in."),
            );
        }
        findings
    }

    /// What is wrong with this node; `is_ill` if an error of it was found from here.
    pub(super) fn findings_of(&self, node: &RunningNode, is_ill: bool) -> Vec<Finding> {
        let mut findings = Vec::new();
        let is_told = ["untrusted", "drained"].contains(&node.state.as_str()) || is_ill;
        if !node.gets_traffic && !is_told {
            let finding = Finding::error("no-traffic", format!("it gets no traffic: {}", node.why));
            findings.push(finding.why("The others serve its readers, or nobody does.").change(&node.advice));
        }
        if node.state == "drained" {
            findings.push(Finding::info("drained", &node.why).change(&node.advice));
        }
        findings.extend(node.trial());
        if !node.seals_not.is_empty() {
            let what = format!("it returns no seals: {}", node.seals_not);
            let why = "A purge is answered only when this Varnish has it, and a slow one makes Magento wait.";
            let change = "keep X-Clearcoat-Seal on its answers and X-Clearcoat-Asked on its requests, as the VCL of `clearcoat \
                          vcl` does (docs/vcl.md); then restart varnishd, or `clearcoat purge --all`";
            findings.push(Finding::warning("no-seals", what).why(why).change(change));
        }
        let series = format!("clearcoat_unsealed_answers_total{{node=\"{}\"}}", node.id);
        if let Some(&count) = self.metrics.get(&series).filter(|count| **count > 0.0 && node.seals_not.is_empty()) {
            let what = format!("{count} answers had no seal since clearcoat started");
            let why = "Pages from before answers were sealed, or that Varnish wrote itself; of these no seal shows that they are old.";
            findings.push(Finding::info("unsealed-answers", what).why(why));
        }
        findings.into_iter().map(|finding| finding.of(node.role, &node.id)).collect()
    }
}

impl RunningNode {
    /// What its trial showed.
    fn trial(&self) -> Option<Finding> {
        let finding = match self.trial.as_str() {
            "failed" | "without-tags" => Finding::error("trial-failed", &self.trial_finding)
                .why("A page that was purged would stay in it, and be served.")
                .change("what the finding names, in its [[node]], its record in the registry, or its VCL (docs/vcl.md, Trial)"),
            "inconclusive" => Finding::warning("trial-inconclusive", &self.trial_finding)
                .why("Nobody knows whether a purge takes a page out of it.")
                .change("let /.clearcoat/trial/ through to clearcoat's origin listener, and store it (docs/vcl.md, Trial)"),
            "untried" => Finding::info("untried", "it was not tried yet whether purges take pages out of it"),
            _ => return None,
        };
        Some(finding)
    }
    /// Where it is; `None` if its name does not resolve.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.address.parse().ok()
    }

    /// The node as it is checked; `None` if its name has no address.
    pub(super) fn spec(&self, config: &Config) -> Option<NodeSpec> {
        let mut spec = NodeSpec::new(self.role, self.id.clone(), self.address()?);
        if let Some(settings) = &mut spec.varnish {
            settings.delivery = self.delivery.unwrap_or(settings.delivery);
            settings.header_limit = self.header_limit.unwrap_or(settings.header_limit);
            settings.send_proxy = self.send_proxy.unwrap_or(settings.send_proxy);
            settings.headers = config.purge.headers.clone();
        }
        Some(spec)
    }
}

/// The values of the text format of Prometheus. What has a label with a blank is left out.
fn parse_metrics(text: &str) -> HashMap<String, f64> {
    let parse = |line: &str| {
        let (series, value) = line.split_once(' ')?;
        Some((series.to_owned(), value.trim().parse().ok()?))
    };
    text.lines().filter(|line| !line.starts_with('#')).filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLEET: &str = r#"{"problems": [{"severity": "critical", "what": "The journal", "why": "no space left", "advice": "Make room."}],
        "nodes": [{"role": "varnish", "id": "v1", "address": "192.0.2.11:6081", "state": "untrusted", "gets_traffic": false,
                   "trial": "failed", "trial_finding": "set delivery", "seals_not": null, "delivery": "xkey", "header_limit": 4096,
                   "send_proxy": "v2"},
                  {"role": "varnish", "id": "v2", "address": "192.0.2.12:6081", "state": "serving", "gets_traffic": true, "trial": "passed",
                   "seals_not": "purges wait for it"},
                  {"role": "web", "id": "w1", "address": "web.example:80", "state": "unresolved", "gets_traffic": false,
                   "why": "its name does not resolve"}]}"#;

    fn running(metrics: &str) -> RunningClearcoat {
        let text = FLEET.replace(r#""seals_not": null, "#, "");
        RunningClearcoat { fleet: serde_json::from_str(&text).unwrap(), metrics: parse_metrics(metrics) }
    }

    fn names(findings: &[Finding]) -> Vec<&'static str> {
        findings.iter().map(Finding::name).collect()
    }

    #[test]
    fn what_clearcoat_knows_is_told_once() {
        let running = running("# HELP x y\nprocess_max_fds 1024\nclearcoat_unsealed_answers_total{node=\"v1\"} 3\n");
        assert_eq!(names(&running.findings()), ["problem", "few-open-files"]);
        let of = |at: usize, is_ill| names(&running.findings_of(&running.nodes()[at], is_ill));
        assert_eq!(of(0, false), ["trial-failed", "unsealed-answers"]);
        assert_eq!(of(1, false), ["no-seals"]);
        assert_eq!(of(2, false), ["no-traffic"]);
        assert!(of(2, true).is_empty());
    }

    #[test]
    fn a_node_of_a_registry_is_checked_by_its_own_settings() {
        let running = running("");
        let config = Config::default();
        let spec = running.nodes()[0].spec(&config).unwrap();
        let settings = spec.varnish.unwrap();
        assert_eq!(
            (settings.delivery, settings.header_limit, settings.send_proxy),
            (PurgeDialect::Xkey, 4096, SendProxy::V2)
        );
        assert!(running.nodes()[2].spec(&config).is_none());
    }
}
