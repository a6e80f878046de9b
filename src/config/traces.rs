//! `[traces]`: what is told to a collector of OpenTelemetry.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::headers;
use super::optional::empty_is_none;
use super::text::{self, FromText};
use super::url::ServerUrl;
use crate::fleet::SecretHeaders;

/// Where OTLP over HTTP wants traces, at a collector that says nothing else.
const DEFAULT_PATH: &str = "/v1/traces";

/// `[traces]`: spans of requests and purges.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Traces {
    /// The collector, which takes OTLP over HTTP. Empty (the default): no span is made, and `traceparent` passes as any field.
    #[serde(with = "empty_or_one")]
    pub endpoint: Option<ServerUrl>,
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

/// Empty, or an endpoint.
mod empty_or_one {
    use super::*;

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<ServerUrl>, D::Error> {
        text::one(deserializer).map(|MaybeEndpoint(endpoint)| endpoint)
    }

    pub(super) fn serialize<S: Serializer>(endpoint: &Option<ServerUrl>, serializer: S) -> Result<S::Ok, S::Error> {
        match endpoint {
            Some(endpoint) => serializer.collect_str(endpoint),
            None => serializer.serialize_str(""),
        }
    }
}

struct MaybeEndpoint(Option<ServerUrl>);

impl FromText for MaybeEndpoint {
    const WANTED: &'static str = "http://HOST:PORT or https://HOST[:PORT] of a collector that takes OTLP over HTTP, such as \
                                  http://collector:4318; without a path, /v1/traces";

    fn from_text(text: &str) -> Option<Self> {
        if text.is_empty() {
            return Some(MaybeEndpoint(None));
        }
        ServerUrl::parse(text).map(|endpoint| MaybeEndpoint(Some(endpoint.with_default_path(DEFAULT_PATH))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_without_a_path_has_the_one_of_otlp() {
        let shown =
            |text| MaybeEndpoint::from_text(text).and_then(|MaybeEndpoint(endpoint)| Some(endpoint?.to_string()));
        assert_eq!(shown("http://collector:4318").as_deref(), Some("http://collector:4318/v1/traces"));
        assert_eq!(shown("https://otlp.example/otlp").as_deref(), Some("https://otlp.example/otlp"));
        assert_eq!(shown("grpc://collector:4317"), None);
        assert!(MaybeEndpoint::from_text("").is_some_and(|MaybeEndpoint(endpoint)| endpoint.is_none()));
    }
}
