//! The rules for one node, whatever its source: the configuration file, or a record in a registry.
//!
//! They are stated once, so that a node that may stand in the file may stand in a registry, and is refused there in the
//! same words.

use std::ops::RangeInclusive;

use crate::fleet::{Role, SendProxy};

/// The largest weight of a node.
pub const MAX_WEIGHT: u32 = 65_535;

/// What the longest header that a Varnish takes may be, in bytes.
pub const HEADER_LIMIT: RangeInclusive<usize> = 512..=65_536;

/// What the rules look at.
#[derive(Clone, Copy, Debug)]
pub struct NodeFacts<'a> {
    /// Its role.
    pub role: Role,
    /// `HOST:PORT`.
    pub address: &'a str,
    /// Its share of the traffic.
    pub weight: u32,
    /// Whether its purge dialect is configured.
    pub has_delivery: bool,
    /// The longest value of one request header, if configured.
    pub header_limit: Option<usize>,
    /// Whether connections to it start with a PROXY header.
    pub send_proxy: SendProxy,
}

impl NodeFacts<'_> {
    /// Every broken rule: the field at fault, what is wrong with it and what is allowed.
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        let mut faults = Vec::new();
        let mut require = |holds: bool, name, reason: &dyn Fn() -> String| {
            if !holds {
                faults.push((name, reason()));
            }
        };
        let is_varnish = self.role == Role::Varnish;
        require(is_host_port(self.address), "address", &|| {
            "wanted HOST:PORT such as 192.0.2.11:6081, [2001:db8::1]:80 or web-1.shop.example:80".to_owned()
        });
        require(self.weight <= MAX_WEIGHT, "weight", &|| format!("must be 0 to {MAX_WEIGHT}"));
        for (name, is_set) in [("delivery", self.has_delivery), ("header_limit", self.header_limit.is_some())] {
            require(!is_set || is_varnish, name, &|| "only for nodes of role varnish".to_owned());
        }
        let in_bounds = !is_varnish || self.header_limit.is_none_or(|limit| HEADER_LIMIT.contains(&limit));
        require(in_bounds, "header_limit", &|| {
            format!("must be {} to {} bytes", HEADER_LIMIT.start(), HEADER_LIMIT.end())
        });
        require(self.send_proxy == SendProxy::Off || is_varnish, "send_proxy", &|| {
            "only for nodes of role varnish; a web node takes \"off\"".to_owned()
        });
        faults
    }
}

/// Whether an address has a host and a port. Whether the host exists is found out when it is resolved.
pub fn is_host_port(address: &str) -> bool {
    let Some((host, port)) = address.rsplit_once(':') else { return false };
    let is_port = port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port != 0);
    let is_host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b)),
    };
    is_port && is_host
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for good in ["10.0.0.5:80", "[fd00::5]:80", "web-1.shop.svc:65535", "web_1:1"] {
            assert!(is_host_port(good), "{good}");
        }
        for bad in ["", "web-1", ":80", "web-1:", "web-1:0", "web-1:65536", "fd00::5:80", "[x]:80", "a b:80", "a:+1"] {
            assert!(!is_host_port(bad), "{bad}");
        }
    }
}
