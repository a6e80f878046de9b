//! Turns an HTTP request into a purge, or a refusal that names the header and the reason.

mod as_it_came;

use http::{HeaderMap, HeaderValue, Method, Uri};

use super::forward::{self, BadForward};
use super::{BadPattern, Pattern, Purge, PurgeRules, TagSet, Target};

const TAGS_PATTERN: &str = "x-magento-tags-pattern";
const POOL: &str = "x-pool";
const FLUSH: &str = "x-clearcoat-flush";
pub(super) const SOFT: &str = "x-magento-purge-soft";

/// Why a request is not a purge.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Not a purging method.
    #[error("method {method} purges nothing; {accepted} do (purge.methods)")]
    Method {
        /// The method sent.
        method: String,
        /// The methods that purge here, separated by `, `, as in an `Allow` field.
        accepted: String,
    },
    /// The request names no target.
    #[error("nothing to purge: send X-Magento-Tags-Pattern or X-Pool, or PURGE the URL of a page")]
    NoTarget,
    /// A header with a pattern that no Varnish would carry out.
    #[error("{header}: {reason}")]
    Pattern {
        /// The header at fault.
        header: &'static str,
        /// The problem of its value.
        reason: BadPattern,
    },
    /// A flush with an unknown value.
    #[error("X-Clearcoat-Flush: only the value all is known")]
    Flush,
    /// A request that cannot be forwarded unchanged.
    #[error(transparent)]
    Forward(#[from] BadForward),
    /// A header value that is not text.
    #[error("{header}: not UTF-8 text at byte {at}")]
    NotText {
        /// The header at fault.
        header: String,
        /// The offset in its value.
        at: usize,
    },
    /// Exceeds a limit of Varnish.
    #[error("{what} is {is}; Varnish takes at most {most} ({parameter})")]
    TooLarge {
        /// The thing that is too large.
        what: String,
        /// Its size.
        is: usize,
        /// The largest size.
        most: usize,
        /// The parameter of Varnish that sets the limit.
        parameter: &'static str,
    },
}

impl Refusal {
    /// The status of the answer.
    pub fn status(&self) -> u16 {
        match self {
            Refusal::Method { .. } => 405,
            Refusal::TooLarge { .. } => 413,
            Refusal::NoTarget
            | Refusal::Pattern { .. }
            | Refusal::Flush
            | Refusal::Forward(_)
            | Refusal::NotText { .. } => 400,
        }
    }

    /// Whether the refusal costs the sender nothing. Magento up to 2.4 sends an empty pattern before one that is longer
    /// than its chunks (`PurgeCache::splitTags` emits the chunk that it has not begun yet).
    pub fn is_empty_chunk(&self) -> bool {
        matches!(self, Refusal::Pattern { reason: BadPattern::Empty, .. })
    }
}

/// The result of parsing a request.
#[derive(Debug)]
pub struct ParsedPurge {
    /// What is to be carried out.
    pub purge: Purge,
    /// Whether it drops more than requested, because the exact pattern would harm Varnish.
    pub is_wider: bool,
}

/// Parses one purge request by this listener's rules.
///
/// # Errors
/// [`Refusal`] where no Varnish would carry it out.
pub fn parse(method: &Method, uri: &Uri, headers: &HeaderMap, rules: &PurgeRules) -> Result<ParsedPurge, Refusal> {
    if !rules.accepts(method.as_str()) {
        let method = forward::shown(method.as_str());
        return Err(Refusal::Method { method, accepted: rules.methods.join(", ") });
    }
    let mut parsed = ParsedPurge {
        purge: Purge { targets: Vec::new(), soft: headers.get(SOFT).is_some_and(|value| value == "1") },
        is_wider: false,
    };
    if method == "PURGE" {
        let mut flushes = headers.get_all(FLUSH).iter().peekable();
        if flushes.peek().is_some() {
            // The flush covers any other headers, which are for listeners that do not know it. A ban of all objects is
            // never soft.
            parsed.purge = Purge { targets: vec![Target::All], soft: false };
            return if flushes.all(|value| value == "all") { Ok(parsed) } else { Err(Refusal::Flush) };
        }
        for value in headers.get_all(TAGS_PATTERN) {
            parsed.add_tags(value)?;
        }
        for value in headers.get_all(POOL) {
            parsed.add_patterns("X-Pool", value.as_bytes(), Target::Pool)?;
        }
    }
    if parsed.purge.targets.is_empty() {
        parsed.purge.targets.push(Target::Forward(as_it_came::read(method, uri, headers, rules)?));
    }
    Ok(parsed)
}

impl ParsedPurge {
    fn add_tags(&mut self, value: &HeaderValue) -> Result<(), Refusal> {
        let value = value.as_bytes();
        if let Some(tags) = tags(value) {
            self.purge.targets.push(Target::Tags(tags));
            return Ok(());
        }
        let Some(groups) = TagSet::mend_torn(value) else {
            return self.add_patterns("X-Magento-Tags-Pattern", value, of_tags);
        };
        // A chunk without a tag names nothing: its tags are in the adjacent chunks.
        let tags = if groups.is_empty() { Some(TagSet::default()) } else { tags(&groups) };
        match tags {
            Some(tags) => self.purge.targets.push(Target::Tags(tags)),
            None => self.add_patterns("X-Magento-Tags-Pattern", &groups, of_tags)?,
        }
        Ok(())
    }

    fn add_patterns(
        &mut self,
        header: &'static str,
        value: &[u8],
        target: impl Fn(Pattern) -> Target,
    ) -> Result<(), Refusal> {
        let understood = Pattern::read(value).map_err(|reason| Refusal::Pattern { header, reason })?;
        self.is_wider |= understood.is_wider;
        self.purge.targets.extend(understood.patterns.into_iter().map(target));
        Ok(())
    }
}

fn tags(groups: &[u8]) -> Option<TagSet> {
    TagSet::from_magento(std::str::from_utf8(groups).ok()?)
}

fn of_tags(pattern: Pattern) -> Target {
    if pattern.as_str() == ".*" { Target::Everything } else { Target::Pattern(pattern) }
}

#[cfg(test)]
mod tests {
    use http::header;
    use proptest::prelude::*;

    use super::*;
    use crate::purge::Forward;

    fn parsed_by(rules: &PurgeRules, method: &str, uri: &str, headers: &HeaderMap) -> Result<Purge, Refusal> {
        parse(&Method::try_from(method).unwrap(), &uri.parse().unwrap(), headers, rules).map(|parsed| parsed.purge)
    }

    fn parsed(method: &str, uri: &str, headers: &[(&str, &str)]) -> Result<Purge, Refusal> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(header::HeaderName::try_from(*name).unwrap(), HeaderValue::try_from(*value).unwrap());
        }
        parsed_by(&PurgeRules::default(), method, uri, &map)
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
        // With another method it is a custom header.
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
        assert!(matches!(parsed("PURGE", "/p/1", &twice), Err(Refusal::Forward(BadForward::Host))));
    }

    #[test]
    fn further_methods_are_handed_on_and_others_name_those_that_purge() {
        let rules =
            PurgeRules { methods: ["PURGE", "PURGEKEYS", "URIBAN"].map(str::to_owned).into(), ..PurgeRules::default() };
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
        let rules = PurgeRules { withheld: vec!["x-purge-key".to_owned()], ..PurgeRules::default() };
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

    #[test]
    fn a_target_is_brought_into_origin_form_or_refused() {
        let target = |uri: &str| match &targets("PURGE", uri, &[("Host", "a")])[..] {
            [Target::Forward(Forward { target, headers, .. })] => (target.clone(), headers[0].1.clone()),
            other => panic!("{other:?}"),
        };
        for (uri, expected, host) in [
            ("http://shop.test?x=1", "/?x=1", "shop.test"),
            ("http://shop.test:80/p?x", "/p?x", "shop.test:80"),
            ("//p", "//p", "a"),
            ("/p/\u{e4}", "/p/\u{e4}", "a"),
            ("/p#b", "/p", "a"),
        ] {
            assert_eq!(target(uri), (expected.to_owned(), host.to_owned()), "{uri}");
        }
        assert!(matches!(parsed("PURGE", "http://shop.test", &[]), Err(Refusal::NoTarget)));
        for uri in ["shop.test:80", "p"] {
            let refusal = parsed("PURGE", uri, &[("Host", "a"), ("X-Url", "b")]).unwrap_err();
            assert!(matches!(refusal, Refusal::Forward(BadForward::Target(_))), "{uri}: {refusal}");
        }
        let [Target::Forward(ban)] = &targets("BAN", "*", &[("X-Url", "b")])[..] else { panic!("not forwarded") };
        assert_eq!(ban.target, "*");
    }

    #[test]
    fn a_request_larger_than_varnish_takes_is_refused_with_its_parameter() {
        let long = "x".repeat(8_192);
        let some = "y".repeat(8_000);
        let many: Vec<(String, &str)> = (0..49).map(|id| (format!("x-{id}"), "z")).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|(name, value)| (&**name, *value)).collect();
        let five = [("x-1", &*some), ("x-2", &some), ("x-3", &some), ("x-4", &some), ("x-5", &some)];
        for (uri, headers, named) in [
            ("/p", &[("x-url", &*long)][..], "x-url: the line is 8201; Varnish takes at most 8192 (http_req_hdr_len)"),
            (&format!("/{long}"), &[][..], "the first line of the request is 8208"),
            ("/p", &five[..], "(http_req_size)"),
            ("/p", &many[..], "the number of header fields is 49; Varnish takes at most 48 (http_max_hdr)"),
        ] {
            let refusal =
                parsed("BAN", uri, &[headers, &[("x", "y")][..headers.is_empty().into()]].concat()).unwrap_err();
            assert!(refusal.to_string().contains(named), "{refusal}");
            assert_eq!(refusal.status(), 413);
        }
        assert!(parsed("BAN", "/p", &five[..3]).is_ok() && parsed("BAN", "/p", &many[..48]).is_ok());
    }

    #[test]
    fn a_torn_chunk_is_its_tags_and_one_without_any_names_nothing() {
        let of = |pattern: &str| targets("PURGE", "/", &[("X-Magento-Tags-Pattern", pattern)]);
        let set: TagSet = ["cat_c_3", "cat_p_1"].into_iter().collect();
        assert_eq!(of(",)cat_p_1(,|$))|((^|,)cat_c_3(,"), [Target::Tags(set)]);
        assert_eq!(of("$))"), [Target::Tags(TagSet::default())]);
        assert_eq!(of(",)a.b(,|$))|((^"), [Target::Pattern(Pattern::new("((^|,)a.b(,|$))").unwrap())]);
    }

    #[test]
    fn magentos_headers_are_checked_in_a_ban_too() {
        let ban = |pattern| parsed("BAN", "/", &[("X-Magento-Tags-Pattern", pattern)]);
        assert!(matches!(ban("^(a+)+$"), Err(Refusal::Pattern { .. })));
        let Ok(Purge { targets, .. }) = ban(".*a b.*") else { panic!("refused") };
        let [Target::Forward(forward)] = &targets[..] else { panic!("{targets:?}") };
        assert_eq!(forward.headers[0].1, "a\\x20b");
    }

    #[test]
    fn latin_1_is_a_pattern_of_bytes_and_no_other_value() {
        let parsed = |name: &'static str| {
            let mut map = HeaderMap::new();
            map.append(name, HeaderValue::from_bytes(b"caf\xe9_1").unwrap());
            parse(&Method::try_from("PURGE").unwrap(), &Uri::from_static("/p"), &map, &PurgeRules::default())
        };
        let Target::Pattern(pattern) = &parsed(TAGS_PATTERN).unwrap().purge.targets[0] else { panic!("no pattern") };
        assert_eq!(pattern.as_str(), "caf\\xe9_1");
        let refusal = parsed("x-url").unwrap_err();
        assert_eq!((refusal.status(), refusal.to_string().as_str()), (400, "x-url: not UTF-8 text at byte 3"));
    }

    /// Everything that a listener's HTTP library accepts, and more.
    fn requests() -> impl Strategy<Value = (Method, Uri, HeaderMap)> {
        let method = prop_oneof![Just("PURGE"), Just("BAN"), Just("GET"), Just("purge")];
        let target = prop_oneof![
            "/[a-z{}|\"\\\\%\u{e4}^`<#?]{0,12}",
            Just("*".to_owned()),
            "https?://[a-z:0-9]{1,6}(/?\\?[a-z]{0,3})?",
            "[a-z.:0-9]{1,8}",
            "//[a-z]{0,4}",
            "/x{8150,8200}",
        ];
        let name = prop_oneof![
            Just("x-magento-tags-pattern"),
            Just("x-pool"),
            Just("host"),
            Just("x-url"),
            Just("X-Ban"),
            Just("accept"),
            Just("x-magento-purge-soft"),
            Just("connection"),
        ];
        let value = prop_oneof![
            2 => "[ -~]{0,30}".prop_map(String::into_bytes),
            2 => "[a-z(),|^$.*+?\\[\\]{}0-9]{0,24}".prop_map(String::into_bytes),
            1 => "(\\(\\(\\^\\|)?,\\)[a-z. \u{e4}]{1,5}\\(,(\\|\\$\\)\\))?".prop_map(String::into_bytes),
            1 => prop::collection::vec(prop_oneof![Just(9_u8), 32_u8..=126, 128_u8..=255], 0..20),
            1 => Just(b"1".to_vec()),
        ];
        let headers = prop::collection::vec((name, value), 0..5);
        (method, target, headers).prop_filter_map("no request", |(method, target, fields)| {
            let mut headers = HeaderMap::new();
            for (name, value) in fields {
                let name = header::HeaderName::from_bytes(name.as_bytes()).ok()?;
                headers.append(name, HeaderValue::from_bytes(&value).ok()?);
            }
            Some((Method::try_from(method).ok()?, target.parse().ok()?, headers))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

        #[test]
        fn what_is_accepted_is_read_again_as_the_same((method, uri, headers) in requests()) {
            let Ok(ParsedPurge { purge, .. }) = parse(&method, &uri, &headers, &PurgeRules::default()) else { return Ok(()) };
            let stored = serde_json::to_vec(&purge).unwrap();
            let read = serde_json::from_slice::<Purge>(&stored);
            prop_assert!(read.is_ok(), "{:?}: {:?}", purge, read);
            prop_assert_eq!(read.unwrap(), purge);
        }
    }
}
