//! The rules of the edge: who is let in, and how.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::optional::empty_is_none;
use super::text;

/// `[edge.https]`: the redirect to https, and HSTS.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EdgeHttps {
    /// Whether requests by plain HTTP are answered 308 with the same URL by https. A trusted proxy says with
    /// `X-Forwarded-Proto` how its client came; if it does not, nothing is redirected. Default false.
    pub redirect: bool,
    /// The port in that URL, where clients reach TLS. At least 1, default 443.
    pub port: u16,
    /// `max-age` of `Strict-Transport-Security` in seconds (RFC 6797), which answers by TLS then have; 0 is off: the field is
    /// what the nodes say. Default 0.
    pub hsts_max_age: u32,
    /// Whether it also holds for the names below the host (`includeSubDomains`). Default false.
    pub hsts_include_subdomains: bool,
    /// Whether browsers may have the host in their own lists (`preload`). Default false.
    pub hsts_preload: bool,
}

impl Default for EdgeHttps {
    fn default() -> Self {
        EdgeHttps { redirect: false, port: 443, hsts_max_age: 0, hsts_include_subdomains: false, hsts_preload: false }
    }
}

/// `[edge.maintenance]`: the shop is closed, but for some.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EdgeMaintenance {
    /// Whether clients are answered 503. Purges go on. Default false.
    pub on: bool,
    /// Networks whose clients are served all the same; a bare address is one host. Default none.
    #[serde(deserialize_with = "text::list", serialize_with = "text::write_list")]
    pub allow: Vec<IpNet>,
    /// What `Retry-After` says, in whole seconds. At least 1s, default 5m.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub retry_after: Duration,
    /// A file with the page that is shown, as in `edge.error_pages`; empty: that of 503 there. Default empty.
    #[serde(with = "empty_is_none")]
    pub page: Option<PathBuf>,
}

impl Default for EdgeMaintenance {
    fn default() -> Self {
        EdgeMaintenance { on: false, allow: Vec::new(), retry_after: Duration::from_secs(300), page: None }
    }
}

/// `[edge.error_pages]`: pages for answers that clearcoat makes itself, by their status; empty: one line of text. Of edge and
/// origin: what the origin listener says to a Varnish is shown to a reader, too.
///
/// A file of at most 64 KiB that ends in `.html`, `.htm`, `.json` or `.txt`, which is its type. Read at the start and with each
/// reload.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EdgeErrorPages {
    /// For 400.
    #[serde(rename = "400", with = "empty_is_none")]
    pub bad_request: Option<PathBuf>,
    /// For 403.
    #[serde(rename = "403", with = "empty_is_none")]
    pub forbidden: Option<PathBuf>,
    /// For 404.
    #[serde(rename = "404", with = "empty_is_none")]
    pub not_found: Option<PathBuf>,
    /// For 405.
    #[serde(rename = "405", with = "empty_is_none")]
    pub method_not_allowed: Option<PathBuf>,
    /// For 408.
    #[serde(rename = "408", with = "empty_is_none")]
    pub request_timeout: Option<PathBuf>,
    /// For 413.
    #[serde(rename = "413", with = "empty_is_none")]
    pub content_too_large: Option<PathBuf>,
    /// For 421.
    #[serde(rename = "421", with = "empty_is_none")]
    pub misdirected_request: Option<PathBuf>,
    /// For 429.
    #[serde(rename = "429", with = "empty_is_none")]
    pub too_many_requests: Option<PathBuf>,
    /// For 431.
    #[serde(rename = "431", with = "empty_is_none")]
    pub head_too_large: Option<PathBuf>,
    /// For 502.
    #[serde(rename = "502", with = "empty_is_none")]
    pub bad_gateway: Option<PathBuf>,
    /// For 503.
    #[serde(rename = "503", with = "empty_is_none")]
    pub service_unavailable: Option<PathBuf>,
    /// For 504.
    #[serde(rename = "504", with = "empty_is_none")]
    pub gateway_timeout: Option<PathBuf>,
}

impl EdgeErrorPages {
    /// The pages that there are, by status.
    pub fn files(&self) -> impl Iterator<Item = (u16, &Path)> {
        let all = [
            (400, &self.bad_request),
            (403, &self.forbidden),
            (404, &self.not_found),
            (405, &self.method_not_allowed),
            (408, &self.request_timeout),
            (413, &self.content_too_large),
            (421, &self.misdirected_request),
            (429, &self.too_many_requests),
            (431, &self.head_too_large),
            (502, &self.bad_gateway),
            (503, &self.service_unavailable),
            (504, &self.gateway_timeout),
        ];
        all.into_iter().filter_map(|(status, file)| Some((status, file.as_deref()?)))
    }
}

/// `[edge.rate_limit]`: how many requests clients may make. More are answered 429, with `Retry-After`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EdgeRateLimit {
    /// Requests a second of one client: an IPv4 address, or a /64 of IPv6; behind a trusted proxy whom it names in
    /// `X-Forwarded-For`. 0 is no limit. At most 100000, default 0.
    pub client_rate: u32,
    /// Requests that a client may make at once, when it has made none for a while. 1 to 100000, and at most 3600 times the rate; default 200: a page with all
    /// that belongs to it.
    pub client_burst: u32,
    /// Requests a second of all clients together; 0 is no limit. At most 100000, default 0.
    pub total_rate: u32,
    /// Requests that all of them may make at once. 1 to 100000, and at most 3600 times the rate; default 1000.
    pub total_burst: u32,
    /// Networks whose clients have no limit, and are not counted; a bare address is one host. Default none.
    #[serde(deserialize_with = "text::list", serialize_with = "text::write_list")]
    pub exempt: Vec<IpNet>,
}

impl Default for EdgeRateLimit {
    fn default() -> Self {
        EdgeRateLimit { client_rate: 0, client_burst: 200, total_rate: 0, total_burst: 1000, exempt: Vec::new() }
    }
}
