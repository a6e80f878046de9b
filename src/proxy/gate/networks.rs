//! A set of networks that is asked for each request: sorted ranges, so that a block list of thousands costs a dozen steps.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

/// Networks of both families.
#[derive(Debug, Default)]
pub(super) struct NetworkSet {
    /// First and last addresses, sorted, none touching another.
    ranges: Box<[(u128, u128)]>,
}

impl NetworkSet {
    pub(super) fn new(networks: &[IpNet]) -> Self {
        let mut sorted: Vec<(u128, u128)> = networks.iter().flat_map(ranges_of).collect();
        sorted.sort_unstable();
        let mut ranges: Vec<(u128, u128)> = Vec::with_capacity(sorted.len());
        for (first, last) in sorted {
            match ranges.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => ranges.push((first, last)),
            }
        }
        NetworkSet { ranges: ranges.into() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub(super) fn contains(&self, address: IpAddr) -> bool {
        let address = number(address);
        let after = self.ranges.partition_point(|&(first, _)| first <= address);
        after > 0 && address <= self.ranges[after - 1].1
    }
}

/// The addresses of a network. One of IPv6 around the place of IPv4 has none of that: `::/0` is all of IPv6.
fn ranges_of(network: &IpNet) -> impl Iterator<Item = (u128, u128)> {
    let (first, last) = (number(network.network()), number(network.broadcast()));
    let (of_ipv4, end) = (number(Ipv4Addr::UNSPECIFIED.into()), number(Ipv4Addr::BROADCAST.into()));
    let is_around = network.addr().is_ipv6() && first <= of_ipv4 && end <= last && network.prefix_len() < 96;
    let (before, after) = if is_around { ((first, of_ipv4 - 1), Some((end + 1, last))) } else { ((first, last), None) };
    std::iter::once(before).chain(after)
}

/// IPv4 addresses have the place that IPv6 has for them (RFC 4291 section 2.5.5.2).
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_has_what_one_of_its_networks_has(
            networks in prop::collection::vec((any::<u8>(), 0u8..=16), 0..12),
            addresses in prop::collection::vec(any::<[u8; 2]>(), 20),
        ) {
            // In a small space, so that they touch and overlap.
            let network = |&(byte, length): &(u8, u8)| -> IpNet {
                format!("10.0.{byte}.{byte}/{}", 16 + length).parse::<IpNet>().unwrap().trunc()
            };
            let networks: Vec<IpNet> = networks.iter().map(network).collect();
            let set = NetworkSet::new(&networks);
            for [high, low] in addresses {
                let address = IpAddr::from([10, 0, high, low]);
                prop_assert_eq!(set.contains(address), networks.iter().any(|network| network.contains(&address)));
            }
        }
    }

    #[test]
    fn both_families_are_in_one_set() {
        let set = NetworkSet::new(&["192.0.2.0/24", "2001:db8::/32"].map(|network| network.parse().unwrap()));
        for (address, expected) in [("192.0.2.255", true), ("192.0.3.0", false), ("2001:db8:1::", true), ("::1", false)]
        {
            assert_eq!(set.contains(address.parse().unwrap()), expected, "{address}");
        }
        let ipv6 = NetworkSet::new(&["::/0".parse().unwrap()]);
        let mapped = NetworkSet::new(&["::ffff:192.0.2.0/120".parse().unwrap()]);
        for (address, is_ipv6) in [("192.0.2.1", false), ("::ffff:192.0.2.1", false), ("::1", true), ("ff::", true)] {
            let address = address.parse().unwrap();
            assert_eq!((ipv6.contains(address), mapped.contains(address)), (is_ipv6, !is_ipv6), "{address}");
        }
        assert!(!NetworkSet::default().contains([192, 0, 2, 1].into()));
    }
}
