//! Which hosts this listener answers to, against DNS rebinding.
//!
//! The listener asks nobody who they are, since who reaches it may see what it shows. A browser inside the network reaches it as
//! well, on behalf of any page of a stranger: the page's name is made to lead here (DNS rebinding), and then the browser
//! takes our answers for that page's own. What gives such a request away is its `Host`: the stranger's name. So an answer
//! goes only to a name that no stranger can own:
//!
//! - an address, or `localhost` (RFC 6761 section 6.3): no lookup is involved;
//! - a name without a dot, such as that of a container: nobody can register one (RFC 7085, and ICANN forbids it);
//! - a name of `admin.hosts`: that by which operators come, or that a proxy in front of the listener passes on.
//!
//! Browsers always send `Host`; without one (HTTP/1.0) it is none. Metrics, health and service discovery are answered
//! under any name: monitoring asks by whatever name it has.

use http::uri::Authority;
use http::{HeaderMap, header};

/// What a request for another host is answered with.
pub(super) const REFUSED: &str = "this host name is not in admin.hosts; come by address, or list the name";

/// Whether a request with these fields is for a host of ours. `listed` are the names of `admin.hosts`.
pub(super) fn is_ours(headers: &HeaderMap, listed: &[String]) -> bool {
    headers.get_all(header::HOST).iter().all(|host| host.to_str().is_ok_and(|host| is_name_of_ours(host, listed)))
}

fn is_name_of_ours(host: &str, listed: &[String]) -> bool {
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let host = authority.host();
    if host.starts_with('[') {
        // Only an address may stand in brackets (RFC 3986 section 3.2.2).
        return !authority.as_str().contains('@');
    }
    let name = host.strip_suffix('.').unwrap_or(host);
    let is_address = name.parse::<std::net::Ipv4Addr>().is_ok();
    let is_local = name.to_ascii_lowercase().ends_with(".localhost");
    let is_known =
        is_address || is_local || !name.contains('.') || listed.iter().any(|ours| ours.eq_ignore_ascii_case(name));
    is_known && !authority.as_str().contains('@')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_that_a_stranger_can_own_is_ours_unless_it_is_listed() {
        let listed = ["Clearcoat.shop.internal".to_owned()];
        for ours in [
            "127.0.0.1:9180",
            "10.0.0.2",
            "[::1]:9180",
            "[fd00::2]",
            "localhost:9180",
            "LOCALHOST",
            "localhost.",
            "page.localhost",
            "clearcoat:9180",
            "clearcoat.shop.internal",
            "CLEARCOAT.shop.internal:443",
            "clearcoat.shop.internal.:80",
        ] {
            assert!(is_name_of_ours(ours, &listed), "{ours}");
        }
        for foreign in [
            "evil.test",
            "evil.test:9180",
            "127.0.0.1.evil.test",
            "localhost.evil.test",
            "evillocalhost.test",
            "clearcoat.shop.internal.evil.test",
            "a.clearcoat.shop.internal",
            "user@clearcoat",
            "user@[::1]",
            "",
            "a b",
            "http://10.0.0.2",
        ] {
            assert!(!is_name_of_ours(foreign, &listed), "{foreign}");
        }
    }

    #[test]
    fn without_a_host_it_is_no_browser_and_of_several_none_may_be_foreign() {
        let mut headers = HeaderMap::new();
        assert!(is_ours(&headers, &[]));
        headers.append(header::HOST, "localhost".parse().unwrap());
        assert!(is_ours(&headers, &[]));
        headers.append(header::HOST, "evil.test".parse().unwrap());
        assert!(!is_ours(&headers, &[]));
    }
}
