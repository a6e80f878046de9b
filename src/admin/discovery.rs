//! The nodes for Prometheus, which asks for them itself (HTTP service discovery,
//! prometheus.io/docs/prometheus/latest/http_sd): so whoever watches the fleet learns of a new node when clearcoat does.
//!
//! A node does not say which exporters run beside it. Its label `prometheus_port` does, or the request says it for all.

use std::net::SocketAddr;

use serde::Serialize;

use crate::fleet::{Member, Role, Snapshot};
use crate::http_server::{Response, json, text};

/// The path of the list.
pub(super) const PATH: &str = "/sd/prometheus";

/// The label of a node that holds the port of its exporter.
const PORT: &str = "prometheus_port";

/// One node, as Prometheus reads it.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct TargetGroup<'a> {
    targets: [String; 1],
    labels: TargetLabels<'a>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct TargetLabels<'a> {
    role: Role,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    zone: Option<&'a str>,
}

/// What a request asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct TargetQuery {
    role: Option<Role>,
    /// The port of nodes without a label.
    port: Option<u16>,
}

impl TargetQuery {
    /// Reads `role=varnish&port=9131`, either of which may be missing. The error names what is allowed.
    fn parse(query: Option<&str>) -> Result<Self, String> {
        let mut wanted = TargetQuery::default();
        for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=').unwrap_or((pair, "")) {
                ("role", "web") => wanted.role = Some(Role::Web),
                ("role", "varnish") => wanted.role = Some(Role::Varnish),
                ("port", port) => {
                    let read = port.parse().ok().filter(|port| *port > 0);
                    wanted.port = Some(read.ok_or_else(|| format!("port={port}: a port is 1 to 65535\n"))?);
                }
                (name, value) => {
                    return Err(format!("{name}={value}: there are role=web, role=varnish and port=NUMBER\n"));
                }
            }
        }
        Ok(wanted)
    }
}

/// The list of nodes that have an exporter, whatever their health.
pub(super) fn targets(fleet: &Snapshot, query: Option<&str>) -> Response {
    match TargetQuery::parse(query) {
        Ok(wanted) => json(200, &groups(fleet, &wanted)),
        Err(problem) => text(400, problem),
    }
}

fn groups<'f>(fleet: &'f Snapshot, wanted: &TargetQuery) -> Vec<TargetGroup<'f>> {
    let members = fleet.varnish.members().iter().chain(fleet.web.members());
    let groups = members.filter_map(|Member { node, .. }| {
        let spec = &node.spec;
        // Prometheus shows a port that is none as the error of this target.
        let port = spec.labels.get(PORT).cloned().or_else(|| Some(wanted.port?.to_string()))?;
        let labels = TargetLabels { role: spec.role(), id: spec.id.as_str(), zone: spec.zone.as_deref() };
        Some(TargetGroup { targets: [at_port(spec.address, &port)], labels })
    });
    groups.filter(|group| wanted.role.is_none_or(|role| role == group.labels.role)).collect()
}

/// The host of an address, with another port.
fn at_port(address: SocketAddr, port: &str) -> String {
    match address {
        SocketAddr::V4(address) => format!("{}:{port}", address.ip()),
        SocketAddr::V6(address) => format!("[{}]:{port}", address.ip()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_says_which_nodes_and_which_port_and_nothing_else() {
        let read = |query| TargetQuery::parse(query);
        assert_eq!(read(None), Ok(TargetQuery::default()));
        let both = TargetQuery { role: Some(Role::Varnish), port: Some(9131) };
        assert_eq!(read(Some("role=varnish&port=9131")), Ok(both));
        for (query, problem) in [
            ("role=cache", "role=cache: there are role=web, role=varnish and port=NUMBER\n"),
            ("zone=a", "zone=a: there are role=web, role=varnish and port=NUMBER\n"),
            ("port=0", "port=0: a port is 1 to 65535\n"),
            ("port=99999", "port=99999: a port is 1 to 65535\n"),
        ] {
            assert_eq!(read(Some(query)), Err(problem.to_owned()));
        }
    }

    #[test]
    fn an_address_keeps_its_brackets() {
        let at = |address: &str| at_port(address.parse().unwrap(), "9131");
        assert_eq!([at("192.0.2.1:80"), at("[2001:db8::1]:80")], ["192.0.2.1:9131", "[2001:db8::1]:9131"]);
    }
}
