//! What counts as one client where clients are counted by their address.

use std::net::IpAddr;

/// An IPv4 address, or a /64 of IPv6: the least that a site gets (RFC 6177), so whoever has one has 2^64 addresses.
pub(super) fn site_of(client: IpAddr) -> u128 {
    match client.to_canonical() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits() >> 64 << 64,
    }
}
