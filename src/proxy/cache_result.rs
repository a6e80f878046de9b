//! How a cache came by an answer, as it says itself.
//!
//! Our VCL (and Magento's) says it in words, `X-Magento-Cache-Debug`. Any other Varnish says it in `X-Varnish`: the number
//! of the request, and for a hit that of the request that stored the page. Whether one that found nothing could have
//! stored it is not in there, so such a GET counts as a miss. A VCL that drops both fields still has `Age`. An answer
//! with none of them says nothing, and is not counted.

use crate::http1::{Method, ResponseHead};
use crate::telemetry::CacheResult;

/// The result that a cache's answer tells of; `None` if it tells of none. Reads the parsed head, and allocates nothing.
pub(super) fn cache_result(method: Method, answer: &ResponseHead) -> Option<CacheResult> {
    let is_cacheable = matches!(method, Method::Get | Method::Head);
    let missed = || if is_cacheable { CacheResult::Miss } else { CacheResult::Pass };
    let mut found = None;
    // Few fields have one of these lengths, so nearly all cost one comparison of numbers.
    for (name, value) in answer.kept_fields_of_length(|length| matches!(length, 3 | 9 | 21)) {
        match name.len() {
            21 if name.eq_ignore_ascii_case(b"x-magento-cache-debug") => match value {
                b"HIT" => return Some(CacheResult::Hit),
                b"MISS" => return Some(missed()),
                b"UNCACHEABLE" => return Some(CacheResult::Pass),
                _ => {}
            },
            9 if name.eq_ignore_ascii_case(b"x-varnish") => {
                found = Some(if value.contains(&b' ') { CacheResult::Hit } else { missed() });
            }
            3 if found.is_none() && name.eq_ignore_ascii_case(b"age") => {
                found = Some(if value == b"0" { missed() } else { CacheResult::Hit });
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(method: Method, fields: &str) -> Option<&'static str> {
        let mut head = ResponseHead::default();
        let text = format!("HTTP/1.1 200 OK\r\nServer: a\r\n{fields}Content-Length: 0\r\n\r\n");
        head.parse(text.as_bytes(), method, 100).unwrap();
        cache_result(method, &head).map(CacheResult::as_str)
    }

    #[test]
    fn what_a_vcl_says_in_words_counts_before_all_else() {
        let debug = |value: &str| result(Method::Get, &format!("X-Varnish: 5 3\r\nX-Magento-Cache-Debug: {value}\r\n"));
        let told = ["HIT", "MISS", "UNCACHEABLE", "odd"].map(debug);
        assert_eq!(told, [Some("hit"), Some("miss"), Some("pass"), Some("hit")]);
    }

    #[test]
    fn without_words_two_numbers_are_a_hit_and_one_is_none() {
        assert_eq!(result(Method::Get, "X-Varnish: 32770 5\r\nAge: 0\r\n"), Some("hit"));
        assert_eq!(result(Method::Get, "Age: 7\r\nX-Varnish: 32770\r\n"), Some("miss"));
        assert_eq!(result(Method::Other, "X-Varnish: 32770\r\n"), Some("pass"));
    }

    #[test]
    fn with_nothing_but_an_age_that_decides_and_without_one_nothing_is_known() {
        assert_eq!(result(Method::Get, "Age: 12\r\n"), Some("hit"));
        assert_eq!(result(Method::Get, "Age: 0\r\n"), Some("miss"));
        assert_eq!(result(Method::Get, "X-Other: 1\r\n"), None);
    }
}
