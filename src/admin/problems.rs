//! What is wrong beside single nodes: in words, and in one place for the status page and `clearcoat status`.
//!
//! Each problem has the name of the alert about it, whose paragraph in `docs/operations.md` says more. What is said of a node
//! stands in [`super::standing`].

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::AdminContext;
use crate::fleet::NodeSource;
use crate::journal::Trouble;
use crate::registry::RegistryStatus;
use crate::replicas;
use crate::telemetry::{Incident, IncidentKind};

/// A certificate that ends sooner is a problem. The alert has the same limit.
const RENEW_BEFORE: Duration = Duration::from_secs(14 * 86_400);

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Problem {
    severity: Severity,
    /// What has it.
    what: String,
    why: String,
    /// When it happened last, if it is no state (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    at: Option<String>,
    /// What to do.
    advice: &'static str,
    /// The alert about it.
    alert: &'static str,
}

/// The severity of a problem, in the words of `deploy/prometheus/rules.yml`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Severity {
    Warning,
    Critical,
}

impl AdminContext {
    /// All that is wrong beside single nodes, what is critical first.
    pub(super) fn problems(&self, replicas: &[replicas::View]) -> Vec<Problem> {
        let now = SystemTime::now();
        let journal = self.journal.trouble().map(Problem::of_journal);
        let registry = self.registry.as_ref().filter(|registry| !registry.is_connected()).map(Problem::of_registry);
        let replicas = replicas.iter().filter_map(Problem::of_replica);
        let certificates = self.metrics.tls_certificates();
        let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().cast_signed();
        let certificates = certificates.iter().filter_map(|(file, end)| Problem::of_certificate(file, end - seconds));
        let vcl = self.vcl_push.problem().map(|reason| Problem::of_vcl(&reason));
        let incidents = self.metrics.incidents.present(now);
        let incidents = incidents.into_iter().map(|(kind, incident)| Problem::of_incident(kind, &incident));
        let mut problems: Vec<Problem> = journal
            .into_iter()
            .chain(registry)
            .chain(replicas)
            .chain(certificates)
            .chain(vcl)
            .chain(incidents)
            .collect();
        problems.sort_by_key(|problem| problem.severity == Severity::Warning);
        problems
    }
}

impl Problem {
    fn of_journal(trouble: Trouble) -> Self {
        Problem {
            severity: Severity::Critical,
            what: "The journal".to_owned(),
            why: trouble.reason,
            at: None,
            advice: if trouble.refuses {
                "Look at the disk of journal.path: full, read-only or hung. Purges are refused until it takes them."
            } else {
                "Look at the disk of journal.path and at etcd. Purges are still taken."
            },
            alert: "ClearcoatJournalStalled",
        }
    }

    fn of_registry(registry: &RegistryStatus) -> Self {
        let kind = match registry.source() {
            NodeSource::Static => "the configuration",
            NodeSource::Etcd => "etcd",
            NodeSource::Dns => "DNS",
            NodeSource::Kubernetes => "the API server of Kubernetes",
        };
        let silence = humantime::format_duration(Duration::from_secs(registry.silence().as_secs()));
        let problem = registry.problem().unwrap_or_default();
        let reason = if problem.is_empty() { String::new() } else { format!(": {problem}") };
        Problem {
            severity: Severity::Warning,
            what: "The registry".to_owned(),
            why: format!("{kind} has been silent for {silence}{reason}"),
            at: None,
            advice: "Traffic and purges go on with the nodes as they were. New nodes are not seen until it answers.",
            alert: "ClearcoatRegistryAway",
        }
    }

    fn of_replica(replica: &replicas::View) -> Option<Self> {
        let why = match (replica.problem.as_deref().unwrap_or_default(), replica.confirmed) {
            ("", true) => return None,
            ("", false) => "it has not confirmed every purge",
            (problem, _) => problem,
        };
        Some(Problem {
            severity: Severity::Warning,
            what: format!("Replica {}", replica.id),
            why: why.to_owned(),
            at: None,
            advice: if replica.is_self {
                "This is the clearcoat that you ask: until that is mended, the others may not find it, nor tell it of purges."
            } else {
                "See whether it runs and can be reached from here. Until it confirms, a reader behind it may get an \
                 old page."
            },
            alert: "ClearcoatReplicaUnconfirmed",
        })
    }

    /// `left`: the seconds until its end.
    fn of_certificate(file: &str, left: i64) -> Option<Self> {
        let has_ended = left <= 0;
        let distance = Duration::from_secs(left.unsigned_abs());
        if !has_ended && distance > RENEW_BEFORE {
            return None;
        }
        let distance = match distance.as_secs() / 86_400 {
            0 => "less than a day".to_owned(),
            1 => "1 day".to_owned(),
            days => format!("{days} days"),
        };
        let why = if has_ended {
            format!("it ended {distance} ago: browsers warn of the shop")
        } else {
            format!("it ends in {distance}")
        };
        Some(Problem {
            severity: if has_ended { Severity::Critical } else { Severity::Warning },
            what: format!("The certificate {file}"),
            why,
            at: None,
            advice: "Renew it, and put the new one in the place of the file: it is noticed by itself.",
            alert: "ClearcoatCertificateEnds",
        })
    }

    fn of_vcl(reason: &str) -> Self {
        Problem {
            severity: Severity::Warning,
            what: "The VCL of the fleet".to_owned(),
            why: reason.to_owned(),
            at: None,
            advice: "Until that is mended, a Varnish gets what is left of its VCL, or keeps the one that it has (docs/vcl-push.md).",
            alert: "ClearcoatVclOutdated",
        }
    }

    fn of_incident(kind: IncidentKind, incident: &Incident) -> Self {
        let (what, advice, alert) = match kind {
            IncidentKind::PurgeRefused => (
                "Purges",
                "What they were for may stay old. The sender is told why: see its log, and purge.allow, \
                 purge.token_file.",
                "ClearcoatPurgesRefused",
            ),
            IncidentKind::Shortage => (
                "This process",
                "Raise its limit of open files (LimitNOFILE, ulimit -n), or find who holds so many connections.",
                "ClearcoatShortage",
            ),
            IncidentKind::ReloadRefused => (
                "The configuration",
                "The one from before goes on. `clearcoat check` names every error.",
                "ClearcoatReloadRefused",
            ),
            IncidentKind::CertificateRefused => (
                "A renewed certificate",
                "The one from before goes on. Put a certificate and its key in place that belong together.",
                "ClearcoatCertificateRefused",
            ),
            IncidentKind::AccessLogLost => (
                "The access log",
                "Whoever reads the pipe is too slow, or the disk of log.access_file is full. Requests do not wait for it.",
                "ClearcoatAccessLogLost",
            ),
            IncidentKind::Overload => (
                "The queue",
                "Find what makes the nodes slow, or add nodes; raise max_requests_per_node only where they can take more \
                 (docs/overload.md).",
                "ClearcoatOverload",
            ),
        };
        let (what, why) = (what.to_owned(), incident.words.to_string());
        let at = (!kind.is_state()).then(|| humantime::format_rfc3339_millis(incident.at).to_string());
        Problem { severity: Severity::Warning, what, why, at, advice, alert }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_a_problem_from_two_weeks_before_its_end() {
        let day = 86_400;
        let why = |left| Problem::of_certificate("shop.pem", left).map(|problem| (problem.severity, problem.why));
        let warning = |text: &str| Some((Severity::Warning, text.to_owned()));
        let critical = |text: &str| Some((Severity::Critical, text.to_owned()));
        assert_eq!(why(14 * day + 1), None);
        assert_eq!(why(14 * day), warning("it ends in 14 days"));
        assert_eq!(why(1), warning("it ends in less than a day"));
        assert_eq!(why(0), critical("it ended less than a day ago: browsers warn of the shop"));
        assert_eq!(why(-3 * day), critical("it ended 3 days ago: browsers warn of the shop"));
    }

    #[test]
    fn each_alert_that_is_named_is_there() {
        let rules = include_str!("../../deploy/prometheus/rules.yml");
        let incident = Incident { words: "it was".into(), at: UNIX_EPOCH };
        let mut problems: Vec<Problem> =
            IncidentKind::ALL.into_iter().map(|kind| Problem::of_incident(kind, &incident)).collect();
        problems.extend(Problem::of_certificate("shop.pem", 0));
        problems.push(Problem::of_vcl("no origin has an address"));
        problems.push(Problem::of_journal(Trouble { reason: "full".to_owned(), refuses: true }));
        for problem in problems {
            assert!(rules.contains(&format!("- alert: {}\n", problem.alert)), "{problem:?}");
        }
    }
}
