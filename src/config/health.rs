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
    /// The same of a node that is down, at least 10ms; `0s` (the default) is as `interval`.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub interval_down: Duration,
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
    /// Text that must be in the first 64 KiB of the answer, as it is written here; empty (the default) is none.
    #[serde(with = "empty_is_none")]
    pub expect_body: Option<String>,
    /// For how long the share of a node grows from a tenth to the whole after it came (back) into traffic, at most 1h.
    /// `0s` is off. Default 5s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub slow_start: Duration,
    /// The `Host` header of the check; empty (the default) sends the address of the node.
    #[serde(with = "empty_is_none")]
    pub host: Option<String>,
    /// The share of healthy web nodes, 0 to 1, below which health is ignored and all get traffic. Default 0.5.
    pub panic_threshold: f64,
    /// Requests in a row, over at least a second, that a node fails before it gets none for a while, whatever its checks say:
    /// no connection, no answer, one that is too slow, malformed or cut off, or has a status of `eject_statuses`. Nobody is ejected
    /// when more nodes fail than may be out (`max_ejected`). `0` is off. Default 5, as with Envoy.
    pub eject_after: u32,
    /// For how long a node is ejected the first time, 1s to 1h; each further time for so much longer. Each such time in traffic
    /// takes one step back. Default 30s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub eject_for: Duration,
    /// The longest time of an ejection, `eject_for` to 24h. Default 5m.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub eject_for_max: Duration,
    /// The share of the nodes in traffic that may be ejected at once, 0 to 1: one at least if it is above 0, and one always stays.
    /// Default 0.5.
    pub max_ejected: f64,
    /// Status codes of an answer that count as a failure of the node, 500 to 599. Others from 500 on say nothing, and every other
    /// answer ends the row of failures. Default `[502, 503, 504]`: a gateway's words for a PHP that is gone, full or hangs.
    pub eject_statuses: Vec<u16>,
}

impl Default for WebChecks {
    fn default() -> Self {
        WebChecks {
            path: "/health_check.php".to_owned(),
            interval: Duration::from_secs(5),
            interval_down: Duration::ZERO,
            timeout: Duration::from_secs(2),
            rise: 2,
            fall: 3,
            jitter: 0.1,
            expect: vec![200],
            expect_body: None,
            slow_start: Duration::from_secs(5),
            host: None,
            panic_threshold: 0.5,
            eject_after: 5,
            eject_for: Duration::from_secs(30),
            eject_for_max: Duration::from_secs(300),
            max_ejected: 0.5,
            eject_statuses: vec![502, 503, 504],
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
    /// The same of a node that is down, at least 10ms; `0s` (the default) is as `interval`.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub interval_down: Duration,
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
    /// Requests in a row, over at least a second, that a node fails before it gets none for a while, whatever its checks say:
    /// no connection, no answer, a malformed one, or a status of `eject_statuses`. It gets every purge meanwhile. Nobody is ejected
    /// when more nodes fail than may be out (`max_ejected`). `0` is off. Default 5, as with Envoy.
    pub eject_after: u32,
    /// For how long a node is ejected the first time, 1s to 1h; each further time for so much longer. Each such time in traffic
    /// takes one step back. Default 30s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub eject_for: Duration,
    /// The longest time of an ejection, `eject_for` to 24h. Default 5m.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub eject_for_max: Duration,
    /// The share of the nodes in traffic that may be ejected at once, 0 to 1: one at least if it is above 0, and one always stays.
    /// Default 0.5.
    pub max_ejected: f64,
    /// Status codes of an answer that count as a failure of the node, 500 to 599. Default none: those of a Varnish are its
    /// backend's, and a page that always fails is always asked of the same Varnish.
    pub eject_statuses: Vec<u16>,
    /// Whether it is tried, with a page of clearcoat's own, that purges take pages out of a node. Default true.
    pub trial: bool,
    /// The port at which each varnishd is managed (`-T`) whose `[[node]]` names none, for `clearcoat doctor` and
    /// [`VclMode::Push`](super::VclMode). Nodes of a registry are not asked there, but for `vcl.trusted_networks`. Default 0: none.
    pub management_port: u16,
    /// The file with the secret of those ports (`-S`). Default: none.
    #[serde(with = "empty_is_none")]
    pub management_secret_file: Option<PathBuf>,
}

impl Default for VarnishChecks {
    fn default() -> Self {
        VarnishChecks {
            interval: Duration::from_secs(1),
            interval_down: Duration::ZERO,
            timeout: Duration::from_millis(500),
            rise: 2,
            fall: 2,
            jitter: 0.1,
            slow_start: Duration::from_secs(5),
            eject_after: 5,
            eject_for: Duration::from_secs(30),
            eject_for_max: Duration::from_secs(300),
            max_ejected: 0.5,
            eject_statuses: Vec::new(),
            trial: true,
            management_port: 0,
            management_secret_file: None,
        }
    }
}
