//! `[health.web]` and `[health.varnish]`: how nodes are checked.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::optional::empty_is_none;
use super::text;

/// `[health]`: one table of checks for each role.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HealthChecks {
    /// Checks of the web nodes.
    pub web: WebChecks,
    /// Checks of the Varnish nodes.
    pub varnish: VarnishChecks,
}

/// `[health.web]`: an HTTP request that a healthy web node answers as expected.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WebChecks {
    /// The path that is asked for. Default `/health_check.php`, which Magento ships.
    pub path: String,
    /// Time between two checks of a node, at least 10ms. Default 5s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub interval: Duration,
    /// Time after which a check has failed, at most `interval`. Default 2s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub timeout: Duration,
    /// Passes in a row that bring a node up. At least 1, default 2.
    pub rise: u32,
    /// Failures in a row that take a node down. At least 1, default 3.
    pub fall: u32,
    /// How much of the interval is random, as a share from 0 to 0.5, so that checks do not come all at once.
    /// Default 0.1.
    pub jitter: f64,
    /// Status codes that pass, 100 to 599. Default `[200]`.
    pub expect: Vec<u16>,
    /// For how long the share of a node grows from a tenth to the whole after it came (back) into traffic, at most 1h.
    /// `0s` is off. Default 5s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub slow_start: Duration,
    /// The `Host` header of the check; empty (the default) sends the address of the node.
    #[serde(with = "empty_is_none")]
    pub host: Option<String>,
    /// The share of healthy web nodes, 0 to 1, below which health is ignored and all get traffic. Default 0.5.
    pub panic_threshold: f64,
}

impl Default for WebChecks {
    fn default() -> Self {
        WebChecks {
            path: "/health_check.php".to_owned(),
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(2),
            rise: 2,
            fall: 3,
            jitter: 0.1,
            expect: vec![200],
            slow_start: Duration::from_secs(5),
            host: None,
            panic_threshold: 0.5,
        }
    }
}

/// `[health.varnish]`: whether a Varnish answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VarnishChecks {
    /// Time between two checks of a node, at least 10ms. Default 1s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub interval: Duration,
    /// Time after which a check has failed, at most `interval`. Default 500ms.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub timeout: Duration,
    /// Passes in a row that bring a node up. At least 1, default 2.
    pub rise: u32,
    /// Failures in a row that take a node down. At least 1, default 2.
    pub fall: u32,
    /// How much of the interval is random, as a share from 0 to 0.5. Default 0.1.
    pub jitter: f64,
    /// For how long the share of a node grows from a tenth to the whole after it came (back) into traffic, at most 1h.
    /// `0s` is off. Default 5s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub slow_start: Duration,
    /// Whether it is tried, with a page of clearcoat's own, that purges take pages out of a node. Default true.
    pub trial: bool,
    /// The port at which each varnishd is managed (`-T`) whose `[[node]]` names none, for `clearcoat doctor`; also of nodes of a
    /// registry. Default 0: none.
    pub management_port: u16,
    /// The file with the secret of those ports (`-S`). Default: none.
    #[serde(with = "empty_is_none")]
    pub management_secret_file: Option<PathBuf>,
}

impl Default for VarnishChecks {
    fn default() -> Self {
        VarnishChecks {
            interval: Duration::from_secs(1),
            timeout: Duration::from_millis(500),
            rise: 2,
            fall: 2,
            jitter: 0.1,
            slow_start: Duration::from_secs(5),
            trial: true,
            management_port: 0,
            management_secret_file: None,
        }
    }
}
