//! Where others reach this node.
//!
//! An address that is configured twice is wrong once. So if nobody says it, it is the one from which this host
//! would talk to etcd: clearcoat is found the same way. The kernel knows it as soon as a socket is connected, and for UDP
//! that sends nothing. A host with a network of its own for such traffic names the interface instead.
//!
//! At the start of a machine neither may be there yet; then it is asked for again with each check, and there is no
//! registration until it is known. It is asked for again when this host does not have it any more: a container that was cut
//! off from its network may come back to it with another one.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use if_addrs::IfAddr;
use tokio::net::{UdpSocket, lookup_host};

/// How the address is found.
#[derive(Clone, Debug)]
pub enum Address {
    /// `HOST:PORT` as it was given.
    Given(String),
    /// An address of this interface, with a port.
    Of(String, u16),
    /// The one from which these URLs would be asked, with a port.
    Towards(Vec<String>, u16),
}

/// Why the address is not known (yet).
#[derive(Debug, thiserror::Error)]
pub(super) enum UnknownAddress {
    /// No such interface, or an interface without an address.
    #[error("the interface {0} has no address that others could use")]
    Interface(String),
    /// The system would not say.
    #[error("the addresses of this host are not known")]
    Interfaces(#[source] io::Error),
    /// No way to etcd.
    #[error("no way to {0}")]
    Route(String, #[source] io::Error),
    /// Without a name to ask.
    #[error("no etcd to find a way to")]
    NoEtcd,
}

impl Address {
    /// Whether an address that was found before is still one of this host. One that was given is not ours to judge.
    pub(super) fn still_is(&self, found: &str) -> bool {
        match (self, found.parse::<SocketAddr>()) {
            (Address::Of(..) | Address::Towards(..), Ok(found)) => {
                // Without an answer of the system nothing has changed.
                if_addrs::get_if_addrs().map_or(true, |all| all.iter().any(|one| one.ip() == found.ip()))
            }
            _ => true,
        }
    }

    /// The address as it is written: `HOST:PORT`, with brackets around one of IPv6.
    pub(super) async fn find(&self) -> Result<String, UnknownAddress> {
        match self {
            Address::Given(address) => Ok(address.clone()),
            Address::Of(interface, port) => {
                let all = if_addrs::get_if_addrs().map_err(UnknownAddress::Interfaces)?;
                let ours = all.into_iter().filter(|one| one.name == *interface).map(|one| one.addr);
                let chosen = preferred(ours).ok_or_else(|| UnknownAddress::Interface(interface.clone()))?;
                Ok(SocketAddr::new(chosen, *port).to_string())
            }
            Address::Towards(endpoints, port) => {
                let mut failure = UnknownAddress::NoEtcd;
                for endpoint in endpoints {
                    match towards(endpoint).await {
                        Ok(local) => return Ok(SocketAddr::new(local, *port).to_string()),
                        Err(error) => failure = UnknownAddress::Route(endpoint.clone(), error),
                    }
                }
                Err(failure)
            }
        }
    }
}

/// Whether only this host can use an address.
pub(super) fn is_local(address: &str) -> bool {
    address.parse::<SocketAddr>().is_ok_and(|address| address.ip().is_loopback())
}

/// IPv4 before IPv6, as it is configured more often; none that needs the name of an interface beside it.
fn preferred(addresses: impl Iterator<Item = IfAddr>) -> Option<IpAddr> {
    let usable = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => *ip != Ipv4Addr::UNSPECIFIED && !ip.is_link_local(),
        IpAddr::V6(ip) => *ip != Ipv6Addr::UNSPECIFIED && !ip.is_unicast_link_local(),
    };
    addresses.map(|address| address.ip()).filter(usable).min_by_key(IpAddr::is_ipv6)
}

/// The address of this host on the way to a URL.
async fn towards(endpoint: &str) -> io::Result<IpAddr> {
    let authority = endpoint.split("://").last().unwrap_or(endpoint).trim_end_matches('/');
    let mut failure = io::Error::from(io::ErrorKind::NotFound);
    for there in lookup_host(authority).await? {
        let any: IpAddr = if there.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let local = async {
            let socket = UdpSocket::bind((any, 0)).await?;
            socket.connect(there).await?;
            socket.local_addr()
        };
        match local.await {
            Ok(local) => return Ok(local.ip()),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_is_that_of_an_interface_or_of_the_way_to_etcd() {
        assert_eq!(Address::Given("web-1.shop:80".into()).find().await.unwrap(), "web-1.shop:80");
        assert_eq!(Address::Of("lo".into(), 80).find().await.unwrap(), "127.0.0.1:80");
        let towards = Address::Towards(vec!["http://127.0.0.9:2379/".into()], 6081);
        assert_eq!(towards.find().await.unwrap(), "127.0.0.1:6081");
        assert!(Address::Of("none0".into(), 80).find().await.unwrap_err().to_string().contains("none0"));
    }

    #[test]
    fn an_address_that_this_host_has_lost_is_known() {
        let towards = Address::Towards(vec!["http://127.0.0.9:2379/".into()], 6081);
        assert!(towards.still_is("127.0.0.1:6081") && !towards.still_is("192.0.2.1:6081"));
        assert!(!Address::Of("lo".into(), 80).still_is("[2001:db8::1]:80"));
        assert!(Address::Given("192.0.2.1:80".into()).still_is("192.0.2.1:80"));
    }

    #[tokio::test]
    async fn an_address_of_ipv6_has_brackets() {
        // Some hosts have no IPv6.
        if std::net::UdpSocket::bind("[::1]:0").is_err() {
            println!("skipped: this host has no IPv6");
            return;
        }
        let towards = Address::Towards(vec!["https://[::1]:2379".into()], 80);
        assert_eq!(towards.find().await.unwrap(), "[::1]:80");
    }

    #[test]
    fn what_only_this_host_can_use_is_known() {
        assert!(is_local("127.0.0.1:80") && is_local("[::1]:80"));
        assert!(!is_local("10.0.0.5:80") && !is_local("web-1:80"));
    }
}
