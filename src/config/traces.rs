//! `[traces]`: what is told to a collector of OpenTelemetry.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::headers;
use super::node::is_host_port;
use super::optional::empty_is_none;
use super::text::{self, FromText};
use crate::fleet::SecretHeaders;

const PLAIN: &str = "http://";
const ENCRYPTED: &str = "https://";

/// The port of `https` (RFC 9110 section 4.2.2), which hosted collectors use. `http` has no such default here: 80 is hardly
/// ever meant, and 4318 is what OTLP says.
const HTTPS_PORT: &str = ":443";

/// Where OTLP over HTTP wants traces, at a collector that says nothing else.
const DEFAULT_PATH: &str = "/v1/traces";

/// `[traces]`: spans of requests and purges.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Traces {
    /// The collector, which takes OTLP over HTTP. Empty (the default): no span is made, and `traceparent` passes as any field.
    #[serde(with = "empty_or_one")]
    pub endpoint: Option<OtlpEndpoint>,
    /// A file with the CAs of the collector's certificate, in PEM; for https. Empty (the default): those that this system
    /// trusts.
    #[serde(with = "empty_is_none")]
    pub ca: Option<PathBuf>,
    /// Fields of each request to the collector, such as the key of a hosted one. Default none.
    #[serde(deserialize_with = "headers::table", skip_serializing_if = "SecretHeaders::is_empty")]
    pub headers: SecretHeaders,
    /// The share of requests and purges that are exported, 0 to 1, where no trusted proxy has decided. Default 1.
    pub sample: f64,
    /// `service.name` of all spans. Default `clearcoat`.
    pub service_name: String,
}

impl Default for Traces {
    fn default() -> Self {
        Traces {
            endpoint: None,
            ca: None,
            headers: SecretHeaders::default(),
            sample: 1.0,
            service_name: "clearcoat".to_owned(),
        }
    }
}

/// A collector: `http://HOST:PORT/PATH`, or `https://`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtlpEndpoint {
    is_encrypted: bool,
    host_port: String,
    path: String,
}

impl OtlpEndpoint {
    /// The `HOST:PORT`.
    pub fn host_port(&self) -> &str {
        &self.host_port
    }

    /// Whether it is spoken to by TLS.
    pub fn is_encrypted(&self) -> bool {
        self.is_encrypted
    }

    /// The host alone: what its certificate is for. An IPv6 address is without brackets.
    pub fn host(&self) -> &str {
        let host = self.host_port.rsplit_once(':').map_or(&*self.host_port, |(host, _)| host);
        host.trim_start_matches('[').trim_end_matches(']')
    }

    /// The value of `Host`: without the port that goes without saying.
    pub fn authority(&self) -> &str {
        self.host_port.strip_suffix(HTTPS_PORT).filter(|_| self.is_encrypted).unwrap_or(&self.host_port)
    }

    /// Where spans are posted.
    pub fn path(&self) -> &str {
        &self.path
    }
}

impl fmt::Display for OtlpEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_encrypted { ENCRYPTED } else { PLAIN };
        write!(f, "{scheme}{}{}", self.authority(), self.path)
    }
}

impl FromText for OtlpEndpoint {
    const WANTED: &'static str = "http://HOST:PORT or https://HOST[:PORT] of a collector that takes OTLP over HTTP, such as \
                                  http://collector:4318; without a path, /v1/traces";

    fn from_text(text: &str) -> Option<Self> {
        let encrypted = text.strip_prefix(ENCRYPTED);
        let is_encrypted = encrypted.is_some();
        let rest = encrypted.or_else(|| text.strip_prefix(PLAIN))?;
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let has_port = !is_encrypted || is_host_port(authority);
        let host_port = if has_port { authority.to_owned() } else { format!("{authority}{HTTPS_PORT}") };
        let path = if matches!(path, "" | "/") { DEFAULT_PATH } else { path };
        let is_path = path.bytes().all(|byte| byte.is_ascii_graphic() && !b"?#\"<>\\^`{|}".contains(&byte));
        (is_path && is_host_port(&host_port)).then(|| OtlpEndpoint { is_encrypted, host_port, path: path.to_owned() })
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
            ("https://otlp.example", "https://otlp.example/v1/traces"),
            ("https://otlp.example:443/otlp", "https://otlp.example/otlp"),
            ("https://[2001:db8::1]:4318", "https://[2001:db8::1]:4318/v1/traces"),
        ] {
            assert_eq!(shown(text).as_deref(), Some(expected), "{text}");
        }
        for bad in [
            "collector:4318",
            "grpc://collector:4317",
            "http://collector",
            "https://collector:0",
            "https://",
            "https://:443",
            "https://2001:db8::1",
            "http://u@c:1",
            "http://c:1/a?b",
            "http://c:1/a b",
        ] {
            assert_eq!(shown(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_name_of_a_certificate_is_that_of_the_host() {
        for (text, host, authority) in [
            ("https://otlp.example", "otlp.example", "otlp.example"),
            ("https://otlp.example:4318", "otlp.example", "otlp.example:4318"),
            ("https://[2001:db8::1]/x", "2001:db8::1", "[2001:db8::1]"),
            ("http://otlp.example:443", "otlp.example", "otlp.example:443"),
        ] {
            let endpoint = OtlpEndpoint::from_text(text).unwrap();
            assert_eq!((endpoint.host(), endpoint.authority()), (host, authority), "{text}");
        }
    }
}
