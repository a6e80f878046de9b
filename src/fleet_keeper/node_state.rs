//! The keeper's state of one node.

use std::sync::Arc;

use tokio::task::AbortHandle;

use crate::config::HealthChecks;
use crate::fleet::{Health, HealthState, Member, Node, Role, Thresholds, Verdict};
use crate::probe::Probe;

pub(super) struct NodeState {
    pub(super) node: Arc<Node>,
    pub(super) health: HealthState,
    pub(super) reason: Arc<str>,
    pub(super) probe: Probe,
    pub(super) probe_task: AbortHandle,
}

impl NodeState {
    /// Counts a check result; returns whether the snapshot has to change.
    pub(super) fn judge(&mut self, verdict: Verdict, checks: &HealthChecks) -> bool {
        let spec = &self.node.spec;
        let (passed, reason) = match verdict {
            Verdict::Passed => (true, String::new()),
            Verdict::Failed(reason) => (false, reason),
            Verdict::NotAsked(_) => return false,
        };
        let thresholds = match spec.role() {
            Role::Web => Thresholds { rise: checks.web.rise, fall: checks.web.fall },
            Role::Varnish => Thresholds { rise: checks.varnish.rise, fall: checks.varnish.fall },
        };
        let transition = self.health.record(passed, thresholds);
        self.node.live.set_down(self.health.health() == Health::Down);
        match transition {
            Some(Health::Down) => tracing::warn!(role = %spec.role(), node = %spec.id, reason, "node is down"),
            Some(health) => tracing::info!(role = %spec.role(), node = %spec.id, ?health, "node is up"),
            None => {}
        }
        let reason = if self.health.health() == Health::Down { reason.as_str() } else { "" };
        let still_down_for_another = !passed && *self.reason != *reason;
        if transition.is_some() || still_down_for_another {
            self.reason = reason.into();
            return true;
        }
        false
    }

    pub(super) fn member(&self, retained: bool) -> Member {
        Member {
            node: Arc::clone(&self.node),
            health: self.health.health(),
            reason: Arc::clone(&self.reason),
            retained,
            usable: false,
        }
    }
}
