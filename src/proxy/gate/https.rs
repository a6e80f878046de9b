//! To https, and to stay there.
//!
//! The redirect is a 308 (RFC 9110 section 15.4.9): the method and the body of the request stay what they were, for whoever
//! posts to an old URL. It is answered for every method and every host that the edge answers for. Two kinds of requests have
//! none: one without a host (HTTP/1.0), as there is nowhere to send it, and the challenge by which a certificate authority
//! sees that the host is ours (RFC 8555 section 8.3). That one begins with plain HTTP, and it is there to get the certificate
//! without which https does not work: a redirect would have an expired one never be renewed.
//!
//! `Strict-Transport-Security` (RFC 6797) tells a browser to come by https from the start. It is never sent by plain HTTP
//! (section 7.2), and once (section 7.1): what a node says of it is replaced.

use crate::config;
use crate::http1::{RequestHead, bare_host, push_decimal};

/// The port of https, which is not written.
const HTTPS_PORT: u16 = 443;

/// Where challenges of certificate authorities are answered.
const ACME_CHALLENGES: &[u8] = b"/.well-known/acme-challenge/";

/// The rules about https.
#[derive(Debug)]
pub(super) struct HttpsRules {
    /// Whether requests by plain HTTP are sent to https.
    pub(super) redirects: bool,
    /// The port that they are sent to.
    port: u16,
    /// The value of `Strict-Transport-Security`; empty for none.
    pub(super) strict_transport: String,
}

impl HttpsRules {
    pub(super) fn of(https: &config::EdgeHttps) -> Self {
        let directives = [("; includeSubDomains", https.hsts_include_subdomains), ("; preload", https.hsts_preload)];
        let strict_transport = match https.hsts_max_age {
            0 => String::new(),
            seconds => {
                let more: String = directives.iter().filter(|(_, is_said)| *is_said).map(|(text, _)| *text).collect();
                format!("max-age={seconds}{more}")
            }
        };
        HttpsRules { redirects: https.redirect, port: https.port, strict_transport }
    }

    pub(super) fn has_any(&self) -> bool {
        self.redirects || !self.strict_transport.is_empty()
    }

    /// The same page by https.
    pub(super) fn location(&self, head: &RequestHead) -> Vec<u8> {
        let mut location = b"https://".to_vec();
        location.extend_from_slice(bare_host(head.host().unwrap_or_default()));
        if self.port != HTTPS_PORT {
            location.push(b':');
            push_decimal(&mut location, u64::from(self.port));
        }
        // `*` is no path (RFC 9112 section 3.2.4): it would become a part of the host.
        location.extend_from_slice(if head.target() == b"*" { b"/" } else { head.target() });
        location
    }
}

/// Whether there is somewhere to send this request.
pub(super) fn has_place(head: &RequestHead) -> bool {
    // `.` has none either.
    head.host().is_some_and(|host| !bare_host(host).is_empty())
}

/// Whether this is the path of a challenge: with one token behind it and nothing else, as a server may read `..` otherwise.
pub(super) fn is_acme_challenge(path: &[u8]) -> bool {
    let is_token = |token: &[u8]| {
        !token.is_empty() && token.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(byte))
    };
    path.strip_prefix(ACME_CHALLENGES).is_some_and(is_token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(change: impl FnOnce(&mut config::EdgeHttps)) -> HttpsRules {
        let mut https = config::EdgeHttps { redirect: true, ..config::EdgeHttps::default() };
        change(&mut https);
        HttpsRules::of(&https)
    }

    fn location(rules: &HttpsRules, request: &str) -> String {
        let mut head = RequestHead::default();
        head.parse(format!("{request}\r\n\r\n").as_bytes(), 100).unwrap();
        String::from_utf8(rules.location(&head)).unwrap()
    }

    #[test]
    fn the_same_page_is_named_without_the_port_of_plain_http() {
        let (usual, other) = (rules(|_| ()), rules(|https| https.port = 8443));
        for (request, there) in [
            ("GET /a?b=c//d HTTP/1.1\r\nHost: Shop.example:8080", "/a?b=c//d"),
            ("POST //evil.example/ HTTP/1.1\r\nHost: shop.example.", "//evil.example/"),
            ("GET http://shop.example:80?q HTTP/1.1\r\nHost: shop.example", "/?q"),
            ("OPTIONS * HTTP/1.1\r\nHost: shop.example", "/"),
        ] {
            let (usual, other) = (location(&usual, request), location(&other, request));
            assert!(usual.eq_ignore_ascii_case(&format!("https://shop.example{there}")), "{usual}");
            assert!(other.eq_ignore_ascii_case(&format!("https://shop.example:8443{there}")), "{other}");
        }
        assert_eq!(location(&usual, "GET / HTTP/1.1\r\nHost: [2001:db8::1]:80"), "https://[2001:db8::1]/");
    }

    #[test]
    fn only_one_token_makes_a_challenge() {
        assert!(is_acme_challenge(b"/.well-known/acme-challenge/LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0"));
        for other in ["", "a/b", "..", "a.b", "%2e%2e", "../../admin"] {
            assert!(!is_acme_challenge(&[ACME_CHALLENGES, other.as_bytes()].concat()), "{other}");
        }
        assert!(!is_acme_challenge(b"/.well-known/acme-challenge") && !is_acme_challenge(b"/"));
    }

    #[test]
    fn strict_transport_says_what_is_configured() {
        let said = |age, include, preload| {
            let rules = rules(|https| {
                https.hsts_max_age = age;
                (https.hsts_include_subdomains, https.hsts_preload) = (include, preload);
            });
            rules.strict_transport
        };
        assert_eq!(said(0, true, true), "");
        assert_eq!(said(300, false, false), "max-age=300");
        assert_eq!(said(31_536_000, true, true), "max-age=31536000; includeSubDomains; preload");
    }
}
