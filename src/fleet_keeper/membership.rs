//! Who is in the fleet: several sources, one of which is the configuration file.
//!
//! The file takes precedence over other sources of a node with the same name: it was written on purpose. The spec of
//! the other source is kept, and applies as soon as the file does not name the node any more; so a node that moves from
//! the file to a registry is never gone in between.
//!
//! The file is obeyed to the letter: a node that is taken out of it leaves. So does one that had no share of the traffic any
//! more when it was deleted, because draining a node first is deliberate. For all others see
//! [`crate::fleet::LostNodes`].

use std::sync::Arc;
use std::time::Instant;

use super::FleetKeeper;
use super::node_state::NodeState;
use crate::fleet::{Health, HealthState, Live, LossDecision, Node, NodeKey, NodeSource, NodeSpec, Role};
use crate::probe::Probe;

impl FleetKeeper {
    pub(super) fn join(&mut self, mut spec: NodeSpec) {
        if let Some(varnish) = &mut spec.varnish {
            varnish.headers = varnish.headers.over(&self.context.headers);
        }
        let identity = (spec.role(), spec.id.clone());
        if let Some(state) = self.nodes.get(&identity) {
            let known = &state.node.spec;
            if counts_before(known.source, spec.source) {
                let (source, before) = (spec.source, known.source);
                if self.shadowed.insert(identity, spec).is_none() {
                    tracing::warn!(role = %known.role(), node = %known.id, ?source, ?before, "a node of this name is known already");
                }
                return;
            }
            if counts_before(spec.source, known.source) && !self.lost_nodes.is_absent(&identity) {
                self.shadowed.insert(identity.clone(), known.clone());
            }
        }
        self.changed = self.lost_nodes.returned(spec.source, &identity) || self.changed;
        self.put(identity, spec);
        self.count_held();
    }

    fn put(&mut self, identity: NodeKey, spec: NodeSpec) {
        let says = self.overrides.overrides.of(&identity);
        match self.nodes.get_mut(&identity) {
            Some(state) if state.node.spec == spec => return,
            Some(state) if state.node.spec.is_reached_as(&spec) => state.revise(spec, says),
            _ => {
                tracing::info!(role = %spec.role(), node = %spec.id, address = %spec.address, "node joined");
                self.stop(&identity);
                self.next_key += 1;
                let node = Arc::new(Node::new(spec, Arc::new(Live::default()), self.next_key).overridden(says));
                if says.drained_at_ms.is_some() {
                    tracing::info!(role = %node.spec.role(), node = %node.id(), by = "an operator", "node is drained: it gets no new requests");
                }
                let probe = Probe::new(&node.spec, &self.context.checks);
                let health = HealthState::default();
                let checks = probe.clone().run(node.endpoint_id, health.clone(), self.context.events.clone());
                let probe_task = self.probes.spawn(checks);
                if let Some(varnish) = &node.spec.varnish {
                    self.context.deliveries.start(&node, varnish);
                    self.context.trials.iter().for_each(|trials| trials.start(&node, varnish));
                }
                let state = NodeState { node, health, fault: None, was_checked: false, probe, probe_task };
                self.nodes.insert(identity, state);
            }
        }
        self.changed = true;
    }

    /// A source does not name a node any more; `deleted`: it was deleted explicitly.
    pub(super) fn lose(&mut self, source: NodeSource, identity: NodeKey, deleted: bool, now: Instant) {
        if self.shadowed.get(&identity).is_some_and(|shadowed| shadowed.source == source) {
            self.shadowed.remove(&identity);
            return;
        }
        let Some(state) = self.nodes.get(&identity).filter(|state| state.node.spec.source == source) else { return };
        if self.lost_nodes.is_absent(&identity) {
            // It was kept in doubt, and there is none any more.
            if deleted {
                self.leave(&identity);
            }
            return;
        }
        if source == NodeSource::Static {
            match self.shadowed.remove(&identity) {
                Some(spec) => self.put(identity, spec),
                None => self.leave(&identity),
            }
            return;
        }
        let was_drained = deleted && state.node.weight == 0;
        let nodes = &self.nodes;
        let there = || {
            let of_these =
                |state: &&NodeState| (state.node.spec.role(), state.node.spec.source) == (identity.0, source);
            nodes.values().filter(of_these).count()
        };
        if was_drained || self.lost_nodes.lost(source, identity.clone(), deleted, now, there) {
            self.leave(&identity);
            return;
        }
        // The snapshot shows that it is kept.
        self.changed = true;
    }

    /// Carries out the due decisions about lost nodes.
    pub(super) fn decide(&mut self, now: Instant) {
        if self.lost_nodes.due().is_none_or(|due| now < due) {
            return;
        }
        let nodes = &self.nodes;
        let is_down =
            |identity: &NodeKey| nodes.get(identity).is_some_and(|state| state.health.health() == Health::Down);
        for decision in self.lost_nodes.decide(now, is_down) {
            match decision {
                LossDecision::Leaves(role, id) => self.leave(&(role, id)),
                LossDecision::Mass { source, role, lost, there } => tracing::error!(
                    ?source,
                    %role,
                    lost,
                    there,
                    "the registry has lost most nodes of a role at once: they are kept, is it well?"
                ),
            }
        }
        self.count_held();
    }

    pub(super) fn leave(&mut self, identity: &NodeKey) {
        let was_absent = self.lost_nodes.forget(identity);
        if self.stop(identity) {
            let (role, id) = identity;
            tracing::info!(%role, node = %id, "node left");
            self.left.push(identity.clone());
            self.changed = true;
        }
        if was_absent {
            self.count_held();
        }
    }

    /// Stops the tasks of a node and removes it; returns whether it existed.
    fn stop(&mut self, identity: &NodeKey) -> bool {
        let Some(state) = self.nodes.remove(identity) else { return false };
        state.probe_task.abort();
        self.ejections.of_mut(identity.0).forget(&identity.1);
        if identity.0 == Role::Varnish {
            self.context.deliveries.stop(&identity.1);
            self.context.trials.iter().for_each(|trials| trials.stop(&identity.1));
        }
        true
    }

    fn count_held(&self) {
        for role in [Role::Web, Role::Varnish] {
            self.context.metrics.registry.held(role, self.lost_nodes.held(role));
        }
    }
}

/// Whether what one source says of a node counts, and not what the other one says.
fn counts_before(one: NodeSource, other: NodeSource) -> bool {
    one == NodeSource::Static && other != NodeSource::Static
}
