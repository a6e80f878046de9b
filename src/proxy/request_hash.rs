//! The hash of a request: host, path and query, without the parameters that do not affect the page.

use std::collections::BTreeMap;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::http1::RequestHead;

/// Query parameters that say where a visitor came from, and do not affect the page. Two links to one page that differ
/// only in them must go to the same Varnish, or each keeps its own copy.
#[derive(Clone, Debug, Default)]
pub struct IgnoredParameters {
    /// By their first byte, so that a name is compared with few of them: the default list has 53.
    patterns: BTreeMap<u8, Vec<ParameterPattern>>,
}

#[derive(Clone, Debug)]
struct ParameterPattern {
    text: Box<[u8]>,
    /// Whether it is the start of names, and not one name.
    is_prefix: bool,
}

impl IgnoredParameters {
    /// From names; a `*` at the end is a wildcard. An empty one matches none.
    pub fn new<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Self {
        let mut ignored = IgnoredParameters::default();
        for pattern in patterns {
            let prefix = pattern.strip_suffix('*');
            let text = prefix.unwrap_or(pattern).as_bytes();
            if let Some(&first) = text.first() {
                let pattern = ParameterPattern { text: text.into(), is_prefix: prefix.is_some() };
                ignored.patterns.entry(first).or_default().push(pattern);
            }
        }
        ignored
    }

    fn has(&self, parameter: &[u8]) -> bool {
        let name = &parameter[..memchr::memchr(b'=', parameter).unwrap_or(parameter.len())];
        let candidates = name.first().and_then(|first| self.patterns.get(first));
        candidates.is_some_and(|patterns| patterns.iter().any(|pattern| pattern.matches(name)))
    }
}

impl ParameterPattern {
    fn matches(&self, name: &[u8]) -> bool {
        if self.is_prefix { name.starts_with(&self.text) } else { *name == *self.text }
    }
}

/// The hash of a request. It depends only on the bytes, so every worker, replica and version computes the same.
pub fn request_hash(head: &RequestHead, ignored: &IgnoredParameters) -> u64 {
    let host = head.host().unwrap_or_default();
    let target = head.target();
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
        for parameter in
            query.split(|&byte| byte == b'&').filter(|parameter| !parameter.is_empty() && !ignored.has(parameter))
        {
            key = xxh3_64_with_seed(parameter, key);
        }
    }
    key
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::MARKETING_PARAMETERS;
    use crate::fleet::PurgeDialect;
    use crate::varnish::vcl::{self, OriginAddress, VarnishVersion, render};

    fn key(host: &str, target: &str) -> u64 {
        let bytes = format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n");
        let mut head = RequestHead::default();
        head.parse(bytes.as_bytes(), 100).unwrap();
        request_hash(&head, &IgnoredParameters::new(["utm_*", "gclid"]))
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

    /// What the VCL makes of a URL: the four lines of its `strip_marketing`.
    fn stripped_by_vcl(vcl: &str, url: &str) -> String {
        let lines = vcl.split_once("sub strip_marketing {").expect("it is there").1;
        let mut url = url.to_owned();
        if !url.contains('?') {
            return url;
        }
        for line in lines.lines().map(str::trim).filter(|line| line.starts_with("set req.url = regsub")).take(4) {
            let mut quoted = line.split('"').skip(1).step_by(2);
            let (pattern, with) = (quoted.next().expect("a pattern"), quoted.next().expect("its replacement"));
            let pattern = pcre2::bytes::Regex::new(pattern).expect("a pattern");
            let limit = if line.contains("regsuball(") { usize::MAX } else { 1 };
            let (mut out, mut from) = (String::new(), 0);
            for found in pattern.captures_iter(url.as_bytes()).take(limit) {
                let found = found.expect("it matches or not");
                let whole = found.get(0).expect("all of it");
                out += &url[from..whole.start()];
                match (with, found.get(1)) {
                    (r"\1", Some(group)) => out += std::str::from_utf8(group.as_bytes()).expect("text"),
                    (with, _) => out += with,
                }
                from = whole.end();
            }
            url = out + &url[from..];
        }
        url
    }

    /// URLs of one page for the VCL must have one hash, or two nodes keep a copy each.
    fn agree(parameters: &[&str], url: &str) {
        let owned: Vec<String> = parameters.iter().map(|&name| name.to_owned()).collect();
        let origin = OriginAddress { host: "10.0.0.1".to_owned(), port: 80 };
        let vcl = render(VarnishVersion::Seven, PurgeDialect::Magento, &[origin], &[]).unwrap();
        let vcl = vcl::stripping(&vcl, &owned);
        let stripped = stripped_by_vcl(&vcl, url);
        let ignored = IgnoredParameters::new(parameters.iter().copied());
        let key = |target: &str| {
            let bytes = format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n");
            let mut head = RequestHead::default();
            head.parse(bytes.as_bytes(), 100).unwrap();
            request_hash(&head, &ignored)
        };
        assert_eq!(key(url), key(&stripped), "{url} is {stripped}");
        let query = url.split_once('?').map_or("", |(_, query)| query);
        let kept = query.split('&').filter(|parameter| !ignored.has(parameter.as_bytes()));
        let kept = kept.collect::<Vec<_>>().join("&");
        let expected = if kept.is_empty() { "/p".to_owned() } else { format!("/p?{kept}") };
        assert_eq!(stripped.replace("?&", "?"), expected.replace("?&", "?"), "{url}");
    }

    #[test]
    fn what_the_vcl_strips_is_what_makes_no_other_key() {
        for parameters in [&MARKETING_PARAMETERS[..], &["a.b", "x*", "q\"(|)"], &[]] {
            for url in [
                "/p",
                "/p?",
                "/p?a=1",
                "/p?utm_source=1&a=1&gclid",
                "/p?a.b=1&aXb=2",
                "/p?x=1&xy=2&yx=3",
                "/p?utm_&utm=1&utm_a.b-c=%20",
                "/p?gclidx=1&xgclid=2&gclid=3=4?5",
                "/p?a=?",
                "/p?a=?&gclid=1",
                "/p?q\"(|)=1&q=2",
                "/p?ie=1&origin=2&clickId=3&clickid=4",
            ] {
                agree(parameters, url);
            }
        }
    }

    proptest! {
        #[test]
        fn any_url_that_the_vcl_strips_keeps_its_key(
            query in prop::collection::vec(prop::sample::select(vec![
                "utm_", "gclid", "mc_", "a", "=", "&", "1", "_ga", "?", ".", "x", "clickId", "pk_",
            ]), 0..16),
        ) {
            // We do not ignore an empty parameter: it stays in the URL.
            let url = format!("/p?{}", query.concat());
            prop_assume!(!url.contains("&&") && !url.contains("?&") && !url.ends_with('&'));
            agree(&MARKETING_PARAMETERS, &url);
        }
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
