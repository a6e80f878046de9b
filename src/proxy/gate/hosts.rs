//! The hosts that the edge answers for.
//!
//! A host that is not ours is answered 421 (RFC 9110 section 15.5.20): the edge is not willing to answer for it. That is what
//! a browser needs that has reused a connection of HTTP/2 for another name of the certificate (RFC 9113 section 9.1.1): it
//! asks again on a new one. A 404 would be the answer of a page, that the next cache may keep.
//!
//! Names are compared as names: without the port, in any case, with or without the dot of the root. An IPv6 address is
//! compared as an address.

use std::collections::HashSet;
use std::net::Ipv6Addr;

use crate::http1::bare_host;

/// The longest name (RFC 1035 section 3.1), in bytes.
const LONGEST: usize = 255;

/// Hosts by name.
#[derive(Debug)]
pub(super) struct HostList {
    /// In lower case.
    names: HashSet<Box<[u8]>>,
    /// What names end in, with the dot before it: `.shop.example` for `*.shop.example`.
    endings: HashSet<Box<[u8]>>,
}

impl HostList {
    /// `*.` at the beginning stands for one label or several.
    pub(super) fn new(hosts: &[String]) -> Self {
        let mut list = HostList { names: HashSet::new(), endings: HashSet::new() };
        for host in hosts {
            let host = host.to_ascii_lowercase();
            if let Some(ending) = host.strip_prefix('*') {
                list.endings.insert(ending.as_bytes().into());
            } else {
                let literal = host.trim_matches(['[', ']']).parse::<Ipv6Addr>();
                let name = literal.map_or(host, |address| format!("[{address}]"));
                list.names.insert(name.into_bytes().into());
            }
        }
        list
    }

    /// Whether the host of this `Host` or `:authority` is one of them.
    pub(super) fn has(&self, authority: &[u8]) -> bool {
        let host = bare_host(authority);
        if let [b'[', literal @ .., b']'] = host {
            let address = std::str::from_utf8(literal).ok().and_then(|text| text.parse::<Ipv6Addr>().ok());
            return address.is_some_and(|address| self.names.contains(format!("[{address}]").as_bytes()));
        }
        if host.len() > LONGEST {
            return false;
        }
        let mut lower = [0; LONGEST];
        let lower = &mut lower[..host.len()];
        lower.copy_from_slice(host);
        lower.make_ascii_lowercase();
        let lower = &*lower;
        // A dot at the very beginning would have nothing before it.
        let endings = || (1..lower.len()).filter(|&at| lower[at] == b'.').map(|at| &lower[at..]);
        self.names.contains(lower)
            || (!self.endings.is_empty() && endings().any(|ending| self.endings.contains(ending)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(hosts: &[&str]) -> HostList {
        HostList::new(&hosts.iter().map(|&host| host.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn names_match_in_any_case_with_any_port_and_with_the_dot_of_the_root() {
        let hosts = list(&["Shop.example", "*.Stores.example", "192.0.2.1", "[2001:DB8::1]", "2001:db8:0::2"]);
        for ours in [
            "shop.example",
            "SHOP.EXAMPLE",
            "shop.example:8443",
            "shop.example:",
            "shop.example.",
            "shop.example.:443",
            "de.stores.example",
            "a.b.stores.example:80",
            "192.0.2.1:8080",
            "[2001:db8::1]",
            "[2001:db8:0:0::1]:443",
            "[2001:db8::2]:443",
        ] {
            assert!(hosts.has(ours.as_bytes()), "{ours}");
        }
        for others in [
            "",
            ".",
            "example",
            "shop.example.evil.example",
            "shop.example..",
            "xshop.example",
            "stores.example",
            ".stores.example",
            "xstores.example",
            "192.0.2.10",
            "[2001:db8::3]",
            "[::ffff:192.0.2.1]",
        ] {
            assert!(!hosts.has(others.as_bytes()), "{others}");
        }
        assert!(!hosts.has(format!("{}.stores.example", "a".repeat(300)).as_bytes()));
    }

    proptest! {
        #[test]
        fn a_wildcard_matches_what_has_labels_before_it_and_nothing_else(
            labels in prop::collection::vec("[a-zA-Z0-9-]{1,9}", 0..4),
            port in prop::option::of(any::<u16>()),
            dot in any::<bool>(),
        ) {
            let mut host: String = labels.iter().map(|label| format!("{label}.")).collect();
            host.push_str("Shop.Example");
            if dot { host.push('.'); }
            if let Some(port) = port { host.push_str(&format!(":{port}")); }
            prop_assert_eq!(list(&["*.shop.example"]).has(host.as_bytes()), !labels.is_empty());
            prop_assert_eq!(list(&["shop.example"]).has(host.as_bytes()), labels.is_empty());
        }
    }
}
