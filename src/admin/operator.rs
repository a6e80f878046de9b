//! Who may purge from the status page, and drain or resume nodes.
//!
//! The admin listener asks nobody who they are, and a browser that can reach it sends what any page tells it to. So a
//! change from here is off until there is a token, and then it wants all of these: the token, in a field that no form and no
//! foreign page can send; a body whose type makes a browser ask first; and no sign that another origin sent it.

use http::{HeaderMap, HeaderValue, Request, Uri, header};
use hyper::body::Bytes;
use serde::Deserialize;

use crate::config::Token;
use crate::purge::{is_literal_tag, to_magento};

/// The path of a purge by an operator.
pub(super) const PATH: &str = "/api/v1/purge";

/// Why a request is not carried out: a status, and the reason for its sender.
pub(super) type Objection = (u16, &'static str);

/// What an operator purges.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum OperatorPurge {
    /// Pages with one of these tags.
    Tags(Vec<String>),
    /// One page.
    Url(String),
}

/// Why the sender of this request may change nothing; `None` if it may.
pub(super) fn objection(headers: &HeaderMap, token: Option<&Token>) -> Option<Objection> {
    let Some(token) = token else {
        return Some((403, "this is off: name a file with a token in admin.token_file"));
    };
    if !is_same_origin(headers) {
        return Some((403, "another origin sent this request"));
    }
    let is_json = text(headers, header::CONTENT_TYPE).is_some_and(|kind| kind.starts_with("application/json"));
    if !is_json {
        return Some((415, "Content-Type: application/json is wanted"));
    }
    let presented = text(headers, header::AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer "));
    let is_right = presented.is_some_and(|presented| token.matches(presented.trim().as_bytes()));
    (!is_right).then_some((401, "the token is missing or wrong"))
}

/// Whether no sign says that a page of another origin sent this: browsers say it in `Sec-Fetch-Site`, and in `Origin`,
/// which older ones send alone.
fn is_same_origin(headers: &HeaderMap) -> bool {
    let site = headers.get("sec-fetch-site").is_none_or(|site| site == "same-origin" || site == "none");
    let host = text(headers, header::HOST);
    let origin = headers.get(header::ORIGIN).map(|origin| origin.to_str().unwrap_or_default());
    let is_ours = |origin: &str| {
        let authority = origin.split_once("://").map(|(_, authority)| authority);
        authority.zip(host).is_some_and(|(authority, host)| authority.eq_ignore_ascii_case(host))
    };
    site && origin.is_none_or(is_ours)
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// The purge that an operator wants, as the request that Magento would send.
///
/// # Errors
/// What is wrong with the body, in words.
pub(super) fn as_magento(body: &Bytes) -> Result<Request<()>, String> {
    let purge = Request::builder().method("PURGE");
    let request = match serde_json::from_slice(body).map_err(|error| error.to_string())? {
        OperatorPurge::Tags(tags) if tags.is_empty() => return Err("no tag is named".to_owned()),
        OperatorPurge::Tags(tags) => {
            if let Some(tag) = tags.iter().find(|tag| !is_literal_tag(tag)) {
                return Err(format!(
                    "`{tag}` is not a tag: letters, digits and _ as a rule; no comma, blank or pattern"
                ));
            }
            let pattern = to_magento(tags.iter().map(String::as_str));
            let pattern = HeaderValue::from_str(&pattern).map_err(|error| error.to_string())?;
            purge.uri("/").header(header::HOST, "clearcoat").header("x-magento-tags-pattern", pattern)
        }
        OperatorPurge::Url(url) => {
            let uri: Uri = url.parse().map_err(|_| WANTED_URL.to_owned())?;
            let page = uri.path_and_query().zip(uri.authority());
            let is_web = matches!(uri.scheme_str(), Some("http" | "https"));
            let Some((path, host)) = page.filter(|(_, host)| is_web && !host.as_str().contains('@')) else {
                return Err(WANTED_URL.to_owned());
            };
            purge.uri(path.as_str()).header(header::HOST, host.as_str())
        }
    };
    request.body(()).map_err(|error| error.to_string())
}

const WANTED_URL: &str = "wanted http://HOST/PATH or https://HOST/PATH";

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn token() -> Token {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"s3cret").unwrap();
        Token::read(file.path()).unwrap()
    }

    fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let good =
            [("host", "10.0.0.2:9180"), ("content-type", "application/json"), ("authorization", "Bearer s3cret")];
        let all = good.iter().chain(fields);
        let mut headers = HeaderMap::new();
        all.for_each(|(name, value)| _ = headers.insert(*name, HeaderValue::from_static(value)));
        headers
    }

    #[test]
    fn with_the_token_and_from_our_own_page_a_purge_is_taken() {
        for fields in [
            &[][..],
            &[("sec-fetch-site", "same-origin"), ("origin", "http://10.0.0.2:9180")],
            &[("origin", "https://10.0.0.2:9180")],
        ] {
            assert_eq!(objection(&headers(fields), Some(&token())), None, "{fields:?}");
        }
    }

    #[test]
    fn without_a_token_from_elsewhere_or_as_a_form_nothing_is_taken() {
        assert_eq!(objection(&headers(&[]), None).unwrap().0, 403);
        for (field, status) in [
            (("authorization", "Bearer s3cre"), 401),
            (("authorization", "s3cret"), 401),
            (("content-type", "text/plain"), 415),
            (("content-type", "application/x-www-form-urlencoded"), 415),
            (("sec-fetch-site", "cross-site"), 403),
            (("sec-fetch-site", "same-site"), 403),
            (("origin", "http://evil.test"), 403),
            (("origin", "http://10.0.0.2:80"), 403),
            (("origin", "null"), 403),
        ] {
            assert_eq!(
                objection(&headers(&[field]), Some(&token())).map(|(status, _)| status),
                Some(status),
                "{field:?}"
            );
        }
    }

    #[test]
    fn what_an_operator_wants_is_written_as_magento_would() {
        let purge = as_magento(&Bytes::from_static(br#"{"tags":["cat_p_1","cat_c_3"]}"#)).unwrap();
        assert_eq!(purge.headers()["x-magento-tags-pattern"], "((^|,)cat_p_1(,|$))|((^|,)cat_c_3(,|$))");
        let purge = as_magento(&Bytes::from_static(br#"{"url":"https://shop.test/a?b=c"}"#)).unwrap();
        assert_eq!(
            (purge.uri().to_string().as_str(), &purge.headers()["host"]),
            ("/a?b=c", &"shop.test".parse().unwrap())
        );
        for bad in [
            "{}",
            r#"{"tags":[]}"#,
            r#"{"tags":["cat_p_.*"]}"#,
            r#"{"tags":["a,b"]}"#,
            r#"{"url":"/a"}"#,
            r#"{"url":"ftp://a/b"}"#,
            r#"{"url":"http://user@a/b"}"#,
            r#"{"all":true}"#,
            "no JSON",
        ] {
            assert!(as_magento(&Bytes::copy_from_slice(bad.as_bytes())).is_err(), "{bad}");
        }
    }
}
