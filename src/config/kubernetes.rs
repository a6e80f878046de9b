//! `[registry.kubernetes]`: the services whose pods are the nodes, and the API server that knows them.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::optional::empty_is_none;
use super::text::{self, FromText};
use super::url::ServerUrl;

/// `[registry.kubernetes]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Kubernetes {
    /// The services whose pods are web nodes.
    #[serde(deserialize_with = "text::list", serialize_with = "text::write_list")]
    pub web: Vec<ServiceRef>,
    /// The same for Varnish nodes.
    #[serde(deserialize_with = "text::list", serialize_with = "text::write_list")]
    pub varnish: Vec<ServiceRef>,
    /// The namespace of services that are named without one. Empty (the default): that of the pod in which this runs.
    #[serde(with = "empty_is_none")]
    pub namespace: Option<String>,
    /// Whether the cache of a Varnish ends with its pod, so that another pod of the same name is an empty cache. Default
    /// false: a cache that is on a volume would be believed to be empty, and is not.
    pub cache_ends_with_pod: bool,
    /// The API server. Empty (the default): that of the cluster in which this is a pod.
    #[serde(with = "empty_or_url")]
    pub url: Option<ServerUrl>,
    /// A file with the bearer token, read again for each request. Empty (the default): that of the service account; none if
    /// `url` is set.
    #[serde(with = "empty_is_none")]
    pub token_file: Option<PathBuf>,
    /// A file with the CAs of the API server's certificate, in PEM. Empty (the default): that of the service account; those
    /// that this system trusts if `url` is set.
    #[serde(with = "empty_is_none")]
    pub ca: Option<PathBuf>,
}

/// A service, and the port of its pods: `SERVICE`, `SERVICE:PORT` or `NAMESPACE/SERVICE:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRef {
    /// `None`: [`Kubernetes::namespace`].
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
    /// The port.
    pub port: ServicePort,
}

/// A port of the pods of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServicePort {
    /// The only one that the service has.
    Only,
    /// The one with this name in the service.
    Named(String),
    /// This number of the pods (`targetPort`), not that of the service.
    Number(u16),
}

impl fmt::Display for ServiceRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(namespace) = &self.namespace {
            write!(f, "{namespace}/")?;
        }
        f.write_str(&self.name)?;
        match &self.port {
            ServicePort::Only => Ok(()),
            ServicePort::Named(name) => write!(f, ":{name}"),
            ServicePort::Number(number) => write!(f, ":{number}"),
        }
    }
}

impl FromText for ServiceRef {
    const WANTED: &'static str = "SERVICE, SERVICE:PORT or NAMESPACE/SERVICE:PORT such as varnish:http or shop/varnish:6081; PORT \
                                  is a name in the service, or the number of the pods";

    fn from_text(text: &str) -> Option<Self> {
        let (namespace, rest) = match text.split_once('/') {
            Some((namespace, rest)) => (Some(namespace), rest),
            None => (None, text),
        };
        let (name, port) = match rest.split_once(':') {
            None => (rest, ServicePort::Only),
            Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => {
                (name, ServicePort::Number(port.parse().ok().filter(|number| *number != 0)?))
            }
            Some((name, port)) => (name, ServicePort::Named(port.to_owned())),
        };
        let are_labels = [namespace, Some(name)].into_iter().flatten().all(is_label);
        let is_port = !matches!(&port, ServicePort::Named(name) if !is_label(name));
        (are_labels && is_port).then(|| ServiceRef {
            namespace: namespace.map(str::to_owned),
            name: name.to_owned(),
            port,
        })
    }
}

/// Whether this is a label of DNS (RFC 1123), as names of namespaces, services and their ports are.
pub(super) fn is_label(name: &str) -> bool {
    let is_of_label = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&name.len()) && name.bytes().all(is_of_label) && !name.starts_with('-') && !name.ends_with('-')
}

/// Empty, or the URL of an API server.
mod empty_or_url {
    use super::*;

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<ServerUrl>, D::Error> {
        text::one(deserializer).map(|MaybeApiServer(url)| url)
    }

    pub(super) fn serialize<S: Serializer>(url: &Option<ServerUrl>, serializer: S) -> Result<S::Ok, S::Error> {
        match url {
            Some(url) => serializer.collect_str(url),
            None => serializer.serialize_str(""),
        }
    }
}

struct MaybeApiServer(Option<ServerUrl>);

impl FromText for MaybeApiServer {
    const WANTED: &'static str = "https://HOST[:PORT] or http://HOST:PORT of an API server of Kubernetes, such as \
                                  https://203.0.113.1:6443; empty: that of the cluster in which this is a pod";

    fn from_text(text: &str) -> Option<Self> {
        if text.is_empty() {
            return Some(MaybeApiServer(None));
        }
        ServerUrl::parse(text).map(|url| MaybeApiServer(Some(url)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_named_with_or_without_its_namespace_and_port() {
        let read = |text: &str| ServiceRef::from_text(text);
        for good in ["varnish", "varnish:http", "varnish:6081", "shop/varnish:http", "shop/varnish", "a:8080-tcp"] {
            assert_eq!(read(good).unwrap().to_string(), good);
        }
        assert_eq!(read("shop/varnish:6081").unwrap().port, ServicePort::Number(6081));
        assert_eq!(read("varnish").unwrap().port, ServicePort::Only);
        for bad in [
            "",
            "/varnish",
            "shop/",
            "varnish:",
            "varnish:0",
            "varnish:65536",
            "Varnish",
            "varnish.shop",
            "a/b/c",
            "varnish:http:80",
            "-a",
            "a_b",
            "varnish:ht tp",
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
