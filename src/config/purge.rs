//! `[purge]`: the listener that takes Magento's purges.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::optional::empty_is_none;
use super::{Token, headers, text};
use crate::fleet::SecretHeaders;
use crate::purge::PurgeRules;

/// `[purge]`: Magento to every Varnish.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PurgeListener {
    /// Where purges arrive; port 0 takes any free port. Default `["0.0.0.0:6081"]`.
    #[serde(deserialize_with = "text::list")]
    pub listen: Vec<SocketAddr>,
    /// Networks that may purge; a bare address is one host. Default: loopback and the private networks.
    #[serde(deserialize_with = "text::list", serialize_with = "text::write_list")]
    pub allow: Vec<IpNet>,
    /// The methods that purge, as they are written on the wire. `PURGE` is one; requests with another are repeated to
    /// every Varnish as they came, and none of them passes the edge. Default `["PURGE", "BAN"]`.
    pub methods: Vec<String>,
    /// Header fields that every purge and every health check to any Varnish carries, for a VCL that knows by them who may
    /// purge. A value is text or `{ file = "…" }`; `node.headers` counts before it. Default: none.
    #[serde(deserialize_with = "headers::table", skip_serializing_if = "SecretHeaders::is_empty")]
    pub headers: SecretHeaders,
    /// A file with the bearer token that a purge must carry as well; empty (the default) wants none.
    #[serde(with = "empty_is_none")]
    pub token_file: Option<PathBuf>,
    /// What stands in `token_file`. Read at load, so that a missing file is an error before the first purge.
    #[serde(skip)]
    pub token: Option<Token>,
    /// How long a purge waits for the Varnish nodes before it fences those that have not answered and is answered
    /// itself. Above 0, at most 60s, default 1s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub ack_timeout: Duration,
    /// Bans a second for one Varnish, with a burst of one second's worth; above it purges gather and go out as one, for
    /// a quarter of `ack_timeout` at most. Purges by key and forwarded requests are not bans. 0 is no
    /// limit, default 20.
    pub max_bans_per_second: u32,
    /// How long after its acknowledgement a purge is sent to every Varnish once more, for a Varnish that fetches pages
    /// past the origin listener; at most `journal.retention`. Default 0s: never.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub settle: Duration,
    /// Who has to know a purge of tags before it is answered. Default `edge`.
    pub wait_for: WaitFor,
    /// How long purges gather that need not wait for Varnish, before they are sent as few bans; a reader who meets an old page
    /// hurries them. At most 60s, default 1s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub gather: Duration,
    /// The most that one purge request may have, head and body together, in bytes; beyond it the answer is 413.
    /// 1024 to 16777216 (16 MiB), default 1048576 (1 MiB).
    pub max_request: usize,
}

impl Default for PurgeListener {
    fn default() -> Self {
        let v4 = |a, b, length| IpNet::new_assert([a, b, 0, 0].into(), length);
        let v6 = |first, last, length| IpNet::new_assert([first, 0, 0, 0, 0, 0, 0, last].into(), length);
        PurgeListener {
            listen: vec![SocketAddr::from(([0, 0, 0, 0], 6081))],
            allow: vec![
                v4(127, 0, 8),
                v6(0, 1, 128),
                v4(10, 0, 8),
                v4(172, 16, 12),
                v4(192, 168, 16),
                v6(0xfc00, 0, 7),
            ],
            methods: PurgeRules::default().methods,
            headers: SecretHeaders::default(),
            token_file: None,
            token: None,
            ack_timeout: Duration::from_secs(1),
            max_bans_per_second: 20,
            settle: Duration::ZERO,
            wait_for: WaitFor::Edge,
            gather: Duration::from_secs(1),
            max_request: 1 << 20,
        }
    }
}

/// Who has to know a purge of tags before it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitFor {
    /// The edge: it throws away what is older, until each Varnish has the purge. For readers who all come through it. Without
    /// `edge.seal` it is every Varnish all the same.
    Edge,
    /// Every Varnish, as far as it answers within `ack_timeout`. For readers who reach a Varnish past the edge.
    Varnish,
}

impl PurgeListener {
    /// What this listener takes for a purge.
    pub fn rules(&self) -> PurgeRules {
        let withheld = self.headers.iter().map(|(name, _)| name.to_ascii_lowercase()).collect();
        PurgeRules { methods: self.methods.clone(), withheld, ..PurgeRules::default() }
    }
}
