//! A request that is handed on, as it is read back: from the disk, from etcd, from another replica.
//!
//! It is written to a Varnish byte by byte, so what it is made of is checked here again, whoever wrote it.

use http::{HeaderName, HeaderValue};
use serde::Deserialize;

use super::{Forward, may_purge};

/// A [`Forward`] that nobody has checked.
#[derive(Deserialize)]
pub(super) struct Read {
    method: String,
    target: String,
    headers: Vec<(String, String)>,
}

/// What is wrong with it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadForward {
    #[error("{0:?} is no method that purges")]
    Method(String),
    #[error("{0:?} is no request target in origin form")]
    Target(String),
    #[error("{0:?} is no header field")]
    Header(String),
}

impl TryFrom<Read> for Forward {
    type Error = BadForward;

    fn try_from(Read { method, target, headers }: Read) -> Result<Self, BadForward> {
        // What this configuration accepts may be less: another one, or another replica, accepted it.
        if !may_purge(&method) {
            return Err(BadForward::Method(method));
        }
        if !target.starts_with('/') || target.bytes().any(|byte| byte.is_ascii_control() || byte == b' ') {
            return Err(BadForward::Target(target));
        }
        let is_bad = |(name, value): &&(String, String)| {
            HeaderName::try_from(name).is_err() || HeaderValue::try_from(value).is_err()
        };
        match headers.iter().find(is_bad) {
            Some((name, _)) => Err(BadForward::Header(name.clone())),
            None => Ok(Forward { method, target, headers }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_be_two_requests_is_not_read_as_one() {
        let read = |method: &str, target: &str, header: (&str, &str)| {
            let headers = [header];
            let json = serde_json::json!({ "method": method, "target": target, "headers": headers });
            serde_json::from_value::<Forward>(json).map_err(|error| error.to_string())
        };
        for method in ["PURGE", "BAN", "PURGEKEYS", "URIBAN", "x-purge"] {
            assert!(read(method, "/p/1?a=b", ("host", "shop.test")).is_ok(), "{method}");
        }
        for (method, target, header) in [
            ("GET", "/", ("host", "a")),
            ("post", "/", ("host", "a")),
            ("", "/", ("host", "a")),
            ("PURGE / HTTP/1.1\r\nX: y", "/", ("host", "a")),
            ("PURGE", "p", ("host", "a")),
            ("PURGE", "/ HTTP/1.1\r\nX: y", ("host", "a")),
            ("PURGE", "/", ("ho st", "a")),
            ("PURGE", "/", ("host", "a\r\nX: y")),
        ] {
            assert!(read(method, target, header).is_err(), "{method:?} {target:?} {header:?}");
        }
    }
}
