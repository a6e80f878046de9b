//! The URL of a server that clearcoat asks over HTTP: a collector of traces, the API server of Kubernetes.

use std::fmt;

use super::node::is_host_port;

const PLAIN: &str = "http://";
const ENCRYPTED: &str = "https://";

/// The port of `https` (RFC 9110 section 4.2.2), which hosted servers use. `http` has no such default here: 80 is hardly
/// ever meant.
const HTTPS_PORT: &str = ":443";

/// A server: `http://HOST:PORT/PATH`, or `https://`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerUrl {
    is_encrypted: bool,
    host_port: String,
    path: String,
}

impl ServerUrl {
    /// The server that a text names; `None` if it names none.
    pub fn parse(text: &str) -> Option<Self> {
        let encrypted = text.strip_prefix(ENCRYPTED);
        let is_encrypted = encrypted.is_some();
        let rest = encrypted.or_else(|| text.strip_prefix(PLAIN))?;
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let has_port = !is_encrypted || is_host_port(authority);
        let host_port = if has_port { authority.to_owned() } else { format!("{authority}{HTTPS_PORT}") };
        let path = if path == "/" { "" } else { path };
        let is_path = path.bytes().all(|byte| byte.is_ascii_graphic() && !b"?#\"<>\\^`{|}".contains(&byte));
        (is_path && is_host_port(&host_port)).then(|| ServerUrl { is_encrypted, host_port, path: path.to_owned() })
    }

    /// The same with this path if it has none.
    pub(super) fn with_default_path(mut self, path: &str) -> Self {
        if self.path.is_empty() {
            path.clone_into(&mut self.path);
        }
        self
    }

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

    /// The path; empty for the root.
    pub fn path(&self) -> &str {
        &self.path
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_encrypted { ENCRYPTED } else { PLAIN };
        write!(f, "{scheme}{}{}", self.authority(), self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_read_with_and_without_a_path() {
        let shown = |text| ServerUrl::parse(text).map(|url| url.to_string());
        for (text, expected) in [
            ("http://collector:4318", "http://collector:4318"),
            ("http://[::1]:4318/", "http://[::1]:4318"),
            ("http://127.0.0.1:80/otlp/v1/traces", "http://127.0.0.1:80/otlp/v1/traces"),
            ("https://otlp.example", "https://otlp.example"),
            ("https://otlp.example:443/otlp", "https://otlp.example/otlp"),
            ("https://[2001:db8::1]:4318", "https://[2001:db8::1]:4318"),
            ("https://otlp.example/otlp/", "https://otlp.example/otlp/"),
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
            let url = ServerUrl::parse(text).unwrap();
            assert_eq!((url.host(), url.authority()), (host, authority), "{text}");
        }
    }
}
