//! Where the management port of a Varnish is, if we may go there.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::PushSettings;
use crate::fleet::{NodeSource, NodeSpec, Role};

/// Where a varnishd is managed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ManagementPlace {
    /// `HOST:PORT`.
    pub(super) address: String,
    pub(super) secret_file: Option<PathBuf>,
}

/// Why a Varnish is not given its VCL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WhyNotManaged {
    /// Nothing says where its port is.
    Unknown,
    /// A registry says where it is.
    Registered,
}

impl WhyNotManaged {
    /// In words.
    pub(super) fn reason(self) -> &'static str {
        match self {
            WhyNotManaged::Unknown => {
                "its VCL is not pushed: nothing says where it is managed (health.varnish.management_port, or management in its \
                 [[node]])"
            }
            WhyNotManaged::Registered => {
                "its VCL is not pushed: a registry says where it is, and its address is in no network of vcl.trusted_networks"
            }
        }
    }
}

/// The place of this Varnish.
pub(super) fn place_of(spec: &NodeSpec, settings: &PushSettings) -> Result<ManagementPlace, WhyNotManaged> {
    let checks = &settings.health.varnish;
    let at_its_host = || match checks.management_port {
        0 => Err(WhyNotManaged::Unknown),
        port => Ok(SocketAddr::new(spec.address.ip(), port).to_string()),
    };
    let shared_secret = checks.management_secret_file.clone();
    if spec.source == NodeSource::Static {
        let node = settings.nodes.iter().find(|node| node.role == Role::Varnish && node.id == spec.id);
        // It is about to leave the fleet.
        let node = node.ok_or(WhyNotManaged::Unknown)?;
        let address = node.management.clone().map_or_else(at_its_host, Ok)?;
        return Ok(ManagementPlace { address, secret_file: node.management_secret_file.clone().or(shared_secret) });
    }
    let ip = spec.address.ip().to_canonical();
    if !settings.vcl.trusted_networks.iter().any(|network| network.contains(&ip)) {
        return Err(WhyNotManaged::Registered);
    }
    Ok(ManagementPlace { address: at_its_host()?, secret_file: shared_secret })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, ConfigSource};
    use crate::fleet::NodeId;

    fn settings(trusted: &str) -> PushSettings {
        let nodes = "[{ role = \"varnish\", id = \"a\", address = \"10.0.0.1:80\" }, { role = \"varnish\", id = \"b\", address = \
                     \"b:80\", management = \"m:1\", management_secret_file = \"/s\" }]";
        let variables = [
            ("CLEARCOAT_NODE", nodes),
            ("CLEARCOAT_HEALTH__VARNISH__MANAGEMENT_PORT", "6082"),
            ("CLEARCOAT_HEALTH__VARNISH__MANAGEMENT_SECRET_FILE", "/all"),
            ("CLEARCOAT_VCL__TRUSTED_NETWORKS", trusted),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let config: Config = ConfigSource::new(None, variables.into_iter()).load_for_elsewhere().unwrap();
        PushSettings::of(&config)
    }

    fn node(source: NodeSource, id: &str, address: &str) -> NodeSpec {
        let id = NodeId::try_from(id).unwrap();
        NodeSpec { source, ..NodeSpec::new(Role::Varnish, id, address.parse().unwrap()) }
    }

    #[test]
    fn the_configuration_says_where_a_node_is_managed() {
        let settings = settings("192.0.2.0/24");
        let place = |id| place_of(&node(NodeSource::Static, id, "10.0.0.1:80"), &settings);
        let of =
            |address: &str, file: &str| Ok(ManagementPlace { address: address.into(), secret_file: Some(file.into()) });
        assert_eq!(place("a"), of("10.0.0.1:6082", "/all"));
        assert_eq!(place("b"), of("m:1", "/s"));
        assert_eq!(place("c"), Err(WhyNotManaged::Unknown));
    }

    #[test]
    fn a_registry_is_believed_in_the_networks_that_are_trusted_alone() {
        let settings = settings("192.0.2.0/24");
        for source in [NodeSource::Etcd, NodeSource::Dns, NodeSource::Kubernetes] {
            // Also under the name of a node of the configuration.
            let place = |address| place_of(&node(source, "a", address), &settings);
            assert_eq!(place("10.0.0.1:80"), Err(WhyNotManaged::Registered));
            assert_eq!(place("192.0.2.9:80").map(|place| place.address), Ok("192.0.2.9:6082".to_owned()));
            assert_eq!(place("[::ffff:192.0.2.9]:80").map(|_| ()), Ok(()));
        }
    }
}
