//! Past the caches: what a VCL does to a page has to be done here where no Varnish is on its way.
//!
//! Magento relies on the cache in front of it. It marks its pages as public for a day, because the VCL takes that back
//! before a browser or a CDN sees it (nobody can purge those); it writes the tags of a page into its head, because the VCL
//! takes them out; and it leaves blocks to ESI. So a request that goes to a web node from the edge is treated on both
//! ways as `vcl_recv`, `vcl_backend_response` and `vcl_deliver` of our VCL and of Magento's would, and no further:
//!
//! - Methods that our VCL refuses are refused. (Magento's pipes them, which would hand PHP a connection that nobody looks
//!   into; there is nothing to be said for that here.)
//! - A page is asked for whole and plain, so that it can be filled in ([`fragment`], and `attempt::page`). What is
//!   missing is missing on both ways: a CDN's own header (`CDN-Cache-Control`) is the shop's word to its CDN.
//! - Of an answer, what was meant for Varnish comes off; what is not `private` and no file must not be stored by anybody.
//!   `private` counts as Magento writes it: with an argument (`private="Set-Cookie"`) the rest may be stored by all.
//! - A file that anybody may store sets nobody's cookie.
//!
//! Files (`/static/`, `/media/`) keep their lifetime, their ranges and their validators: their names change with their
//! content, and nothing is filled in.

pub(super) mod fragment;

use crate::http1::{Framing, Method, RequestHead, ResponseHead};

/// What is told to everybody who could store a page, in the words of Magento's VCL.
const NOT_STORED: &[(&str, &str)] =
    &[("cache-control", "no-store, no-cache, must-revalidate, max-age=0"), ("pragma", "no-cache"), ("expires", "-1")];

/// What `vcl_deliver` takes off.
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

/// What asks for a part of a page, for another form of it, or whether it has changed. None of it holds for a page that is
/// filled in on the way.
const PARTIAL: [&str; 5] = ["accept-encoding", "if-modified-since", "if-none-match", "if-range", "range"];

/// What says something about the bytes of a body that is replaced.
const OF_THE_BYTES: [&str; 7] =
    ["accept-ranges", "content-digest", "content-md5", "digest", "etag", "last-modified", "repr-digest"];

/// What belongs to the body of a request, and not to the request for a fragment.
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

/// Whether a web node may get a request with this method from a client. Methods have a case.
pub(super) fn admits(request: &RequestHead) -> bool {
    matches!(request.method_name(), b"GET" | b"HEAD" | b"POST" | b"PUT" | b"PATCH" | b"DELETE" | b"OPTIONS")
}

/// Makes a request ask for the whole of a page, without an encoding that nobody here could look into.
pub(super) fn ask_for_whole(request: &mut RequestHead) {
    if !is_file(request.path()) {
        request.drop_fields(|name| is_one_of(name, &PARTIAL));
    }
}

/// Leaves of a request what holds for the fragments of its page.
pub(super) fn ask_for_fragments(request: &mut RequestHead) {
    request.drop_fields(|name| is_one_of(name, &OF_THE_BODY));
}

/// What becomes of the body of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// It passes as it is.
    Passes,
    /// It is a page whose blocks are to be filled in.
    Page,
    /// It is a page, and its encoding hides whether there is anything to fill in.
    Encoded,
}

/// Tells pages from everything else.
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

/// Makes the head of an answer what `vcl_deliver` would make of it.
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
