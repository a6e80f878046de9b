//! What a reload of the configuration changes in the data path: one value that is replaced as a whole, so that no request meets
//! half of a configuration.
//!
//! Workers share nothing that they would have to lock. So each keeps its own copy, and looks for a new value with each sweep.
//! A connection takes the new rules with its next request; its preamble (PROXY header, TLS handshake) was judged by those of its
//! beginning, and nothing of a connection is cut. Timeouts hold at once, and count anew then for whoever is awaited.

use std::rc::Rc;
use std::sync::Arc;

use super::Frontend;
use super::status_set::FailureStatuses;
use crate::config::{Limits, Timeouts};
use crate::fleet::Role;
use crate::telemetry::access::{AccessBuffer, AccessLog};

/// The rules of the traffic.
#[derive(Clone, Debug)]
pub struct TrafficRules {
    /// For clients.
    pub edge: Frontend,
    /// For Varnish.
    pub origin: Frontend,
    /// Limits per client.
    pub limits: Limits,
    /// How long the traffic waits.
    pub timeouts: Timeouts,
    /// The statuses with which nodes fail a request.
    pub failing: FailureStatuses,
    /// The access log, if there is one.
    pub access: Option<Arc<AccessLog>>,
}

impl TrafficRules {
    /// Those of the listener whose requests go to nodes of this role.
    pub(super) fn frontend(&self, role: Role) -> &Frontend {
        match role {
            Role::Varnish => &self.edge,
            Role::Web => &self.origin,
        }
    }
}

/// One worker's copy.
pub(super) struct WorkerRules {
    /// Dropped with this copy: whoever replaced it can tell that no worker goes by it any more.
    pub(super) copied_from: Arc<TrafficRules>,
    edge: Rc<Frontend>,
    origin: Rc<Frontend>,
    pub(super) limits: Rc<Limits>,
    pub(super) timeouts: Timeouts,
    pub(super) failing: FailureStatuses,
    pub(super) access: Option<Rc<AccessBuffer>>,
}

impl WorkerRules {
    /// A copy of these rules. The buffer of the access log is that of `before` if the log is the same.
    pub(super) fn copy(rules: &Arc<TrafficRules>, before: Option<&WorkerRules>) -> Self {
        let kept = before.and_then(|before| before.access.as_ref());
        let access = rules.access.as_ref().map(|log| match kept {
            Some(buffer) if buffer.is_of(log) => Rc::clone(buffer),
            _ => Rc::new(AccessBuffer::new(Arc::clone(log))),
        });
        WorkerRules {
            copied_from: Arc::clone(rules),
            edge: Rc::new(rules.edge.clone()),
            origin: Rc::new(rules.origin.clone()),
            limits: Rc::new(rules.limits.clone()),
            timeouts: rules.timeouts,
            failing: rules.failing,
            access,
        }
    }

    pub(super) fn frontend(&self, role: Role) -> &Rc<Frontend> {
        match role {
            Role::Varnish => &self.edge,
            Role::Web => &self.origin,
        }
    }
}
