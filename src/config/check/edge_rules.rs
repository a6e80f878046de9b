//! The rules of the edge.

use std::net::IpAddr;
use std::time::Duration;

use super::RuleCheck;
use crate::config::{CIPHER_SUITES, CIPHER_SUITES_OF_TLS13, Edge, TlsListener, TlsVersion};

/// The least `max-age` that the lists of the browsers accept, in seconds: a year.
const PRELOAD_MAX_AGE: u32 = 31_536_000;

/// The highest rate, in requests a second, and the largest burst.
const HIGHEST_RATE: u32 = 100_000;

/// The most that a bucket may hold, in seconds of its rate.
const LONGEST_REFILL: u32 = 3600;

pub(super) fn check(edge: &Edge, rules: &mut RuleCheck) {
    check_tls(&edge.tls, rules);
    for (index, host) in edge.hosts.iter().enumerate() {
        let reason = "wanted a host without a port: a name such as shop.example, *.shop.example for all names below it, or an \
                      address; a name that is not ASCII in its form for the DNS (xn--...)";
        rules.require(is_host_rule(host), format!("edge.hosts[{index}]"), reason);
    }
    let https = &edge.https;
    rules.require(https.port != 0, "edge.https.port", "must be at least 1");
    let reason = "must be false without [[edge.tls]] and edge.trusted_proxies: nothing can be reached by https then, and the \
                  redirect would never end";
    let has_tls = !edge.tls.is_empty() || !edge.trusted_proxies.is_empty();
    rules.require(!https.redirect || has_tls, "edge.https.redirect", reason);
    let lasts = https.hsts_max_age >= PRELOAD_MAX_AGE;
    let reason =
        "must be false unless edge.https.hsts_include_subdomains is true and edge.https.hsts_max_age at least 31536000";
    let may_preload = https.hsts_include_subdomains && lasts;
    rules.require(!https.hsts_preload || may_preload, "edge.https.hsts_preload", reason);
    let limit = &edge.rate_limit;
    for (key, rate) in [("client_rate", limit.client_rate), ("total_rate", limit.total_rate)] {
        let reason = format!("must be at most {HIGHEST_RATE}; 0 is no limit");
        rules.require(rate <= HIGHEST_RATE, format!("edge.rate_limit.{key}"), reason);
    }
    for (name, rate, burst) in
        [("client", limit.client_rate, limit.client_burst), ("total", limit.total_rate, limit.total_burst)]
    {
        let key = format!("edge.rate_limit.{name}_burst");
        let reason = format!("must be 1 to {HIGHEST_RATE}");
        rules.require((1..=HIGHEST_RATE).contains(&burst), &*key, reason);
        let fills = rate == 0 || burst <= rate.saturating_mul(LONGEST_REFILL);
        let reason = format!("must be at most {LONGEST_REFILL} times edge.rate_limit.{name}_rate, which is {rate}");
        rules.require(fills, key, reason);
    }
    let reason = "must be at least 1s";
    rules.require(edge.maintenance.retry_after >= Duration::from_secs(1), "edge.maintenance.retry_after", reason);
}

/// What clients of `[[edge.tls]]` must be able to do.
fn check_tls(tables: &[TlsListener], rules: &mut RuleCheck) {
    for (index, table) in tables.iter().enumerate() {
        let key = |name: &str| format!("edge.tls[{index}].{name}");
        for (place, name) in table.ciphers.iter().enumerate() {
            let reason = format!("wanted one of {}", CIPHER_SUITES.join(", "));
            rules.require(CIPHER_SUITES.contains(&&**name), key(&format!("ciphers[{place}]")), reason);
        }
        let (of_tls13, _) = CIPHER_SUITES.split_at(CIPHER_SUITES_OF_TLS13);
        let has_one = table.ciphers.is_empty() || table.ciphers.iter().any(|name| of_tls13.contains(&&**name));
        let reason = format!("must hold one of {} when min_version is 1.3", of_tls13.join(", "));
        rules.require(has_one || table.min_version == TlsVersion::V12, key("ciphers"), reason);
        // Each of them: one of several addresses is enough.
        for (twin, other) in tables[..index].iter().enumerate() {
            if other.listen.iter().any(|at| table.listen.contains(at)) {
                let reason = format!("must be as in edge.tls[{twin}], which has the same address");
                rules.require(table.min_version == other.min_version, key("min_version"), reason.clone());
                rules.require(table.ciphers == other.ciphers, key("ciphers"), reason);
            }
        }
    }
}

/// A name, perhaps below `*.`; or an address, that of IPv6 with or without brackets.
fn is_host_rule(host: &str) -> bool {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    if bare.parse::<IpAddr>().is_ok() {
        return true;
    }
    let name = host.strip_prefix("*.").unwrap_or(host);
    let is_label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_a_name_or_an_address_and_has_no_port() {
        for good in
            ["shop.example", "a", "*.shop.example", "xn--bcher-kva.example", "a_b.c", "192.0.2.1", "::1", "[::1]"]
        {
            assert!(is_host_rule(good), "{good}");
        }
        for bad in
            ["", "*", "*.", "a.*", "shop.example:80", "shop.example.", "a..b", "bücher.example", "[::1]:80", "a b"]
        {
            assert!(!is_host_rule(bad), "{bad}");
        }
    }
}
