//! The record of a replica.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use serde::{Deserialize, Serialize};

use crate::clock;
use crate::config::{self, JournalKind};
use crate::fleet::NodeId;

/// The value of the key `replicas/<id>`. Unknown fields are ignored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// `HOST:PORT` of its purge listener.
    pub address: String,
    /// The configured kind of its journal.
    pub journal: String,
    /// The name of its journal, if it has its own. Under another name, it has none of the earlier purges.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal_id: Option<String>,
    /// Its version of clearcoat.
    pub version: String,
    /// When it started, in milliseconds since 1970.
    pub started: u64,
    /// Distinguishes this process from any other with this name.
    pub boot: String,
    /// It is about to end. A key that goes without this may have lost only its lease, and its process may still run.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
}

impl Record {
    /// The record of this process.
    pub fn new(address: String, journal: JournalKind) -> Self {
        Record {
            address,
            journal: journal.as_str().to_owned(),
            journal_id: None,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started: clock::now_ms(),
            boot: format!("{:016x}", fastrand::u64(..)),
            leaving: false,
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    pub(super) fn decode(value: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(value).map_err(|error| error.to_string())
    }
}

/// The configured name of this replica, or that of the host.
///
/// # Errors The name of the host is not a valid name.
pub fn own_id(config: &config::Replica) -> Result<NodeId, String> {
    if let Some(id) = &config.id {
        return Ok(id.clone());
    }
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    NodeId::try_from(name).map_err(|error| format!("replica.id is not set, and the host's name is of no use: {error}"))
}

/// The address at which others reach the purge listener: as configured, or the local address of a connection to etcd (or to
/// another replica) with the port of the listener.
pub fn own_address(config: &config::Replica, endpoints: &[String], listener: SocketAddr) -> String {
    if let Some(address) = &config.address {
        return address.clone();
    }
    let mut address = listener;
    if listener.ip().is_unspecified()
        && let Some(local) = endpoints.iter().find_map(|endpoint| local_address_towards(endpoint))
    {
        address.set_ip(local);
    }
    address.to_string()
}

/// The local address of a connection to this URL's host. Sends nothing.
fn local_address_towards(url: &str) -> Option<IpAddr> {
    let authority = url.split("//").nth(1)?.trim_end_matches('/');
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    if socket.connect(authority).is_err() {
        let socket = UdpSocket::bind("[::]:0").ok()?;
        socket.connect(authority).ok()?;
        return socket.local_addr().ok().map(|address| address.ip());
    }
    socket.local_addr().ok().map(|address| address.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_every_address_is_reached_where_etcd_would_see_us() {
        let endpoints = ["http://127.0.0.1:2379".to_owned()];
        let auto = config::Replica::default();
        let of = |config: &config::Replica, listener: &str| own_address(config, &endpoints, listener.parse().unwrap());
        assert_eq!(of(&auto, "0.0.0.0:6081"), "127.0.0.1:6081");
        assert_eq!(of(&auto, "127.0.0.9:6081"), "127.0.0.9:6081");
        let told = config::Replica { address: Some("clearcoat-1:6081".to_owned()), ..auto };
        assert_eq!(of(&told, "0.0.0.0:6081"), "clearcoat-1:6081");
    }

    #[test]
    fn a_record_reads_as_it_was_written_also_with_more_in_it() {
        let record = Record::new("10.0.0.2:6081".to_owned(), JournalKind::Etcd);
        assert_eq!(Record::decode(&record.encode()).unwrap(), record);
        let text = String::from_utf8(record.encode()).unwrap().replacen('{', "{\"later\":1,", 1);
        assert_eq!(Record::decode(text.as_bytes()).unwrap(), record);
        assert!(Record::decode(b"10.0.0.2:6081").is_err());
    }
}
