//! A request that is handed on as it came is read: its target, its host, and the fields that may go with it.

use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};

use super::{POOL, Refusal, SOFT, TAGS_PATTERN};
use crate::purge::forward::{BadForward, Unchecked, shown};
use crate::purge::{Forward, Pattern, PurgeRules, RequestLimits};

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

/// The request as it goes to every Varnish.
///
/// # Errors
/// [`Refusal`] where it names nothing, or no Varnish of these limits takes it.
pub(super) fn read(method: &Method, uri: &Uri, headers: &HeaderMap, rules: &PurgeRules) -> Result<Forward, Refusal> {
    let target = target(uri)?;
    let mut kept: Vec<_> = host(uri, headers)?.map(|host| ("host".to_owned(), host)).into_iter().collect();
    for (name, value) in headers {
        if !NOT_A_TARGET.contains(&name.as_str()) && !rules.withholds(name.as_str()) {
            kept.push((name.to_string(), value_of(name, value)?));
        }
    }
    let names_a_page = target != "/" && target != "*";
    let names_something = kept.iter().any(|(name, _)| name != "host" && name != SOFT);
    // `PURGE /` alone is what asks a Varnish whether it would obey. Other methods say enough by themselves: a Drupal or
    // Shopware sends `BAN /` for all pages, and a VCL that wants more answers that it does.
    if method == "PURGE" && !names_a_page && !names_something {
        return Err(Refusal::NoTarget);
    }
    let forward = Forward::try_from(Unchecked { method: method.to_string(), target, headers: kept })?;
    within(&forward, rules.limits)?;
    Ok(forward)
}

/// The target in origin form (RFC 9112 section 3.2), or `*`.
fn target(uri: &Uri) -> Result<String, Refusal> {
    let target = uri.path_and_query().map_or("", |target| target.as_str());
    match uri.scheme() {
        // The path of an absolute form may be empty (section 3.2.1).
        Some(_) if !target.starts_with('/') => Ok(format!("/{target}")),
        // `PURGE shop.test:80`: an authority.
        None if uri.authority().is_some() => Err(BadForward::Target(shown(&uri.to_string())).into()),
        _ => Ok(target.to_owned()),
    }
}

/// The host that is meant: that of an absolute target counts before the field (RFC 9112 section 3.2.2). `None` if the
/// request has neither. User information in a target is a credential and no part of the host.
fn host(uri: &Uri, headers: &HeaderMap) -> Result<Option<String>, Refusal> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next().map(|value| text("host", value)).transpose()?;
    if hosts.next().is_some() {
        return Err(BadForward::Host.into());
    }
    if let Some(authority) = uri.authority() {
        let authority = authority.as_str();
        return Ok(Some(authority.rsplit_once('@').map_or(authority, |(_, host)| host).to_owned()));
    }
    Ok(host.filter(|host| !host.is_empty()))
}

/// The value of a field. Magento's headers are patterns whatever the method, and go on as these do.
fn value_of(name: &HeaderName, value: &HeaderValue) -> Result<String, Refusal> {
    let header = match name.as_str() {
        TAGS_PATTERN => "X-Magento-Tags-Pattern",
        POOL => "X-Pool",
        name => return text(name, value),
    };
    let understood = Pattern::read(value.as_bytes()).map_err(|reason| Refusal::Pattern { header, reason })?;
    // Several are one that is too long for a line, which is found out below.
    let patterns: Vec<&str> = understood.patterns.iter().map(Pattern::as_str).collect();
    Ok(patterns.join("|"))
}

/// # Errors
/// [`Refusal::NotText`] with the place.
fn text(name: &str, value: &HeaderValue) -> Result<String, Refusal> {
    match std::str::from_utf8(value.as_bytes()) {
        Ok(text) => Ok(text.to_owned()),
        Err(error) => Err(Refusal::NotText { header: name.to_owned(), at: error.valid_up_to() }),
    }
}

fn within(forward: &Forward, limits: RequestLimits) -> Result<(), Refusal> {
    let too_large = |what: String, is: usize, most: usize, parameter: &'static str| {
        Err(Refusal::TooLarge { what, is, most, parameter })
    };
    let first = forward.method.len() + forward.target.len() + "  HTTP/1.1\r\n".len();
    let mut head = first + "\r\n".len();
    if first > limits.line {
        return too_large("the first line of the request".to_owned(), first, limits.line, "http_req_hdr_len");
    }
    for (name, value) in &forward.headers {
        let line = name.len() + value.len() + ": \r\n".len();
        if line > limits.line {
            return too_large(format!("{name}: the line"), line, limits.line, "http_req_hdr_len");
        }
        head += line;
    }
    if head > limits.head {
        return too_large("the head of the request".to_owned(), head, limits.head, "http_req_size");
    }
    let fields = forward.headers.len();
    if fields > limits.fields {
        return too_large("the number of header fields".to_owned(), fields, limits.fields, "http_max_hdr");
    }
    Ok(())
}
