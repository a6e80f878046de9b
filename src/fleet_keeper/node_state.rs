//! The keeper's state of one node.

use std::sync::Arc;

use tokio::task::AbortHandle;

use crate::config::HealthChecks;
use crate::fleet::{
    Ejection, Health, HealthState, Member, Node, NodeFault, NodeOverride, NodeSpec, Role, Thresholds, Verdict,
};
use crate::probe::Probe;

pub(super) struct NodeState {
    pub(super) node: Arc<Node>,
    pub(super) health: HealthState,
    /// Why it is down; `None` if it is not.
    pub(super) fault: Option<NodeFault>,
    /// A check has come to a result, or could not be carried out here.
    pub(super) was_checked: bool,
    pub(super) probe: Probe,
    pub(super) probe_task: AbortHandle,
}

impl NodeState {
    /// Counts a check result; returns whether the snapshot has to change.
    pub(super) fn judge(&mut self, verdict: Verdict, checks: &HealthChecks) -> bool {
        let spec = &self.node.spec;
        let Some(passed) = verdict.passed() else { return false };
        let fault = match verdict {
            Verdict::Failed(fault) => Some(fault),
            Verdict::Passed | Verdict::NotAsked(_) => None,
        };
        let thresholds = match spec.role() {
            Role::Web => Thresholds { rise: checks.web.rise, fall: checks.web.fall },
            Role::Varnish => Thresholds { rise: checks.varnish.rise, fall: checks.varnish.fall },
        };
        let transition = self.health.record(passed, thresholds);
        self.node.live.set_down(self.health.health() == Health::Down);
        if transition == Some(Health::Up) {
            self.forget_failures();
        }
        match (transition, &fault) {
            (Some(Health::Down), Some(NodeFault { kind, text })) => {
                tracing::warn!(role = %spec.role(), node = %spec.id, fault = %kind, reason = &**text, "node is down");
            }
            (Some(health), _) => tracing::info!(role = %spec.role(), node = %spec.id, ?health, "node is up"),
            (None, _) => {}
        }
        let is_down = self.health.health() == Health::Down;
        let still_down_for_another = is_down && fault.is_some() && self.fault != fault;
        if transition.is_some() || still_down_for_another {
            self.fault = fault.filter(|_| is_down);
            return true;
        }
        false
    }

    /// What requests met before it comes into traffic says nothing of what comes.
    pub(super) fn forget_failures(&self) {
        self.node.live.failures.record_success();
    }

    /// Takes another spec, or another word of an operator. The node is reached as before.
    pub(super) fn revise(&mut self, spec: NodeSpec, operator: NodeOverride) {
        let (live, endpoint_id) = (Arc::clone(&self.node.live), self.node.endpoint_id);
        let node = Node::new(spec, live, endpoint_id).overridden(operator);
        let (role, id) = (node.spec.role(), node.id());
        match (self.node.weight, node.weight) {
            (1.., 0) => {
                let by = if operator.drained_at_ms.is_some() { "an operator" } else { "its source" };
                tracing::info!(%role, node = %id, by, "node is drained: it gets no new requests");
            }
            (0, 1..) => {
                tracing::info!(%role, node = %id, "node is not drained any more");
                self.forget_failures();
            }
            (before, now) if before != now => tracing::info!(%role, node = %id, before, now, "node has another weight"),
            _ => {}
        }
        self.node = Arc::new(node);
    }

    pub(super) fn member(&self, retained: bool, ejection: Option<Ejection>) -> Member {
        Member {
            node: Arc::clone(&self.node),
            health: self.health.health(),
            fault: self.fault.clone(),
            ejection,
            retained,
            usable: false,
        }
    }
}
