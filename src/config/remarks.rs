//! What is no error and hardly meant: said by `check`, and at the start.

use super::nearest::nearest;
use super::raw::{FILE_VARIABLE, PREFIX, is_read};
use super::{Config, RegistryKind, VclBackends, VclMode};
use crate::fleet::Role;

/// Variables that other commands read, or none of ours. The agent's are its own ([`AGENT`]).
const OTHERS: [&str; 4] = [FILE_VARIABLE, "CLEARCOAT_ADMIN", "CLEARCOAT_ENDPOINT", "CLEARCOAT_MUTANT"];

/// The start of the agent's variables.
const AGENT: &str = "CLEARCOAT_AGENT_";

/// Why variables mean nothing that look like ours.
pub(super) fn stray_variables(env: &[(String, String)], known: &[String]) -> Vec<String> {
    let stray = env.iter().map(|(name, _)| name.as_str()).filter(|name| is_stray(name));
    stray.map(|name| means_nothing(name, known)).collect()
}

/// The same for an agent, whose variables are these.
pub fn stray_agent_variables(names: impl Iterator<Item = String>, known: &[String]) -> Vec<String> {
    let stray = names.filter(|name| name.starts_with(AGENT) && !known.contains(name));
    stray.map(|name| means_nothing(&name, known)).collect()
}

fn means_nothing(name: &str, known: &[String]) -> String {
    let meant = meant_by(name, known).map(|meant| format!("; did you mean {meant}?")).unwrap_or_default();
    format!("{name}: this variable means nothing{meant}")
}

/// The variable for each of these keys.
pub(super) fn variable_of(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "__").to_uppercase())
}

fn is_stray(name: &str) -> bool {
    let upper = name.to_ascii_uppercase();
    upper.starts_with(PREFIX)
        && !is_read(name)
        && !OTHERS.contains(&name)
        && !name.starts_with(AGENT)
        && !is_of_kubernetes(name)
}

/// Whether Kubernetes sets such a variable in each pod beside a service whose name begins with `clearcoat`
/// (kubernetes.io, "Discovering services", "Environment variables").
fn is_of_kubernetes(name: &str) -> bool {
    let is_port = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let has_port = |rest: &str| {
        let mut parts = rest.split('_');
        let (port, protocol) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let last = parts.next();
        is_port(port)
            && ["TCP", "UDP", "SCTP"].contains(&protocol)
            && last.is_none_or(|last| ["ADDR", "PORT", "PROTO"].contains(&last))
            && parts.next().is_none()
    };
    name.ends_with("_SERVICE_HOST")
        || name.ends_with("_SERVICE_PORT")
        || name.contains("_SERVICE_PORT_")
        || name.ends_with("_PORT")
        || name.rmatch_indices("_PORT_").any(|(at, mark)| has_port(&name[at + mark.len()..]))
}

/// The variable that was meant: one that differs in its underscores alone, or nearly the same.
fn meant_by<'k>(name: &str, known: &'k [String]) -> Option<&'k str> {
    let levelled =
        |name: &str| -> String { name.to_ascii_uppercase().split('_').filter(|part| !part.is_empty()).collect() };
    let written = levelled(name);
    if let Some(same) = known.iter().find(|known| levelled(known) == written) {
        return Some(same);
    }
    // What all begin with says nothing.
    let near = nearest(name.get(PREFIX.len()..)?, known.iter().filter_map(|known| known.strip_prefix(PREFIX)))?;
    known.iter().map(String::as_str).find(|known| known.strip_prefix(PREFIX) == Some(near))
}

/// What nobody is there for.
pub(super) fn missing_nodes(config: &Config) -> Option<&'static str> {
    if config.registry.kind != RegistryKind::Static {
        return None;
    }
    let has = |role| config.nodes.iter().any(|node| node.role == role);
    match (has(Role::Varnish), has(Role::Web)) {
        (true, true) => None,
        (false, false) => Some(
            "no node is configured: each request is answered 503 (a [[node]] for each Varnish and web node, or registry.kind)",
        ),
        (false, true) => Some(
            "no Varnish is configured: nothing is cached, and purges go to nobody (a [[node]] with role = \"varnish\")",
        ),
        (true, false) => {
            Some("no web node is configured: what no Varnish has is answered 503 (a [[node]] with role = \"web\")")
        }
    }
}

/// A redirect that browsers do not come to.
pub(super) fn unreachable_redirect(config: &Config) -> Option<String> {
    let https = &config.edge.https;
    (https.redirect && https.hsts_max_age > 0 && https.port != 443).then(|| {
        format!(
            "edge.https.port: {}, while hsts_max_age has browsers ask port 443 by themselves for what they would ask port 80 \
             (RFC 6797 section 8.3): the shop must be there as well",
            https.port
        )
    })
}

/// What keeps a page out of the cache that is purged while it is rendered, where no page passes the guard.
pub(super) fn unguarded_pages(config: &Config) -> Option<&'static str> {
    let passes_nobody = config.vcl.mode == VclMode::Push && config.vcl.backends == VclBackends::Web;
    (passes_nobody && config.purge.settle.is_zero()).then_some(
        "vcl.backends is web, and purge.settle 0s: a page that is purged while it is rendered is stored, and stays until it is \
         purged again (purge.settle to more than the slowest page takes)",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Vec<String> {
        ["log.format", "edge.listen", "purge.allow"].map(variable_of).to_vec()
    }

    fn remarks(name: &str) -> Vec<String> {
        stray_variables(&[(name.to_owned(), "x".to_owned())], &known())
    }

    #[test]
    fn a_variable_that_means_nothing_is_named_with_the_one_that_was_meant() {
        for (name, meant) in [
            ("CLEARCOAT_LOG_FORMAT", "CLEARCOAT_LOG__FORMAT"),
            ("CLEARCOAT_EDGE_LISTEN", "CLEARCOAT_EDGE__LISTEN"),
            ("clearcoat_edge__listen", "CLEARCOAT_EDGE__LISTEN"),
            ("CLEARCOAT_PURGE_ALOW", "CLEARCOAT_PURGE__ALLOW"),
        ] {
            assert_eq!(remarks(name), [format!("{name}: this variable means nothing; did you mean {meant}?")]);
        }
        assert_eq!(remarks("CLEARCOAT_FOO"), ["CLEARCOAT_FOO: this variable means nothing"]);
    }

    #[test]
    fn pages_that_nothing_guards_are_told_of_unless_purges_are_repeated() {
        let mut config = Config::default();
        assert_eq!(unguarded_pages(&config), None);
        (config.vcl.mode, config.vcl.backends) = (VclMode::Push, VclBackends::Web);
        assert!(unguarded_pages(&config).is_some_and(|remark| remark.contains("purge.settle")));
        config.purge.settle = std::time::Duration::from_secs(5);
        assert_eq!(unguarded_pages(&config), None);
    }

    #[test]
    fn what_is_read_and_what_is_kubernetes_own_is_left_alone() {
        for name in [
            "PATH",
            "CLEARCOAT_EDGE__LISTEN",
            "CLEARCOAT_NODE",
            "CLEARCOAT_CONFIG",
            "CLEARCOAT_ADMIN",
            "CLEARCOAT_AGENT_ROLE",
            "CLEARCOAT_PORT",
            "CLEARCOAT_SERVICE_HOST",
            "CLEARCOAT_SERVICE_PORT",
            "CLEARCOAT_SERVICE_PORT_PURGE",
            "CLEARCOAT_PORT_6081_TCP",
            "CLEARCOAT_PORT_6081_TCP_ADDR",
            "CLEARCOAT_EDGE_SERVICE_HOST",
            "CLEARCOAT_EDGE_PORT_8080_TCP_PROTO",
        ] {
            assert_eq!(remarks(name), Vec::<String>::new(), "{name}");
        }
        assert!(!is_of_kubernetes("CLEARCOAT_PORT_X_TCP") && !is_of_kubernetes("CLEARCOAT_PORT_80_TCP_NAME"));
    }
}
