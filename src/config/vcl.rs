//! `[vcl]`: the VCL that is pushed to each Varnish at its management port.

use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::node::is_host_port;
use super::optional::empty_is_none;
use super::text;
use super::{Config, StaticNode};
use crate::fleet::Role;

/// `[vcl]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VclPushing {
    /// Whether each Varnish is given its VCL at its management port. Default `off`.
    pub mode: VclMode,
    /// What its backends are. Default `origin`.
    pub backends: VclBackends,
    /// The origin listeners of all clearcoats before this fleet, `HOST:PORT` as a Varnish reaches them; each clearcoat has the
    /// same list. A name is every address that it has, looked up each second. Default: `origin.listen`, where that names
    /// one address.
    pub origins: Vec<String>,
    /// Networks from which the clearcoats talk to Varnish: nobody else may purge there; a bare address is one host. Default:
    /// the addresses of `origins`.
    #[serde(deserialize_with = "text::list", serialize_with = "text::write_list")]
    pub allow: Vec<IpNet>,
    /// How a Varnish chooses among web nodes, where these are its backends. Default `random`.
    pub director: VclDirector,
    /// A VCL of the shop's own, with the lines that docs/vcl-push.md names. Default: the one of `clearcoat vcl`.
    #[serde(with = "empty_is_none")]
    pub template: Option<PathBuf>,
    /// Networks in which a Varnish that a registry names is managed, too, at `health.varnish.management_port`: whoever may
    /// register a node there can manage each Varnish with that secret. Default none.
    #[serde(deserialize_with = "text::list", serialize_with = "text::write_list")]
    pub trusted_networks: Vec<IpNet>,
}

/// Whether VCL is pushed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VclMode {
    /// Each Varnish has the VCL with which it was started.
    #[default]
    Off,
    /// Each Varnish whose management port is known gets it, again after each change and each restart.
    Push,
}

/// The backends of a VCL that is pushed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VclBackends {
    /// The origin listeners of the clearcoats, in turns: every page passes the guard and gets a seal.
    #[default]
    Origin,
    /// The web nodes themselves: no page passes clearcoat on its way to the cache.
    Web,
}

/// How a Varnish chooses among web nodes (vmod_directors(3)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VclDirector {
    /// At random, by weight.
    #[default]
    Random,
    /// In turns. Of weights only 0 counts.
    RoundRobin,
    /// By the URL, so that each page is rendered by one node. Of weights only 0 counts.
    Shard,
}

impl VclPushing {
    /// What is wrong with it, as the key in `[vcl]` and what is allowed.
    pub(super) fn violations(&self, config: &Config) -> Vec<(String, String)> {
        let mut found = Vec::new();
        let mut require = |holds: bool, key: String, reason: &str| {
            if !holds {
                found.push((key, reason.to_owned()));
            }
        };
        for (index, origin) in self.origins.iter().enumerate() {
            let reason = "wanted HOST:PORT of an origin listener as a Varnish reaches it, such as 192.0.2.5:8081";
            require(is_host_port(origin), format!("origins[{index}]"), reason);
        }
        if self.mode == VclMode::Off {
            return found;
        }
        let manages = |node: &StaticNode| node.role == Role::Varnish && node.management.is_some();
        let is_managed = config.health.varnish.management_port != 0 || config.nodes.iter().any(manages);
        let reason =
            "push needs to know where varnishd is managed: health.varnish.management_port, or management in a [[node]]";
        require(is_managed, "mode".to_owned(), reason);
        let has_port = self.trusted_networks.is_empty() || config.health.varnish.management_port != 0;
        require(has_port, "trusted_networks".to_owned(), "only with health.varnish.management_port");
        match self.backends {
            VclBackends::Origin => {
                let listens =
                    config.origin.listen.first().is_some_and(|one| !one.ip().is_unspecified() && one.port() != 0);
                let reason = "must say how a Varnish reaches this clearcoat, and each other one: origin.listen names no \
                              address of its own";
                require(!self.origins.is_empty() || listens, "origins".to_owned(), reason);
                // Each would push a VCL with itself alone.
                let may_be_several = !config.replica.peers.is_empty() || config.uses_etcd();
                let reason =
                    "must hold the origin listeners of all clearcoats where there may be several (replica.peers, etcd)";
                require(!self.origins.is_empty() || !may_be_several, "origins".to_owned(), reason);
            }
            VclBackends::Web => {
                let reason =
                    "must hold the addresses from which the clearcoats talk to Varnish when vcl.backends is web";
                require(!self.allow.is_empty(), "allow".to_owned(), reason);
                let reason = "web goes with edge.seal = false alone: pages that do not pass clearcoat's origin have no seal, and \
                              nothing marks one that is purged while it is rendered (docs/vcl-push.md)";
                require(!config.edge.seal, "backends".to_owned(), reason);
            }
        }
        found
    }
}
