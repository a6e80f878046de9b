//! What operators say of nodes: drained or ready, and a weight.
//!
//! A node that is drained gets no new requests, finishes those that it has, and gets every purge and every health check, so
//! that it can serve again at any time. The last node of a role that gets traffic is drained only if the operator insists:
//! with nothing behind it, a drain is an outage.
//!
//! Two operators may drain the last two nodes at the same moment. Of those who ask one clearcoat, the second waits until the
//! first has his answer. Of those who ask two, each clearcoat looks once more when the others, or etcd, have its word: at
//! least one of them sees both by then, and takes its own back.

use std::net::SocketAddr;
use std::num::NonZeroU16;

use hyper::body::Bytes;
use serde::{Deserialize, Deserializer, Serialize};

use super::AdminContext;
use super::view::rfc3339;
use crate::clock;
use crate::fleet::{NodeId, NodeKey, OverrideChange, Role, node_key};
use crate::registry::overrides::OverrideError;
use crate::telemetry::causes;

/// The paths of nodes: `/api/v1/nodes/{role}/{id}`.
pub(super) const PREFIX: &str = "/api/v1/nodes/";

/// Why an order is not carried out: a status, and the reason for its sender.
type OrderRefusal = (u16, String);

/// The body of an order.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeOrder {
    state: Option<OrderedState>,
    /// `null` is the registered weight.
    #[serde(default, deserialize_with = "present")]
    weight: Option<Option<NonZeroU16>>,
    /// Also if nobody else of the role gets traffic.
    #[serde(default)]
    force: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum OrderedState {
    Drain,
    Ready,
}

/// The answer: what counts now.
#[derive(Debug, Serialize)]
pub(super) struct OrderCarriedOut {
    role: Role,
    id: NodeId,
    state: OrderedState,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "rfc3339")]
    drained_since: Option<u64>,
    /// The weight that operators gave it; `null`: the registered one.
    weight: Option<NonZeroU16>,
    /// Other clearcoats that do not know it yet, or may not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unconfirmed: Vec<NodeId>,
    /// What could not be made certain, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<String>,
}

/// A field that is there, even if it is `null`.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(field: D) -> Result<Option<T>, D::Error> {
    T::deserialize(field).map(Some)
}

impl NodeOrder {
    /// Reads a body.
    fn read(body: &[u8]) -> Result<Self, OrderRefusal> {
        let order: NodeOrder = serde_json::from_slice(body).map_err(|error| (400, error.to_string()))?;
        if order.state.is_none() && order.weight.is_none() {
            return Err((
                400,
                "wanted a state (\"drain\" or \"ready\"), a weight (1 to 65535, or null), or both".to_owned(),
            ));
        }
        Ok(order)
    }

    fn change(&self) -> OverrideChange {
        OverrideChange { drains: self.state.map(|state| state == OrderedState::Drain), weight: self.weight }
    }
}

/// The node that a path names.
fn named(path: &str) -> Result<NodeKey, OrderRefusal> {
    // The one character of an id that clients like to encode.
    node_key(&path.replace("%3A", ":").replace("%3a", ":")).map_err(|error| (404, format!("{path}: {error}")))
}

impl AdminContext {
    /// Carries out an order about the node at this path below [`PREFIX`].
    pub(super) async fn order(
        &self,
        path: &str,
        body: &Bytes,
        peer: SocketAddr,
    ) -> Result<OrderCarriedOut, OrderRefusal> {
        let node = named(path)?;
        let order = NodeOrder::read(body)?;
        let (role, id) = &node;
        if !self.is_known(&node) {
            return Err((404, format!("there is no {role} node {id}")));
        }
        if !*self.open.borrow() {
            // What the other replicas know counts, too, and it is not known yet.
            return Err((503, "starting: try again in a moment".to_owned()));
        }
        let needs_others = order.state == Some(OrderedState::Drain) && !order.force;
        let _one_at_a_time = if needs_others { Some(self.draining.lock().await) } else { None };
        if needs_others && !self.others_serve(&node) {
            return Err((
                409,
                format!(
                    "no other {role} node gets traffic: draining {id} would leave none. To do it all the same, say \
                     \"force\": true, or clearcoat node drain --force"
                ),
            ));
        }
        let changed = self.overrides.change(&node, order.change(), clock::now_ms()).await;
        let warning = changed.map_err(|error| (status_of(&error), causes(&error).to_string()))?;
        let says = self.overrides.known().overrides.of(&node);
        let state = if says.drained_at_ms.is_some() { OrderedState::Drain } else { OrderedState::Ready };
        let address = peer.ip().to_canonical();
        tracing::info!(%role, node = %id, ?state, weight = says.weight, %address, force = order.force, "an operator's word about a node");
        let unconfirmed = match &self.replicas {
            Some(replicas) => replicas.overrides_told().await,
            None => Vec::new(),
        };
        if needs_others && !self.others_serve(&node) {
            return Err(self.take_back(&node).await);
        }
        let (drained_since, weight) = (says.drained_at_ms, says.weight);
        Ok(OrderCarriedOut { role: *role, id: id.clone(), state, drained_since, weight, unconfirmed, warning })
    }

    /// Has a node that was drained serve again, as the last other one was drained meanwhile, or does not serve any more.
    async fn take_back(&self, node: &NodeKey) -> OrderRefusal {
        let (role, id) = node;
        let ready = OverrideChange { drains: Some(false), weight: None };
        let problem = match self.overrides.change(node, ready, clock::now_ms()).await {
            Ok(warning) => warning,
            Err(error) => Some(format!("it could not be taken back: {}", causes(&error))),
        };
        if let Some(replicas) = &self.replicas {
            replicas.overrides_told().await;
        }
        tracing::info!(%role, node = %id, problem, "an operator's drain is taken back: no other node gets traffic any more");
        let problem = problem.map_or_else(String::new, |problem| format!(" ({problem})"));
        let text = format!(
            "meanwhile no other {role} node gets traffic (it was drained at the same time, or is down): {id} is not drained{problem}"
        );
        (409, text)
    }

    /// Whether there is such a node, or an operator has said something of it.
    fn is_known(&self, node: &NodeKey) -> bool {
        let is_here = self.fleet.load().pool(node.0).get(&node.1).is_some();
        is_here
            || self.unresolved.list().iter().any(|(unresolved, _)| unresolved == node)
            || !self.overrides.known().overrides.of(node).is_spent()
    }

    /// Whether another node of the role gets traffic, and no operator has drained it by now.
    fn others_serve(&self, (role, id): &NodeKey) -> bool {
        let (fleet, known) = (self.fleet.load(), self.overrides.known());
        let is_drained = |id: &NodeId| known.overrides.of(&(*role, id.clone())).drained_at_ms.is_some();
        let mut others = fleet.pool(*role).members().iter().filter(|member| member.node.id() != id);
        others.any(|member| self.serves(member) && !is_drained(member.node.id()))
    }
}

fn status_of(error: &OverrideError) -> u16 {
    match error {
        OverrideError::TooMany(_) | OverrideError::Contended => 409,
        OverrideError::Etcd(_) | OverrideError::Encode(_) => 503,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_says_what_it_changes_and_leaves_the_rest() {
        let change = |text: &str| NodeOrder::read(text.as_bytes()).unwrap().change();
        let weight = NonZeroU16::new(3);
        for (text, drains, wanted) in [
            (r#"{"state":"drain"}"#, Some(true), None),
            (r#"{"state":"ready","weight":3}"#, Some(false), Some(weight)),
            (r#"{"weight":null,"force":true}"#, None, Some(None)),
        ] {
            assert_eq!(change(text), OverrideChange { drains, weight: wanted }, "{text}");
        }
        for bad in [
            "",
            "{}",
            r#"{"force":true}"#,
            r#"{"state":"maint"}"#,
            r#"{"weight":0}"#,
            r#"{"weight":65536}"#,
            r#"{"weight":"3"}"#,
            r#"{"state":"drain","wieght":3}"#,
        ] {
            assert_eq!(NodeOrder::read(bad.as_bytes()).unwrap_err().0, 400, "{bad}");
        }
    }

    #[test]
    fn a_path_names_a_node_also_if_its_colon_is_encoded() {
        let id = |path: &str| named(path).unwrap().1.to_string();
        assert_eq!(id("varnish/10.0.1.5%3A6081"), id("varnish/10.0.1.5:6081"));
        for bad in ["", "varnish", "varnish/", "cache/a", "varnish/a/b", "varnish/%2E"] {
            assert_eq!(named(bad).unwrap_err().0, 404, "{bad}");
        }
    }
}
