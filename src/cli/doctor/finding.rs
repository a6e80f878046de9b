//! What was found, and how it is told.

use std::fmt::Write as _;

use serde::Serialize;

use crate::cli::printable;
use crate::fleet::{NodeId, Role};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum FindingSeverity {
    /// Something does not work now: a node serves nobody, or purges do not do what they should.
    Error,
    /// It works, and will not under some load, or after some event.
    Warning,
    /// What is known, or could not be looked at.
    Info,
}

impl FindingSeverity {
    fn word(self) -> &'static str {
        match self {
            FindingSeverity::Error => "error",
            FindingSeverity::Warning => "warning",
            FindingSeverity::Info => "info",
        }
    }
}

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    severity: FindingSeverity,
    /// Its stable name, such as `header-limit`.
    name: &'static str,
    /// Of a node: its role and id.
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<Role>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<NodeId>,
    what: String,
    /// Why that matters, in a sentence; empty where it says all itself.
    why: String,
    /// What to do; empty if there is nothing.
    change: String,
}

impl Finding {
    fn new(severity: FindingSeverity, name: &'static str, what: impl Into<String>) -> Self {
        let what = what.into();
        Finding { severity, name, role: None, id: None, what, why: String::new(), change: String::new() }
    }

    pub(super) fn error(name: &'static str, what: impl Into<String>) -> Self {
        Finding::new(FindingSeverity::Error, name, what)
    }

    pub(super) fn warning(name: &'static str, what: impl Into<String>) -> Self {
        Finding::new(FindingSeverity::Warning, name, what)
    }

    pub(super) fn info(name: &'static str, what: impl Into<String>) -> Self {
        Finding::new(FindingSeverity::Info, name, what)
    }

    pub(super) fn why(self, why: impl Into<String>) -> Self {
        Finding { why: why.into(), ..self }
    }

    pub(super) fn change(self, change: impl Into<String>) -> Self {
        Finding { change: change.into(), ..self }
    }

    pub(super) fn is_error(&self) -> bool {
        self.severity == FindingSeverity::Error
    }

    /// About this node.
    pub(super) fn of(self, role: Role, id: &NodeId) -> Self {
        Finding { role: Some(role), id: Some(id.clone()), ..self }
    }

    #[cfg(test)]
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    #[cfg(test)]
    pub(super) fn change_is_given(&self) -> bool {
        !self.change.is_empty()
    }

    fn push(&self, text: &mut String, colour: bool) {
        let node = match (&self.role, &self.id) {
            (Some(role), Some(id)) => format!("{role} {id}: "),
            _ => String::new(),
        };
        let word = match self.severity {
            FindingSeverity::Error if colour => format!("\x1b[31m{}\x1b[0m", self.severity.word()),
            FindingSeverity::Warning if colour => format!("\x1b[33m{}\x1b[0m", self.severity.word()),
            _ => self.severity.word().to_owned(),
        };
        _ = writeln!(text, "{word} [{}] {}", self.name, printable(&format!("{node}{}", self.what)));
        for (label, said) in [("why", &self.why), ("do", &self.change)] {
            if !said.is_empty() {
                _ = writeln!(text, "    {label}: {}", printable(said));
            }
        }
    }
}

/// Everything that was found, the worst first.
#[derive(Debug, Serialize)]
pub(super) struct DoctorReport {
    errors: usize,
    warnings: usize,
    /// How many nodes were looked at.
    nodes: usize,
    findings: Vec<Finding>,
}

impl DoctorReport {
    pub(super) fn new(nodes: usize, mut findings: Vec<Finding>) -> Self {
        findings.sort_by(|a, b| {
            let key = |finding: &Finding| (finding.severity, finding.role, finding.id.clone());
            key(a).cmp(&key(b))
        });
        let count = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
        DoctorReport {
            errors: count(FindingSeverity::Error),
            warnings: count(FindingSeverity::Warning),
            nodes,
            findings,
        }
    }

    /// Whether the exit status is 0.
    pub(super) fn is_well(&self, strict: bool) -> bool {
        self.errors == 0 && (!strict || self.warnings == 0)
    }

    pub(super) fn text(&self, colour: bool) -> String {
        let mut text = String::new();
        self.findings.iter().for_each(|finding| finding.push(&mut text, colour));
        let counted = |count: usize, of: &str| format!("{count} {of}{}", if count == 1 { "" } else { "s" });
        let (errors, warnings) = (counted(self.errors, "error"), counted(self.warnings, "warning"));
        _ = writeln!(text, "{errors}, {warnings}; {} looked at", counted(self.nodes, "node"));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_stands_first_and_the_sum_last() {
        let id = NodeId::try_from("varnish-1").unwrap();
        let findings = vec![
            Finding::info("vcl", "ours"),
            Finding::warning("ban-lurker-off", "ban_lurker_sleep is 0").of(Role::Varnish, &id).why("W.").change("C."),
            Finding::error("silent", "no\x1banswer").of(Role::Varnish, &id),
        ];
        let report = DoctorReport::new(1, findings);
        let expected = "error [silent] varnish varnish-1: no answer\n\
                        warning [ban-lurker-off] varnish varnish-1: ban_lurker_sleep is 0\n    why: W.\n    do: C.\n\
                        info [vcl] ours\n1 error, 1 warning; 1 node looked at\n";
        assert_eq!(report.text(false), expected);
        let plain = report.text(true).replace("\x1b[31m", "").replace("\x1b[33m", "").replace("\x1b[0m", "");
        assert_eq!(plain, expected);
        assert!(!report.is_well(false));
    }

    #[test]
    fn warnings_count_where_one_is_strict() {
        let report = DoctorReport::new(0, vec![Finding::warning("x", "y"), Finding::info("x", "y")]);
        assert!(report.is_well(false) && !report.is_well(true));
        assert!(DoctorReport::new(0, vec![Finding::info("x", "y")]).is_well(true));
    }
}
