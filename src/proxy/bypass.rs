//! Past the caches: no Varnish is in the path, so the VCL's work on a page is done here.
//!
//! Magento relies on the cache in front of it. It marks its pages as public for a day, because the VCL revokes that
//! before a browser or a CDN sees it (those cannot be purged); it writes a page's tags into its head, because the VCL
//! removes them; and it leaves blocks to ESI. So a request from the edge directly to a web node, and its answer, are
//! treated as by `vcl_recv`, `vcl_backend_response` and `vcl_deliver` of our VCL and of Magento's, and no further:
//!
//! - Methods that our VCL refuses are refused. (Magento's VCL pipes them, which would hand PHP an uninspected
//!   connection; nothing speaks for that here.)
//! - A page is requested complete and unencoded, so that it can be filled in ([`fragment`], and `attempt::page`). Fields
//!   that the VCL leaves alone are left alone here, too: `CDN-Cache-Control` is between the shop and its CDN.
//! - Fields meant for Varnish are removed from an answer; a page that is neither `private` nor a file is marked as not
//!   storable at all. `private` counts as Magento writes it: with an argument (`private="Set-Cookie"`) a shared cache
//!   may store the rest.
//! - A publicly storable file sets no cookie.
//!
//! Files (`/static/`, `/media/`) keep their lifetime, their ranges and their validators: their names change with their
//! content, and nothing is filled in.

pub(super) mod fragment;

use crate::http1::{Framing, Method, RequestHead, ResponseHead};

/// Sent with a page to keep every cache from storing it, in the words of Magento's VCL.
const NOT_STORED: &[(&str, &str)] =
    &[("cache-control", "no-store, no-cache, must-revalidate, max-age=0"), ("pragma", "no-cache"), ("expires", "-1")];

/// Fields that `vcl_deliver` removes.
const FOR_VARNISH: [&str; 10] = [
    "link",
    "server",
    "surrogate-control",
    "via",
    "x-magento-cache-debug",
    "x-magento-debug",
    "x-magento-tags",
    "x-powered-by",
    "x-varnish",
    "xkey",
];

/// Fields that ask for a part of a page, another encoding of it, or whether it has changed. None applies to a page that
/// is filled in here.
const PARTIAL: [&str; 5] = ["accept-encoding", "if-modified-since", "if-none-match", "if-range", "range"];

/// Fields that describe the bytes of a body that is replaced.
const OF_THE_BYTES: [&str; 7] =
    ["accept-ranges", "content-digest", "content-md5", "digest", "etag", "last-modified", "repr-digest"];

/// Fields of a request's body, which do not apply to a request for a fragment.
const OF_THE_BODY: [&str; 7] = [
    "content-encoding",
    "content-language",
    "content-md5",
    "content-type",
    "expect",
    "if-match",
    "if-unmodified-since",
];

fn is_one_of(name: &[u8], names: &[&str]) -> bool {
    names.iter().any(|known| name.eq_ignore_ascii_case(known.as_bytes()))
}

/// `^/(pub/)?(media|static)/`, as in the VCL.
fn is_file(path: &[u8]) -> bool {
    let path = path.strip_prefix(b"/pub").unwrap_or(path);
    path.starts_with(b"/media/") || path.starts_with(b"/static/")
}

/// Whether a client's request with this method may go to a web node. Methods are case-sensitive.
pub(super) fn admits(request: &RequestHead) -> bool {
    matches!(request.method_name(), b"GET" | b"HEAD" | b"POST" | b"PUT" | b"PATCH" | b"DELETE" | b"OPTIONS")
}

/// Makes a request ask for the complete page without a content encoding, which could not be parsed here.
pub(super) fn ask_for_whole(request: &mut RequestHead) {
    if !is_file(request.path()) {
        request.drop_fields(|name| is_one_of(name, &PARTIAL));
    }
}

/// Reduces a request to the fields that apply to its page's fragments.
pub(super) fn ask_for_fragments(request: &mut RequestHead) {
    request.drop_fields(|name| is_one_of(name, &OF_THE_BODY));
}

/// How the body of an answer is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// Relayed unchanged.
    Passes,
    /// A page whose ESI blocks are to be filled in.
    Page,
    /// A page whose encoding hides whether it has ESI blocks.
    Encoded,
}

/// Distinguishes pages from everything else.
pub(super) fn body_of(request: &RequestHead, answer: &ResponseHead) -> Body {
    let is_whole = answer.status >= 200 && !matches!(answer.status, 204 | 206 | 304);
    if !is_whole || !is_markup(answer) || is_file(request.path()) {
        Body::Passes
    } else if is_encoded(answer) {
        Body::Encoded
    } else {
        Body::Page
    }
}

fn is_markup(answer: &ResponseHead) -> bool {
    let is_html = |value: &[u8]| value.get(..9).is_some_and(|start| start.eq_ignore_ascii_case(b"text/html"));
    answer.kept_fields().any(|(name, value)| name.eq_ignore_ascii_case(b"content-type") && is_html(value))
}

fn is_encoded(answer: &ResponseHead) -> bool {
    let is_encoding = |value: &[u8]| !value.is_empty() && !value.eq_ignore_ascii_case(b"identity");
    answer.kept_fields().any(|(name, value)| name.eq_ignore_ascii_case(b"content-encoding") && is_encoding(value))
}

/// Rewrites an answer's head as `vcl_deliver` would.
pub(super) fn deliver(answer: &mut ResponseHead, request: &RequestHead) {
    let is_page = body_of(request, answer) == Body::Page;
    let file = is_file(request.path());
    let is_debugged = answer.kept_fields().any(|(name, _)| name.eq_ignore_ascii_case(b"x-magento-debug"));
    answer.drop_fields(|name| {
        is_one_of(name, &FOR_VARNISH)
            || (!is_debugged && name.eq_ignore_ascii_case(b"age"))
            || name.get(..12).is_some_and(|start| start.eq_ignore_ascii_case(b"x-clearcoat-"))
    });
    if file {
        if !says(answer, &["private", "no-store", "no-cache"]) {
            answer.drop_fields(|name| name.eq_ignore_ascii_case(b"set-cookie"));
        }
    } else if !says(answer, &["private"]) {
        answer.drop_fields(|name| is_one_of(name, &["cache-control", "expires", "pragma"]));
        answer.add_fields(NOT_STORED);
    }
    if is_page {
        answer.drop_fields(|name| is_one_of(name, &OF_THE_BYTES));
        if request.method == Method::Head || answer.framing != Framing::None {
            answer.replace_body();
        }
    }
}

/// Whether `Cache-Control` has one of these directives, without an argument.
fn says(answer: &ResponseHead, directives: &[&str]) -> bool {
    let lines = answer.kept_fields().filter(|(name, _)| name.eq_ignore_ascii_case(b"cache-control"));
    lines.flat_map(|(_, value)| value.split(|&byte| byte == b',')).any(|said| is_one_of(said.trim_ascii(), directives))
}

#[cfg(test)]
mod tests;
