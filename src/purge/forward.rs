//! Forwarded requests: their syntax, and the limits of every Varnish.
//!
//! A forwarded request is written to a Varnish byte by byte, and read back from disk, from etcd and from other
//! replicas. So every way to create a [`Forward`] passes the same check, and what the listener accepts can be read
//! again.
//!
//! We do not know how a VCL uses the headers. Many are regular expressions, and a ban by one of them can break Varnish
//! as Magento's can (`pattern.rs`). They cannot be limited to the same language, since a URL is short and the same
//! pattern harmless there, and a value may not be a pattern at all. Only patterns that are dangerous for short texts
//! are refused: deep nesting, which overflows the stack when compiled, groups that repeat without bound and match in
//! several ways, and PCRE options before a pattern.

use http::{HeaderName, HeaderValue};
use serde::Deserialize;

use super::pattern::MAX_NESTING;
use super::{Forward, may_purge};

/// An unchecked [`Forward`].
#[derive(Deserialize)]
pub(super) struct Unchecked {
    pub(super) method: String,
    pub(super) target: String,
    pub(super) headers: Vec<(String, String)>,
}

/// Why a request cannot be forwarded.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadForward {
    /// Not a token, or an ordinary method.
    #[error("{0:?} is no method that purges")]
    Method(String),
    /// A target that would not be one word of a request line.
    #[error("the request target {0:?} must begin with / (or be * alone) and hold no blank or control character")]
    Target(String),
    /// Not a header field.
    #[error("{0:?} is no header field, or its value has a control character")]
    Field(String),
    /// More than one host, or an invalid one.
    #[error("Host: one name or address is wanted, with a port perhaps")]
    Host,
    /// A value that would overflow a stack as a regular expression.
    #[error(
        "{name}: at byte {at}: more than {MAX_NESTING} groups in one another would overflow the stack of Varnish's \
         workers"
    )]
    Nesting {
        /// The header.
        name: String,
        /// The offset in its value.
        at: usize,
    },
    /// A value on which PCRE would give up.
    #[error(
        "{name}: at byte {at}: a group that may repeat without end, with repeats or branches in it, makes Varnish give up \
         on the pattern, and its worker panics"
    )]
    EndlessGroup {
        /// The header.
        name: String,
        /// The offset in its value.
        at: usize,
    },
    /// A value that changes PCRE's limits.
    #[error("{name}: at byte {at}: `(*` sets options of PCRE, which not every Varnish has; write `\\(*`")]
    Option {
        /// The header.
        name: String,
        /// The offset in its value.
        at: usize,
    },
}

impl TryFrom<Unchecked> for Forward {
    type Error = BadForward;

    fn try_from(Unchecked { method, target, headers }: Unchecked) -> Result<Self, BadForward> {
        // This configuration may accept less than the one, here or in another replica, that accepted the request.
        if !may_purge(&method) {
            return Err(BadForward::Method(shown(&method)));
        }
        let is_word = target.bytes().all(|byte| !byte.is_ascii_control() && byte != b' ');
        if !is_word || !(target.starts_with('/') || target == "*") {
            return Err(BadForward::Target(shown(&target)));
        }
        for (name, value) in &headers {
            if HeaderName::try_from(name).is_err() || HeaderValue::try_from(value).is_err() {
                return Err(BadForward::Field(shown(name)));
            }
            if name == "host" && !is_host(value) {
                return Err(BadForward::Host);
            }
            check_pattern(name, value.as_bytes())?;
        }
        if headers.iter().filter(|(name, _)| name == "host").count() > 1 {
            return Err(BadForward::Host);
        }
        Ok(Forward { method, target, headers })
    }
}

impl Forward {
    /// A purge of this page alone; `None` of one that cannot be named: without a host, or with a quote in its target, in
    /// which a VCL would see the end of a text.
    pub(crate) fn of_page(host: &[u8], target: &[u8]) -> Option<Forward> {
        let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().filter(|text| !text.contains('"')).map(str::to_owned);
        let (host, target) = (text(host).filter(|host| !host.is_empty())?, text(target)?);
        let headers = vec![("host".to_owned(), host)];
        Forward::try_from(Unchecked { method: "PURGE".to_owned(), target, headers }).ok()
    }
}

/// The beginning of untrusted text, for the log and the answer.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

/// Whether this can be a `Host` value (RFC 9110 section 7.2). Odd names are left to Varnish, blanks are refused.
fn is_host(value: &str) -> bool {
    value.bytes().all(|byte| byte > b' ' && !matches!(byte, 0x7f | b'/' | b'?' | b'#' | b'@' | b',' | b'"'))
}

/// Looks for what is deadly in a value, should it be a regular expression. What is none has no groups that repeat.
fn check_pattern(name: &str, value: &[u8]) -> Result<(), BadForward> {
    // The open groups, outermost first, and whether each can match in several ways.
    let mut open = vec![false];
    let mut rest = value.iter().copied().enumerate().peekable();
    while let Some((at, byte)) = rest.next() {
        match byte {
            b'\\' => _ = rest.next(),
            b'[' => skip_class(&mut rest),
            b'(' if rest.next_if(|(_, next)| *next == b'*').is_some() => {
                return Err(BadForward::Option { name: name.to_owned(), at });
            }
            b'(' if open.len() > MAX_NESTING => return Err(BadForward::Nesting { name: name.to_owned(), at }),
            b'(' => {
                open.push(false);
                // The question mark of `(?:` is not a quantifier.
                _ = rest.next_if(|(_, next)| *next == b'?');
            }
            b')' if open.len() > 1 => {
                let varies = open.pop().unwrap_or_default();
                let is_endless = is_endless(&value[at + 1..]);
                if is_endless && varies {
                    return Err(BadForward::EndlessGroup { name: name.to_owned(), at: at + 1 });
                }
                mark(&mut open, varies || is_endless);
            }
            b'*' | b'+' | b'?' | b'|' => mark(&mut open, true),
            b'{' => mark(&mut open, is_endless(&value[at..])),
            _ => {}
        }
    }
    Ok(())
}

fn mark(open: &mut [bool], varies: bool) {
    if let Some(innermost) = open.last_mut() {
        *innermost |= varies;
    }
}

/// Whether a quantifier without a bound, or with a very large one, starts here.
fn is_endless(rest: &[u8]) -> bool {
    match rest.first() {
        Some(b'*' | b'+') => true,
        Some(b'{') => {
            let inside: Vec<u8> = rest[1..].iter().copied().take_while(|&byte| byte != b'}').take(12).collect();
            let is_counted = inside.iter().all(|byte| byte.is_ascii_digit() || matches!(byte, b',' | b' '));
            is_counted && (inside.ends_with(b",") || inside.iter().filter(|byte| byte.is_ascii_digit()).count() > 1)
        }
        _ => false,
    }
}

/// Skips a class, whose first member may be its closing bracket. An unclosed one is literal text.
fn skip_class(rest: &mut (impl Iterator<Item = (usize, u8)> + Clone)) {
    let mut inside = rest.clone();
    let mut is_first = true;
    while let Some((_, byte)) = inside.next() {
        match byte {
            b'^' if is_first => continue,
            b'\\' => _ = inside.next(),
            b']' if !is_first => {
                *rest = inside;
                return;
            }
            _ => {}
        }
        is_first = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(method: &str, target: &str, headers: &[(&str, &str)]) -> Result<Forward, String> {
        let json = serde_json::json!({ "method": method, "target": target, "headers": headers });
        serde_json::from_value::<Forward>(json).map_err(|error| error.to_string())
    }

    #[test]
    fn what_would_be_two_requests_is_not_read_as_one() {
        for method in ["PURGE", "BAN", "PURGEKEYS", "URIBAN", "x-purge"] {
            assert!(checked(method, "/p/1?a=b", &[("host", "shop.test")]).is_ok(), "{method}");
        }
        assert!(checked("URIBAN", "*", &[("host", ""), ("x", ""), ("x", "a\tb\u{e4}")]).is_ok());
        for (method, target, header) in [
            ("GET", "/", ("host", "a")),
            ("post", "/", ("host", "a")),
            ("", "/", ("host", "a")),
            ("PURGE / HTTP/1.1\r\nX: y", "/", ("host", "a")),
            ("PURGE", "p", ("host", "a")),
            ("PURGE", "?p", ("host", "a")),
            ("PURGE", "", ("host", "a")),
            ("PURGE", "/ HTTP/1.1\r\nX: y", ("host", "a")),
            ("PURGE", "/", ("ho st", "a")),
            ("PURGE", "/", ("host", "a\r\nX: y")),
            ("PURGE", "/", ("host", "a b")),
            ("PURGE", "/", ("host", "a/b")),
        ] {
            assert!(checked(method, target, &[header]).is_err(), "{method:?} {target:?} {header:?}");
        }
        assert!(checked("PURGE", "/", &[("host", "a"), ("host", "b")]).is_err());
    }

    #[test]
    fn what_would_be_deadly_as_a_pattern_is_refused_in_any_header() {
        let ban = |value: &str| checked("BAN", "/", &[("host", "a"), ("x-ban-url", value)]);
        for harmless in [
            "^/p/.*\\.html(\\?.*)?$",
            "req.url ~ ^/(de|en)/.*x.*y && obj.status != 0",
            "[(((((((((((((((((((((((]*",
            "\\(\\(\\(\\(\\(\\(\\(\\(\\(\\(\\(\\(\\(\\(\\(\\(\\(\\(\\(\\(\\(\\(\\(\\(x",
            "(?:a)(b)(c){2}",
            "(a+){3}",
            "smile :)",
            "text (with remarks) + more",
            "[unclosed",
            "a) b) c)",
        ] {
            assert!(ban(harmless).is_ok(), "{harmless}: {:?}", ban(harmless));
        }
        let nested = format!("{}a{}", "(".repeat(21), ")".repeat(21));
        for (deadly, reason) in [
            (&*nested, "x-ban-url: at byte 16: more than 16 groups"),
            ("^(a+)+$", "x-ban-url: at byte 5: a group"),
            ("req.url ~ ([a-z]*,)*x", "at byte 19: a group"),
            ("((a|b)+c)*", "at byte 6: a group"),
            ("^(a|aa)+$", "at byte 7: a group"),
            ("(a?b?)+c", "at byte 6: a group"),
            ("(?:x{2,}y){1,}", "at byte 10: a group"),
            ("((a*))+", "at byte 6: a group"),
            ("(a+){50}", "at byte 4: a group"),
            ("(*LIMIT_MATCH=1)a", "at byte 0: `(*`"),
            ("x (*UTF)a", "at byte 2: `(*`"),
        ] {
            let error = ban(deadly).expect_err(deadly);
            assert!(error.contains(reason), "{deadly}: {error}");
        }
    }
}
