//! A question: a configured name, and the fully qualified names that it expands to.

use std::fmt;
use std::net::SocketAddr;

use crate::fleet::Role;

/// One name of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DnsQuestion {
    /// The role of its nodes.
    pub(super) role: Role,
    pub(super) what: QuestionKind,
}

/// The kind of the query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum QuestionKind {
    /// `NAME:PORT`: addresses; each is a node with this port.
    Addresses { name: String, port: u16 },
    /// `_SERVICE._PROTO.NAME`: services; each is a node.
    Services { name: String },
    /// An address instead of a name: there is nothing to ask.
    Nothing(SocketAddr),
}

impl DnsQuestion {
    /// Parses a configured name, which was validated with the configuration.
    pub(super) fn new(role: Role, text: &str) -> Self {
        let name_and_port = text.rsplit_once(':').and_then(|(name, port)| Some((name.to_owned(), port.parse().ok()?)));
        let what = match (text.parse(), name_and_port) {
            (Ok(address), _) => QuestionKind::Nothing(address),
            (_, Some((name, port))) => QuestionKind::Addresses { name, port },
            _ => QuestionKind::Services { name: text.to_owned() },
        };
        DnsQuestion { role, what }
    }
}

impl fmt::Display for DnsQuestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.what {
            QuestionKind::Addresses { name, port } => write!(f, "{name}:{port}"),
            QuestionKind::Services { name } => f.write_str(name),
            QuestionKind::Nothing(address) => address.fmt(f),
        }
    }
}

/// How the system completes names: `search` and `ndots` of resolv.conf(5).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Search {
    pub(super) domains: Vec<String>,
    pub(super) dots: usize,
}

impl Search {
    /// The fully qualified names to query for a name, each with its final dot, in the order of the queries.
    pub(super) fn complete(&self, name: &str) -> Vec<String> {
        if name.ends_with('.') {
            return vec![name.to_owned()];
        }
        let mut names: Vec<String> = Vec::new();
        let domains = self.domains.iter().map(|domain| domain.trim_matches('.')).filter(|domain| !domain.is_empty());
        names.extend(domains.map(|domain| format!("{name}.{domain}.")));
        let is_whole = name.matches('.').count() >= self.dots;
        names.insert(if is_whole { 0 } else { names.len() }, format!("{name}."));
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_asks_for_addresses_or_for_services() {
        let what = |text| DnsQuestion::new(Role::Web, text).what;
        assert_eq!(what("web.shop:80"), QuestionKind::Addresses { name: "web.shop".into(), port: 80 });
        assert_eq!(what("_http._tcp.shop"), QuestionKind::Services { name: "_http._tcp.shop".into() });
        assert_eq!(what("10.0.0.5:80"), QuestionKind::Nothing("10.0.0.5:80".parse().unwrap()));
        assert_eq!(what("[fd00::5]:80"), QuestionKind::Nothing("[fd00::5]:80".parse().unwrap()));
        for text in ["web.shop:80", "_http._tcp.shop", "[fd00::5]:80"] {
            assert_eq!(DnsQuestion::new(Role::Web, text).to_string(), text);
        }
    }

    #[test]
    fn a_name_is_completed_as_the_system_does() {
        let domains = ["shop.svc.cluster.local", "svc.cluster.local."].map(str::to_owned).into();
        let kubernetes = Search { domains, dots: 5 };
        assert_eq!(
            kubernetes.complete("varnish"),
            ["varnish.shop.svc.cluster.local.", "varnish.svc.cluster.local.", "varnish."]
        );
        assert_eq!(
            kubernetes.complete("_http._tcp.varnish.shop.svc.cluster")[0],
            "_http._tcp.varnish.shop.svc.cluster."
        );
        assert_eq!(kubernetes.complete("varnish.shop."), ["varnish.shop."]);
        assert_eq!(Search::default().complete("varnish"), ["varnish."]);
    }
}
