//! The configuration: one file, overridden key by key from the environment, checked as a whole.
//!
//! A proxy that starts with a misread key is worse than one that does not start, so nothing is guessed: an unknown
//! key, an unknown variable and a contradiction are errors. All of them are reported at once, because who edits a
//! configuration by trial and deployment should need one trial. Each is one line that names where the value came
//! from (the file or the variable), the key, the value, and what is allowed.
//!
//! To find all of them the reader is run again after every error, without the value at fault (its default stands in
//! for it). The checks that need several keys then run over what is left and skip the keys that are already blamed.
//!
//! Values from the environment have no type of their own. They stay text until a key asks for a list, a number or a
//! string, so that `CLEARCOAT_HEALTH__WEB__HOST=8080` is a name and `CLEARCOAT_RUNTIME__WORKERS=4` a number.
//!
//! figment would read the same sources, and remembers as we do which of them a value came from. But it gives a variable a type
//! before a key has asked for one (the host above would be a number, and refused), stops at the first value that is wrong, and
//! brings a second TOML parser. To find the other errors, and to say in our words what is allowed, the tree and the reader
//! below would still be wanted beside it.

mod check;
mod difference;
mod edge;
mod edge_rules;
mod error;
mod fleet;
mod headers;
mod health;
mod journal;
mod kubernetes;
mod limits;
mod log_filter;
mod nearest;
mod node;
mod optional;
mod places;
mod process;
mod purge;
mod raw;
mod read;
mod remarks;
mod settings;
mod source;
mod text;
mod timeouts;
mod token;
mod traces;
mod url;
mod vcl;

use std::path::Path;

use serde::{Deserialize, Serialize};

pub use edge::{
    CIPHER_SUITES, CIPHER_SUITES_OF_TLS13, Edge, MARKETING_PARAMETERS, Origin, ProxyProtocol, RequestTerms,
    TlsListener, TlsVersion, WhenAllBehind,
};
pub use edge_rules::{EdgeErrorPages, EdgeHttps, EdgeMaintenance, EdgeRateLimit};
pub use error::{ConfigError, ConfigErrors};
pub use fleet::{Dns, Etcd, PeerAddress, Registry, RegistryKind, Replica, StaticNode};
pub use headers::{HeaderError, reveal};
pub use health::{HealthChecks, VarnishChecks, WebChecks};
pub use journal::{Damaged, FirstStart, Journal, JournalKind};
pub use kubernetes::{Kubernetes, ServicePort, ServiceRef};
pub use limits::Limits;
pub use log_filter::LogFilter;
pub use node::{HEADER_LIMIT, MAX_WEIGHT, NodeFacts, is_host_port};
pub use process::{AccessFormat, Admin, Log, LogFormat, Runtime, ShutdownTimes};
pub use purge::{PurgeListener, WaitFor};
pub use remarks::stray_agent_variables;
pub use settings::{Section, Setting, sections};
pub use source::{ConfigSource, ConfigText, NamedFiles};
pub use timeouts::Timeouts;
pub use token::{Token, TokenError};
pub use traces::Traces;
pub use url::ServerUrl;
pub use vcl::{VclBackends, VclDirector, VclMode, VclPushing};

use check::{Violation, read_token};
use error::ErrorReport;
use raw::Raw;

/// Everything that can be configured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Client traffic to Varnish.
    pub edge: Edge,
    /// Varnish's own requests to the web nodes.
    pub origin: Origin,
    /// What a client, or an answer, may take.
    pub limits: Limits,
    /// How long the traffic waits.
    pub timeouts: Timeouts,
    /// Purges from Magento to every Varnish.
    pub purge: PurgeListener,
    /// Metrics, status page and API.
    pub admin: Admin,
    /// Where nodes are learnt from.
    pub registry: Registry,
    /// Who this clearcoat is among several.
    pub replica: Replica,
    /// Nodes that are always there.
    #[serde(rename = "node")]
    pub nodes: Vec<StaticNode>,
    /// Where accepted purges are kept.
    pub journal: Journal,
    /// How nodes are checked.
    pub health: HealthChecks,
    /// The VCL that is pushed to each Varnish.
    pub vcl: VclPushing,
    /// Threads.
    pub runtime: Runtime,
    /// How long the process takes to end.
    pub shutdown: ShutdownTimes,
    /// What is logged and how.
    pub log: Log,
    /// What is told to a collector of OpenTelemetry.
    pub traces: Traces,
}

impl Config {
    /// Reads the file and the environment.
    ///
    /// The file is `path`, else what `CLEARCOAT_CONFIG` names, else `clearcoat.toml` in the working directory if
    /// there is one. Variables override the file: `CLEARCOAT_EDGE__LISTEN` for `edge.listen`; a TOML array
    /// of inline tables in `CLEARCOAT_NODE` for all `[[node]]` tables, and in `CLEARCOAT_EDGE__TLS` for all
    /// `[[edge.tls]]` tables. Variables without `__` are somebody else's:
    /// Kubernetes sets `CLEARCOAT_PORT` and its like in every pod beside a service of that name.
    ///
    /// # Errors
    /// [`ConfigErrors`] holds everything that is wrong, not only the first thing.
    pub fn load(path: Option<&Path>, env: impl Iterator<Item = (String, String)>) -> Result<Self, ConfigErrors> {
        ConfigSource::new(path.map(Path::to_owned), env).load()
    }

    /// The effective configuration as TOML, every key written out. Secrets stay in their files.
    ///
    /// # Errors
    /// What cannot be written as TOML, such as a path that is not UTF-8.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    fn assemble(
        file: Option<(String, &str)>,
        env: Vec<(String, String)>,
        files: NamedFiles,
    ) -> Result<Self, ConfigErrors> {
        let mut raw = match &file {
            Some((name, text)) => Raw::from_toml(text).map_err(|error| ConfigError::syntax(name, text, &error))?,
            None => Raw::empty(),
        };
        let mut report = ErrorReport::new(file);
        for (variable, reason) in raw.override_from(env) {
            report.push(ConfigError::Variable { variable, reason });
        }
        let mut config = Self::read(&mut raw, &mut report);
        config.fill_in(&raw);
        for violation in config.check() {
            report.violation(&raw, &config, violation);
        }
        if files == NamedFiles::Here {
            for violation in config.read_files() {
                report.violation(&raw, &config, violation);
            }
        }
        report.finish(config)
    }

    /// Reads the tokens, and sees whether every other file can be read that is wanted at the start.
    fn read_files(&mut self) -> Vec<Violation> {
        let mut violations = self.unreadable_files();
        match read_token("purge.token_file", self.purge.token_file.as_deref()) {
            Ok(token) => self.purge.token = token,
            Err(violation) => violations.push(violation),
        }
        match read_token("admin.token_file", self.admin.token_file.as_deref()) {
            Ok(token) => self.admin.token = token,
            Err(violation) => violations.push(violation),
        }
        violations
    }

    /// Every key that holds a value and not a table, such as `edge.listen`.
    pub(crate) fn keys() -> Vec<String> {
        fn walk(value: &toml::Value, path: &str, keys: &mut Vec<String>) {
            match value {
                toml::Value::Table(entries) => {
                    let dot = if path.is_empty() { "" } else { "." };
                    entries.iter().for_each(|(name, value)| walk(value, &format!("{path}{dot}{name}"), keys));
                }
                _ => keys.push(path.to_owned()),
            }
        }
        // Tables of headers are left out while they are empty.
        let mut keys = vec!["purge.headers".to_owned(), "traces.headers".to_owned()];
        // Defaults are text, numbers and lists, which TOML takes.
        if let Ok(defaults) = toml::Value::try_from(Config::default()) {
            walk(&defaults, "", &mut keys);
        }
        keys
    }

    /// Reads all that can be read. The rest is reported and taken out of the tree, and its default stands in for it.
    fn read(raw: &mut Raw, report: &mut ErrorReport) -> Self {
        loop {
            let (path, reason) = match read::read(raw) {
                Ok(config) => return config,
                Err(error) => error,
            };
            report.unread(raw, &path, &reason);
            if !raw.remove(&path) {
                return Config::default();
            }
        }
    }

    /// Whether anything of this clearcoat is in etcd.
    pub fn uses_etcd(&self) -> bool {
        self.registry.kind == RegistryKind::Etcd || self.journal.kind == JournalKind::Etcd
    }

    /// Writes out the defaults that depend on other keys, and leaves one way to say one thing.
    fn fill_in(&mut self, written: &Raw) {
        self.edge.offload_header.take_if(|header| header.eq_ignore_ascii_case("X-Forwarded-Proto"));
        if !written.has(&["journal", "kind"]) && self.registry.kind == RegistryKind::Etcd {
            self.journal.kind = JournalKind::Etcd;
        }
        for node in &mut self.nodes {
            if node.role == crate::fleet::Role::Varnish {
                node.delivery.get_or_insert_default();
                node.header_limit.get_or_insert(crate::fleet::DEFAULT_HEADER_LIMIT);
            }
        }
    }
}

#[cfg(test)]
mod tests;
