//! `[traces]`: what is told to a collector of OpenTelemetry.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::node::is_host_port;
use super::text::{self, FromText};

const SCHEME: &str = "http://";

/// Where OTLP over HTTP wants traces, at a collector that says nothing else.
const DEFAULT_PATH: &str = "/v1/traces";

/// `[traces]`: spans of requests and purges.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Traces {
    /// The collector, which takes OTLP over HTTP. Empty (the default): no span is made, and `traceparent` passes as any field.
    #[serde(with = "empty_or_one")]
    pub endpoint: Option<OtlpEndpoint>,
    /// The share of requests and purges that are exported, 0 to 1, where no trusted proxy has decided. Default 1.
    pub sample: f64,
    /// `service.name` of all spans. Default `clearcoat`.
    pub service_name: String,
}

impl Default for Traces {
    fn default() -> Self {
        Traces { endpoint: None, sample: 1.0, service_name: "clearcoat".to_owned() }
    }
}

/// A collector: `http://HOST:PORT/PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtlpEndpoint {
    host_port: String,
    path: String,
}

impl OtlpEndpoint {
    /// The `HOST:PORT`.
    pub fn host_port(&self) -> &str {
        &self.host_port
    }

    /// Where spans are posted.
    pub fn path(&self) -> &str {
        &self.path
    }
}

impl fmt::Display for OtlpEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}{}", self.host_port, self.path)
    }
}

impl FromText for OtlpEndpoint {
    const WANTED: &'static str = "http://HOST:PORT of a collector that takes OTLP over HTTP, such as http://collector:4318; without a path, /v1/traces";

    fn from_text(text: &str) -> Option<Self> {
        let rest = text.strip_prefix(SCHEME)?;
        let (host_port, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let path = if matches!(path, "" | "/") { DEFAULT_PATH } else { path };
        let is_path = path.bytes().all(|byte| byte.is_ascii_graphic() && !b"?#\"<>\\^`{|}".contains(&byte));
        (is_path && is_host_port(host_port))
            .then(|| OtlpEndpoint { host_port: host_port.to_owned(), path: path.to_owned() })
    }
}

/// Empty, or an endpoint.
mod empty_or_one {
    use super::*;

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<OtlpEndpoint>, D::Error> {
        text::one(deserializer).map(|MaybeEndpoint(endpoint)| endpoint)
    }

    pub(super) fn serialize<S: Serializer>(endpoint: &Option<OtlpEndpoint>, serializer: S) -> Result<S::Ok, S::Error> {
        match endpoint {
            Some(endpoint) => serializer.collect_str(endpoint),
            None => serializer.serialize_str(""),
        }
    }
}

struct MaybeEndpoint(Option<OtlpEndpoint>);

impl FromText for MaybeEndpoint {
    const WANTED: &'static str = OtlpEndpoint::WANTED;

    fn from_text(text: &str) -> Option<Self> {
        if text.is_empty() {
            return Some(MaybeEndpoint(None));
        }
        OtlpEndpoint::from_text(text).map(|endpoint| MaybeEndpoint(Some(endpoint)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_read_with_and_without_a_path() {
        let shown = |text| OtlpEndpoint::from_text(text).map(|endpoint| endpoint.to_string());
        for (text, expected) in [
            ("http://collector:4318", "http://collector:4318/v1/traces"),
            ("http://[::1]:4318/", "http://[::1]:4318/v1/traces"),
            ("http://127.0.0.1:80/otlp/v1/traces", "http://127.0.0.1:80/otlp/v1/traces"),
        ] {
            assert_eq!(shown(text).as_deref(), Some(expected), "{text}");
        }
        for bad in [
            "collector:4318",
            "https://collector:4318",
            "http://collector",
            "http://u@c:1",
            "http://c:1/a?b",
            "http://c:1/a b",
        ] {
            assert_eq!(shown(bad), None, "{bad}");
        }
    }
}
