//! A [`NodeSpec`] in the file: with the settings of a Varnish in every node, next to its role.
//!
//! For a web node the settings are the defaults, and are ignored when read.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::fleet::{NodeId, NodeSource, NodeSpec, PurgeDialect, Role, SecretHeaders, SendProxy, VarnishSettings};

#[derive(Serialize, Deserialize)]
struct Flat {
    source: NodeSource,
    role: Role,
    id: NodeId,
    address: SocketAddr,
    weight: u32,
    delivery: PurgeDialect,
    header_limit: usize,
    send_proxy: SendProxy,
    epoch: Option<Arc<str>>,
    zone: Option<Arc<str>>,
    labels: BTreeMap<String, String>,
}

pub(in crate::registry) fn serialize<S: Serializer>(spec: &NodeSpec, serializer: S) -> Result<S::Ok, S::Error> {
    let role = spec.role();
    let NodeSpec { source, id, address, weight, zone, labels, varnish } = spec.clone();
    // Headers are secrets and come from the configuration, so they are not written.
    let VarnishSettings { delivery, header_limit, send_proxy, epoch, headers: _ } = varnish.unwrap_or_default();
    Flat { source, role, id, address, weight, delivery, header_limit, send_proxy, epoch, zone, labels }
        .serialize(serializer)
}

pub(in crate::registry) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<NodeSpec, D::Error> {
    let flat = Flat::deserialize(deserializer)?;
    let Flat { source, role, id, address, weight, delivery, header_limit, send_proxy, epoch, zone, labels } = flat;
    let headers = SecretHeaders::default();
    let settings = VarnishSettings { delivery, header_limit, send_proxy, epoch, headers };
    let varnish = (role == Role::Varnish).then_some(settings);
    Ok(NodeSpec { source, id, address, weight, zone, labels, varnish })
}
