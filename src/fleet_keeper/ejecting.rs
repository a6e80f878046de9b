//! What becomes of nodes that fail the requests of clients ([`Ejections`]).

use std::collections::BTreeMap;
use std::time::Instant;

use super::FleetKeeper;
use super::node_state::NodeState;
use crate::config::HealthChecks;
use crate::fleet::{
    Ejection, EjectionTerms, Ejections, Health, Live, NodeFault, NodeKey, Role, ServingNode, Suspicion,
};

/// The ejections of both roles.
#[derive(Debug, Default)]
pub(super) struct AllEjections {
    web: Ejections,
    varnish: Ejections,
}

impl AllEjections {
    pub(super) fn of(&self, role: Role) -> &Ejections {
        match role {
            Role::Web => &self.web,
            Role::Varnish => &self.varnish,
        }
    }

    pub(super) fn of_mut(&mut self, role: Role) -> &mut Ejections {
        match role {
            Role::Web => &mut self.web,
            Role::Varnish => &mut self.varnish,
        }
    }

    /// When the next one ends.
    pub(super) fn due(&self) -> Option<Instant> {
        self.web.due().into_iter().chain(self.varnish.due()).min()
    }
}

/// The nodes of a role that serve, ejected or not. `admits` says which Varnish may: one that the fence keeps out is nobody's
/// replacement.
fn serving<'n>(
    nodes: &'n BTreeMap<NodeKey, NodeState>,
    role: Role,
    admits: impl Fn(&Live) -> bool,
) -> Vec<ServingNode<'n>> {
    let serves = |state: &NodeState| {
        let is_well = state.health.health() == Health::Up && state.node.weight > 0;
        is_well && (role == Role::Web || admits(&state.node.live))
    };
    let of_role = nodes.iter().filter(|((of, _), state)| *of == role && serves(state));
    of_role.map(|((_, id), state)| ServingNode { id, failures: state.node.live.failures.failures() }).collect()
}

/// When nodes of this role are ejected.
fn terms(role: Role, checks: &HealthChecks) -> EjectionTerms {
    let HealthChecks { web, varnish } = checks;
    match role {
        Role::Web => EjectionTerms {
            after: web.eject_after,
            lasts: web.eject_for,
            longest: web.eject_for_max,
            most: web.max_ejected,
        },
        Role::Varnish => EjectionTerms {
            after: varnish.eject_after,
            lasts: varnish.eject_for,
            longest: varnish.eject_for_max,
            most: varnish.max_ejected,
        },
    }
}

impl FleetKeeper {
    /// Takes a node's failure of a request: it may be checked at once, looked up again, or ejected.
    pub(super) fn suspect(&mut self, suspicion: Suspicion, now: Instant) {
        let Suspicion { node: identity, endpoint_id, fault, streak } = suspicion;
        let Some(state) = self.nodes.get(&identity).filter(|state| state.node.endpoint_id == endpoint_id) else {
            return;
        };
        if fault.calls_for_check() {
            state.probe.check_now();
        }
        if fault.doubts_address() {
            self.context.doubted.send_replace(());
        }
        let Some(streak) = streak else { return };
        let (role, id) = &identity;
        let terms = terms(*role, &self.context.checks);
        // Nearly all end here.
        if terms.after == 0 || streak.failures < terms.after {
            return;
        }
        let serving = serving(&self.nodes, *role, |live| self.context.admits(live));
        let fault = fault.of_streak(streak.failures);
        let ejections = self.ejections.of_mut(*role);
        if !ejections.consider(id, (streak, fault), &serving, &terms, now) {
            return;
        }
        let out = ejections.of(id).cloned();
        self.context.metrics.node(*role, id).ejections.inc();
        self.changed = true;
        self.take([]);
        let Some(Ejection { fault: NodeFault { kind, text }, lasts, .. }) = out else { return };
        let is_used = self.context.fleet.load().pool(*role).get(id).is_some_and(|member| member.usable);
        let so = if is_used { "too few others are well, so it gets requests still" } else { "it gets no requests" };
        tracing::info!(%role, node = %id, fault = %kind, reason = &*text, ?lasts, "node is ejected: {so}");
    }

    /// Ends the ejections that are to end.
    pub(super) fn settle_ejections(&mut self, now: Instant) {
        for role in [Role::Web, Role::Varnish] {
            let ejections = self.ejections.of_mut(role);
            if ejections.is_empty() {
                continue;
            }
            let terms = terms(role, &self.context.checks);
            let back = ejections.settle(&serving(&self.nodes, role, |live| self.context.admits(live)), &terms, now);
            back.into_iter().for_each(|id| self.returns(&(role, id), "its time is over, or too few others are left"));
        }
    }

    /// Takes the verdict of a node's health checks, which may end its ejection.
    pub(super) fn health_changed(&mut self, identity: &NodeKey, health: Health, now: Instant) {
        let (role, id) = identity;
        if self.ejections.of_mut(*role).health_changed(id, health, now) {
            self.returns(identity, "its health check failed, and passes again");
        }
    }

    fn returns(&mut self, identity: &NodeKey, reason: &str) {
        let (role, id) = identity;
        tracing::info!(%role, node = %id, reason, "node is ejected no more");
        if let Some(state) = self.nodes.get(identity) {
            state.forget_failures();
        }
        self.changed = true;
    }

    /// When an ejection ends, or a lost node is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.lost_nodes.due().into_iter().chain(self.ejections.due()).min()
    }
}
