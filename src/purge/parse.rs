//! An HTTP request becomes a purge, or a refusal that says which header and why.

use http::{HeaderMap, HeaderValue, Method, Uri, header};

use super::{BadPattern, Forward, Pattern, Purge, Rules, TagSet, Target};

const TAGS_PATTERN: &str = "x-magento-tags-pattern";
const POOL: &str = "x-pool";
const FLUSH: &str = "x-clearcoat-flush";
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
    #[error("method {method} purges nothing; {accepted} do (purge.methods)")]
    Method {
        /// What was sent.
        method: String,
        /// The methods that purge here, with `, ` between them, as an `Allow` field has them.
        accepted: String,
    },
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
    /// A flush of something: answered 400.
    #[error("X-Clearcoat-Flush: only the value all is known")]
    Flush,
    /// More than one `Host`: answered 400.
    #[error("host: sent more than once, and only one can be the page's")]
    Host,
}

/// Reads one purge request by the rules of this listener.
///
/// # Errors
/// [`Refusal`] where no Varnish would carry it out.
pub fn parse(method: &Method, uri: &Uri, headers: &HeaderMap, rules: &Rules) -> Result<Purge, Refusal> {
    if !rules.accepts(method.as_str()) {
        return Err(Refusal::Method { method: method.to_string(), accepted: rules.methods.join(", ") });
    }
    let soft = headers.get(SOFT).is_some_and(|value| value == "1");
    let mut targets = Vec::new();
    if method == "PURGE" {
        let mut flushes = headers.get_all(FLUSH).iter().peekable();
        if flushes.peek().is_some() {
            // It covers whatever stands beside it, for listeners that do not know it. A ban of all objects is never soft.
            let all = Purge { targets: vec![Target::All], soft: false };
            return if flushes.all(|value| value == "all") { Ok(all) } else { Err(Refusal::Flush) };
        }
        for value in headers.get_all(TAGS_PATTERN) {
            targets.push(tags_target(text(TAGS_PATTERN, value)?)?);
        }
        for value in headers.get_all(POOL) {
            targets.push(Target::Pool(pattern("X-Pool", text(POOL, value)?)?));
        }
    }
    if targets.is_empty() {
        targets.push(Target::Forward(forward(method, uri, headers, rules)?));
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
fn forward(method: &Method, uri: &Uri, headers: &HeaderMap, rules: &Rules) -> Result<Forward, Refusal> {
    let target = uri.path_and_query().map_or("/", |target| target.as_str());
    let host = host(uri, headers)?.map(|host| ("host".to_owned(), host.to_owned()));
    let mut kept: Vec<_> = host.into_iter().collect();
    for (name, value) in headers {
        if !NOT_A_TARGET.contains(&name.as_str()) && !rules.withholds(name.as_str()) {
            kept.push((name.to_string(), text(name.as_str(), value)?.to_owned()));
        }
    }
    let names_a_page = target != "/" && target != "*";
    let names_something = kept.iter().any(|(name, _)| name != "host" && name != SOFT);
    // `PURGE /` alone is what asks a Varnish whether it would obey. Other methods say enough by themselves: a Drupal or
    // Shopware sends `BAN /` for all pages, and a VCL that wants more answers that it does.
    if method == "PURGE" && !names_a_page && !names_something {
        return Err(Refusal::NoTarget);
    }
    Ok(Forward { method: method.to_string(), target: target.to_owned(), headers: kept })
}

/// The host that is meant: that of an absolute target counts before the field (RFC 9112 section 3.2.2). `None` if the
/// request has neither. User information in a target is a credential and no part of the host.
fn host<'v>(uri: &'v Uri, headers: &'v HeaderMap) -> Result<Option<&'v str>, Refusal> {
    let mut fields = headers.get_all(header::HOST).iter();
    let field = fields.next();
    if fields.next().is_some() {
        return Err(Refusal::Host);
    }
    if let Some(authority) = uri.authority() {
        let authority = authority.as_str();
        return Ok(Some(authority.rsplit_once('@').map_or(authority, |(_, host)| host)));
    }
    let host = field.map(|value| text("host", value)).transpose()?;
    Ok(host.filter(|host| !host.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed_by(rules: &Rules, method: &str, uri: &str, headers: &HeaderMap) -> Result<Purge, Refusal> {
        parse(&Method::try_from(method).unwrap(), &uri.parse().unwrap(), headers, rules)
    }

    fn parsed(method: &str, uri: &str, headers: &[(&str, &str)]) -> Result<Purge, Refusal> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(header::HeaderName::try_from(*name).unwrap(), HeaderValue::try_from(*value).unwrap());
        }
        parsed_by(&Rules::default(), method, uri, &map)
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
    fn a_flush_of_all_covers_what_stands_beside_it() {
        let all = ("X-Clearcoat-Flush", "all");
        let magento = ("X-Magento-Tags-Pattern", ".*");
        for headers in [&[all][..], &[magento, ("X-Pool", ".*"), all], &[all, ("X-Magento-Purge-Soft", "1")]] {
            let purge = parsed("PURGE", "/", headers).unwrap();
            assert_eq!(purge, Purge { targets: vec![Target::All], soft: false }, "{headers:?}");
        }
        for value in ["", "ALL", "some", "all, all"] {
            let headers = [magento, ("X-Clearcoat-Flush", value)];
            assert!(matches!(parsed("PURGE", "/", &headers), Err(Refusal::Flush)), "{value:?}");
        }
        // In another method it is a header of somebody's own.
        assert!(matches!(targets("BAN", "/", &[all])[..], [Target::Forward(_)]));
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
        for target in ["http://shop.test/p/1.html?a=b", "https://me:secret@shop.test/p/1.html?a=b"] {
            assert_eq!(targets("PURGE", target, &[]), [Target::Forward(expected.clone())]);
            assert_eq!(targets("PURGE", target, &[("Host", "clearcoat:6081")]), [Target::Forward(expected.clone())]);
        }
    }

    #[test]
    fn a_host_is_handed_on_as_it_was_sent_or_not_at_all() {
        for host in ["shop.test:80", "SHOP.test", "shop.test."] {
            let [Target::Forward(forward)] = &targets("PURGE", "/p/1", &[("Host", host)])[..] else { panic!() };
            assert_eq!(forward.headers, [("host".to_owned(), host.to_owned())]);
        }
        for without in [&[][..], &[("Host", "")]] {
            let [Target::Forward(forward)] = &targets("BAN", "/p/1", without)[..] else { panic!("not forwarded") };
            assert_eq!(forward.headers, []);
        }
        let twice = [("Host", "a"), ("Host", "b")];
        assert!(matches!(parsed("PURGE", "/p/1", &twice), Err(Refusal::Host)));
    }

    #[test]
    fn further_methods_are_handed_on_and_others_name_those_that_purge() {
        let rules = Rules { methods: ["PURGE", "PURGEKEYS", "URIBAN"].map(str::to_owned).into(), ..Rules::default() };
        let mut headers = HeaderMap::new();
        headers.insert("xkey-purge", HeaderValue::from_static("tag-13"));
        headers.insert(TAGS_PATTERN, HeaderValue::from_static(".*"));
        for (method, uri) in [("PURGEKEYS", "/"), ("URIBAN", "/p/1"), ("URIBAN", "/")] {
            let purge = parsed_by(&rules, method, uri, &headers).unwrap();
            let [Target::Forward(forward)] = &purge.targets[..] else { panic!("{purge:?}") };
            assert_eq!((forward.method.as_str(), forward.target.as_str(), forward.headers.len()), (method, uri, 2));
        }
        for method in ["BAN", "purgekeys", "GET"] {
            let refusal = parsed_by(&rules, method, "/p/1", &headers).unwrap_err().to_string();
            assert!(refusal.contains("PURGE, PURGEKEYS, URIBAN"), "{refusal}");
        }
    }

    #[test]
    fn a_credential_that_every_node_gets_from_the_configuration_is_not_kept() {
        let rules = Rules { withheld: vec!["x-purge-key".to_owned()], ..Rules::default() };
        let mut headers = HeaderMap::new();
        headers.insert("X-Purge-Key", HeaderValue::from_static("s3cret"));
        assert!(matches!(parsed_by(&rules, "PURGE", "/", &headers), Err(Refusal::NoTarget)));
        let purge = parsed_by(&rules, "BAN", "/", &headers).unwrap();
        assert_eq!(purge.targets, targets("BAN", "/", &[]));
    }

    #[test]
    fn a_ban_is_handed_on_with_its_own_headers() {
        let [Target::Forward(ban)] = &targets("BAN", "/", &[("X-Url", "^/p/")])[..] else { panic!("not forwarded") };
        assert_eq!(ban.headers, [("x-url".to_owned(), "^/p/".to_owned())]);
    }

    #[test]
    fn a_request_that_names_nothing_is_refused() {
        let curl = [("Host", "a"), ("User-Agent", "curl/7.88"), ("Accept", "*/*")];
        assert!(matches!(parsed("PURGE", "/", &curl), Err(Refusal::NoTarget)));
        assert!(matches!(parsed("PURGE", "*", &curl), Err(Refusal::NoTarget)));
        assert!(matches!(parsed("PURGE", "/", &[("X-Magento-Purge-Soft", "1")]), Err(Refusal::NoTarget)));
        assert!(matches!(parsed("GET", "/", &curl), Err(Refusal::Method { .. })));
    }

    #[test]
    fn a_ban_says_enough_by_its_url() {
        for url in ["/x", "/.*p.*", "/"] {
            let [Target::Forward(ban)] = &targets("BAN", url, &[("Host", "a")])[..] else { panic!("not forwarded") };
            assert_eq!((ban.target.as_str(), ban.headers.len()), (url, 1));
        }
    }

    #[test]
    fn what_stock_vcl_would_ignore_with_a_200_is_refused() {
        for bad in ["((^|,)cat_p_1", "foo && req.url ~ x", ""] {
            let refusal = parsed("PURGE", "/", &[("X-Magento-Tags-Pattern", bad)]).unwrap_err().to_string();
            assert!(refusal.starts_with("X-Magento-Tags-Pattern: "), "{refusal}");
        }
    }
}
