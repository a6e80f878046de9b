//! An HTTP request becomes a purge, or a refusal that says which header and why.

use http::{HeaderMap, HeaderValue, Method, Uri, header};

use super::{BadPattern, Forward, Pattern, Purge, TagSet, Target};

const TAGS_PATTERN: &str = "x-magento-tags-pattern";
const POOL: &str = "x-pool";
pub(super) const SOFT: &str = "x-magento-purge-soft";

/// Headers that every client sends and that name nothing to purge. They are not handed on either: hop-by-hop fields,
/// what describes the sender, and credentials, which must not reach the journal.
const NOT_A_TARGET: [&str; 16] = [
    "accept",
    "accept-encoding",
    "accept-language",
    "authorization",
    "connection",
    "content-length",
    "content-type",
    "cookie",
    "expect",
    "host",
    "keep-alive",
    "proxy-authorization",
    "te",
    "transfer-encoding",
    "upgrade",
    "user-agent",
];

/// Why a request is not a purge.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Another method: answered 405.
    #[error("method {0} purges nothing; PURGE and BAN do")]
    Method(String),
    /// Nothing says what to purge: answered 400.
    #[error("nothing to purge: send X-Magento-Tags-Pattern or X-Pool, or PURGE the URL of a page")]
    NoTarget,
    /// A header with a pattern that no Varnish would carry out: answered 400.
    #[error("{header}: {reason}")]
    Pattern {
        /// The header at fault.
        header: &'static str,
        /// What is wrong with its value.
        reason: BadPattern,
    },
    /// A header value that is not text: answered 400.
    #[error("{0}: not UTF-8 text")]
    NotText(String),
}

/// Reads one purge request.
///
/// # Errors
/// [`Refusal`] where no Varnish would carry it out.
pub fn parse(method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<Purge, Refusal> {
    let soft = headers.get(SOFT).is_some_and(|value| value == "1");
    let mut targets = Vec::new();
    if method == "PURGE" {
        for value in headers.get_all(TAGS_PATTERN) {
            targets.push(tags_target(text(TAGS_PATTERN, value)?)?);
        }
        for value in headers.get_all(POOL) {
            targets.push(Target::Pool(pattern("X-Pool", text(POOL, value)?)?));
        }
    } else if method != "BAN" {
        return Err(Refusal::Method(method.to_string()));
    }
    if targets.is_empty() {
        targets.push(Target::Forward(forward(method, uri, headers)?));
    }
    Ok(Purge { targets, soft })
}

fn tags_target(value: &str) -> Result<Target, Refusal> {
    if value == ".*" {
        return Ok(Target::Everything);
    }
    if let Some(tags) = TagSet::from_magento(value) {
        return Ok(Target::Tags(tags));
    }
    pattern("X-Magento-Tags-Pattern", value).map(Target::Pattern)
}

fn pattern(header: &'static str, value: &str) -> Result<Pattern, Refusal> {
    Pattern::new(value).map_err(|reason| Refusal::Pattern { header, reason })
}

fn text<'v>(name: &str, value: &'v HeaderValue) -> Result<&'v str, Refusal> {
    std::str::from_utf8(value.as_bytes()).map_err(|_| Refusal::NotText(name.to_owned()))
}

/// The request as it goes to every Varnish.
fn forward(method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<Forward, Refusal> {
    let target = uri.path_and_query().map_or("/", |target| target.as_str());
    let host = match uri.authority() {
        Some(authority) => authority.as_str(),
        None => headers.get(header::HOST).map(|value| text("host", value)).transpose()?.unwrap_or("localhost"),
    };
    let mut kept = vec![("host".to_owned(), host.to_owned())];
    for (name, value) in headers {
        if !NOT_A_TARGET.contains(&name.as_str()) {
            kept.push((name.to_string(), text(name.as_str(), value)?.to_owned()));
        }
    }
    let names_a_page = method == "PURGE" && target != "/" && target != "*";
    let names_something = kept.iter().any(|(name, _)| name != "host" && name != SOFT);
    if !names_a_page && !names_something {
        return Err(Refusal::NoTarget);
    }
    Ok(Forward { method: method.to_string(), target: target.to_owned(), headers: kept })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(method: &str, uri: &str, headers: &[(&str, &str)]) -> Result<Purge, Refusal> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(header::HeaderName::try_from(*name).unwrap(), HeaderValue::try_from(*value).unwrap());
        }
        parse(&Method::try_from(method).unwrap(), &uri.parse().unwrap(), &map)
    }

    fn targets(method: &str, uri: &str, headers: &[(&str, &str)]) -> Vec<Target> {
        parsed(method, uri, headers).unwrap().targets
    }

    #[test]
    fn magentos_requests_are_tags_a_flush_or_a_pool() {
        let tags = "((^|,)cat_p_1(,|$))|((^|,)cat_c_3(,|$))";
        let set: TagSet = ["cat_c_3", "cat_p_1"].into_iter().collect();
        assert_eq!(targets("PURGE", "/", &[("X-Magento-Tags-Pattern", tags)]), [Target::Tags(set.clone())]);
        assert_eq!(targets("PURGE", "/", &[("X-Magento-Tags-Pattern", ".*")]), [Target::Everything]);
        let pool = Target::Pool(Pattern::new("shop1").unwrap());
        assert_eq!(targets("PURGE", "/", &[("X-Pool", "shop1")]), std::slice::from_ref(&pool));
        let both = [("X-Pool", "shop1"), ("X-Magento-Tags-Pattern", tags)];
        assert_eq!(targets("PURGE", "/", &both), [Target::Tags(set), pool]);
    }

    #[test]
    fn a_url_purge_is_handed_on_with_its_host_and_without_credentials() {
        let headers = [("Host", "shop.test"), ("Authorization", "Bearer secret"), ("User-Agent", "curl/7.88")];
        let expected = Forward {
            method: "PURGE".into(),
            target: "/p/1.html?a=b".into(),
            headers: vec![("host".into(), "shop.test".into())],
        };
        assert_eq!(targets("PURGE", "/p/1.html?a=b", &headers), [Target::Forward(expected.clone())]);
        assert_eq!(targets("PURGE", "http://shop.test/p/1.html?a=b", &[]), [Target::Forward(expected)]);
    }

    #[test]
    fn a_ban_is_handed_on_with_its_own_headers() {
        let [Target::Forward(ban)] = &targets("BAN", "/", &[("X-Url", "^/p/")])[..] else { panic!("not forwarded") };
        assert_eq!(ban.headers, [("host".into(), "localhost".into()), ("x-url".to_owned(), "^/p/".to_owned())]);
    }

    #[test]
    fn a_request_that_names_nothing_is_refused() {
        let curl = [("Host", "a"), ("User-Agent", "curl/7.88"), ("Accept", "*/*")];
        assert!(matches!(parsed("PURGE", "/", &curl), Err(Refusal::NoTarget)));
        assert!(matches!(parsed("BAN", "/x", &curl), Err(Refusal::NoTarget)));
        assert!(matches!(parsed("PURGE", "/", &[("X-Magento-Purge-Soft", "1")]), Err(Refusal::NoTarget)));
        assert!(matches!(parsed("GET", "/", &curl), Err(Refusal::Method(_))));
    }

    #[test]
    fn what_stock_vcl_would_ignore_with_a_200_is_refused() {
        for bad in ["((^|,)cat_p_1", "foo && req.url ~ x", ""] {
            let refusal = parsed("PURGE", "/", &[("X-Magento-Tags-Pattern", bad)]).unwrap_err().to_string();
            assert!(refusal.starts_with("X-Magento-Tags-Pattern: "), "{refusal}");
        }
    }
}
