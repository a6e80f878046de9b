//! What a request asks for, as a hash: host, path and query, less the parameters that change nothing.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::http1::RequestHead;

/// Query parameters that say where a visitor came from and not what is asked for. Two links to one page that differ
/// only in them must meet the same Varnish, or each keeps a copy of its own.
#[derive(Clone, Debug, Default)]
pub struct IgnoredParameters {
    names: Vec<Box<[u8]>>,
    prefixes: Vec<Box<[u8]>>,
}

impl IgnoredParameters {
    /// From names; a `*` at the end stands for anything.
    pub fn new<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Self {
        let mut ignored = IgnoredParameters::default();
        for pattern in patterns {
            match pattern.strip_suffix('*') {
                Some(prefix) => ignored.prefixes.push(prefix.as_bytes().into()),
                None => ignored.names.push(pattern.as_bytes().into()),
            }
        }
        ignored
    }

    fn has(&self, parameter: &[u8]) -> bool {
        let name = &parameter[..memchr::memchr(b'=', parameter).unwrap_or(parameter.len())];
        self.names.iter().any(|known| **known == *name) || self.prefixes.iter().any(|prefix| name.starts_with(prefix))
    }
}

/// The hash of a request. The same in every worker, replica and version: it depends on nothing but the bytes.
pub fn request_key(head: &RequestHead, buffer: &[u8], ignored: &IgnoredParameters) -> u64 {
    let host = head.host.map_or(&[][..], |host| host.bytes(buffer));
    let target = head.target(buffer);
    let (path, query) = match memchr::memchr(b'?', target) {
        Some(mark) => (&target[..mark], &target[mark + 1..]),
        None => (target, &[][..]),
    };
    let host_key = if host.iter().any(u8::is_ascii_uppercase) {
        xxh3_64_with_seed(&host.to_ascii_lowercase(), 0)
    } else {
        xxh3_64_with_seed(host, 0)
    };
    let mut key = xxh3_64_with_seed(path, host_key);
    if !query.is_empty() {
        for parameter in query.split(|&byte| byte == b'&').filter(|parameter| !ignored.has(parameter)) {
            key = xxh3_64_with_seed(parameter, key);
        }
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http1::HeadScan;

    fn key(host: &str, target: &str) -> u64 {
        let bytes = format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n");
        let mut head = RequestHead::default();
        let len = HeadScan::default().find(bytes.as_bytes(), 9999).unwrap().unwrap();
        head.parse(bytes.as_bytes(), len, 100).unwrap();
        request_key(&head, bytes.as_bytes(), &IgnoredParameters::new(["utm_*", "gclid"]))
    }

    #[test]
    fn marketing_parameters_and_the_case_of_the_host_change_nothing() {
        let plain = key("shop.test", "/p?a=1");
        for (host, target) in
            [("Shop.Test", "/p?a=1"), ("shop.test", "/p?utm_source=x&a=1"), ("shop.test", "/p?a=1&gclid=y&utm_medium")]
        {
            assert_eq!(key(host, target), plain, "{host}{target}");
        }
        assert_eq!(key("shop.test", "/p?gclid=1"), key("shop.test", "/p"));
    }

    #[test]
    fn host_path_and_other_parameters_make_another_key() {
        let plain = key("shop.test", "/p?a=1");
        for (host, target) in [("b", "/p?a=1"), ("shop.test", "/q?a=1"), ("shop.test", "/p?a=2"), ("shop.test", "/p")] {
            assert_ne!(key(host, target), plain, "{host}{target}");
        }
        assert_ne!(key("shop.test", "/p?gclid2=1"), key("shop.test", "/p"));
    }
}
