//! How far each purge is: who has it, since when, and with how many others it was sent.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::AdminContext;
use super::view::rfc3339;
use crate::attribution::{PurgeRecord, PurgeReport};
use crate::delivery::CursorStep;
use crate::fleet::NodeId;
use crate::journal::Position;
use crate::replicas::{ReplicaReport, SilentReplica};

/// The purges that an event tells of: as many as a person reads.
const TOLD: usize = 40;

/// The nodes without a purge that are named; of the others there is the number.
const NAMED: usize = 3;

/// `/api/v1/purges/all`: what was sent to each clearcoat.
#[derive(Serialize)]
pub(super) struct FleetPurgesView {
    /// This clearcoat first.
    replicas: Vec<ReplicaPurges>,
    /// Those that have not said.
    missing: Vec<SilentReplica>,
}

#[derive(Serialize)]
struct ReplicaPurges {
    /// Absent of a clearcoat that has no others.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<NodeId>,
    #[serde(rename = "self", skip_serializing_if = "std::ops::Not::not")]
    is_self: bool,
    purges: ReportOf,
}

/// The report of this clearcoat, or of another one as it came.
#[derive(Serialize)]
#[serde(untagged)]
enum ReportOf {
    Here(PurgeReport),
    There(serde_json::Value),
}

/// A purge, and how far it is.
#[derive(Serialize)]
pub(super) struct PurgeProgress {
    #[serde(flatten)]
    record: Arc<PurgeRecord>,
    /// The Varnish nodes that have it now, and all of them.
    has: usize,
    of: usize,
    /// The first of those that do not have it.
    missing: Vec<NodeId>,
    /// From its arrival until the last node had it; absent while one lacks it, or if it is not remembered.
    all_after_ms: Option<u64>,
    /// The most bans that one node took for it, and the purges that were sent as these bans.
    bans: Option<u64>,
    together: Option<u64>,
}

/// `/api/v1/purges/<position>`.
#[derive(Serialize)]
pub(super) struct PurgeDetail {
    #[serde(flatten)]
    record: Arc<PurgeRecord>,
    nodes: Vec<AppliedAt>,
}

/// What became of a purge at one node.
#[derive(Serialize)]
struct AppliedAt {
    id: NodeId,
    /// It has the purge.
    applied: bool,
    /// When it acknowledged it (RFC 3339); absent if it has not, or if that is not remembered.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "rfc3339")]
    at: Option<u64>,
    /// The time from the arrival of the purge until then.
    #[serde(skip_serializing_if = "Option::is_none")]
    after_ms: Option<u64>,
    /// The bans that it took for this step, and the purges in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    bans: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    together: Option<u64>,
}

/// A Varnish: how far it is, and how it came there.
struct NodeProgress {
    id: NodeId,
    cursor: Position,
    steps: Vec<CursorStep>,
}

impl NodeProgress {
    /// The step that brought this purge.
    fn step(&self, position: Position) -> Option<&CursorStep> {
        let at = self.steps.partition_point(|step| step.last < position);
        self.steps.get(at).filter(|step| step.after < position && self.cursor >= position)
    }
}

impl AdminContext {
    /// The purges that were sent to this clearcoat.
    pub(super) fn purges(&self) -> PurgeReport {
        self.attribution.report()
    }

    /// The purges of all clearcoats.
    pub(super) async fn purges_of_all(&self) -> FleetPurgesView {
        let (others, missing) = match &self.replicas {
            Some(replicas) => replicas.ask_purges().await,
            None => (Vec::new(), Vec::new()),
        };
        let id = self.replicas.as_ref().map(|replicas| replicas.id().clone());
        let own = ReplicaPurges { id, is_self: true, purges: ReportOf::Here(self.purges()) };
        let others = others.into_iter().map(|ReplicaReport { id, report }| ReplicaPurges {
            id: Some(id),
            is_self: false,
            purges: ReportOf::There(report),
        });
        FleetPurgesView { replicas: std::iter::once(own).chain(others).collect(), missing }
    }

    /// The newest purges, the newest first.
    pub(super) fn timeline(&self) -> Vec<PurgeProgress> {
        let nodes = self.progress();
        let newest = self.attribution.report().newest.into_iter().take(TOLD);
        newest.map(|record| PurgeProgress::of(record, &nodes)).collect()
    }

    /// One of the newest purges; `None` if it is not remembered.
    pub(super) fn purge(&self, position: Position) -> Option<PurgeDetail> {
        let record = self.attribution.report().newest.into_iter().find(|record| record.position == position)?;
        let nodes = self.progress().into_iter().map(|node| {
            let step = node.step(position);
            AppliedAt {
                applied: node.cursor >= position,
                at: step.map(|step| step.at_ms),
                after_ms: step.map(|step| step.at_ms.saturating_sub(record.at_ms)),
                bans: step.map(|step| step.bans),
                together: step.map(|step| step.last - step.after),
                id: node.id,
            }
        });
        Some(PurgeDetail { nodes: nodes.collect(), record })
    }

    fn progress(&self) -> Vec<NodeProgress> {
        let fleet = self.fleet.load();
        let nodes = fleet.varnish.members().iter().map(|member| &member.node);
        let progress = nodes.map(|node| NodeProgress {
            id: node.id().clone(),
            cursor: node.live.cursor(),
            steps: self.deliveries.steps(node.id()),
        });
        progress.collect()
    }
}

impl PurgeProgress {
    fn of(record: Arc<PurgeRecord>, nodes: &[NodeProgress]) -> Self {
        let position = record.position;
        let (has, lacks): (Vec<_>, Vec<_>) = nodes.iter().partition(|node| node.cursor >= position);
        let steps: BTreeMap<&NodeId, &CursorStep> =
            has.iter().filter_map(|node| Some((&node.id, node.step(position)?))).collect();
        let is_known = !has.is_empty() && lacks.is_empty() && steps.len() == has.len();
        let last = steps.values().map(|step| step.at_ms).max().filter(|_| is_known);
        PurgeProgress {
            has: has.len(),
            of: nodes.len(),
            missing: lacks.iter().take(NAMED).map(|node| node.id.clone()).collect(),
            all_after_ms: last.map(|at_ms| at_ms.saturating_sub(record.at_ms)),
            bans: steps.values().map(|step| step.bans).max(),
            together: steps.values().map(|step| step.last - step.after).max(),
            record,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::attribution::{Attribution, Ended, NamedTargets};
    use crate::purge::Purge;

    fn record(position: Position) -> Arc<PurgeRecord> {
        let attribution = Attribution::default();
        let (took, result, fenced) = (Duration::from_millis(7), "applied", Vec::new());
        let ended = Ended { position, at_ms: 1000, took, result, applied: 1, fenced, invalidated: 0 };
        attribution.note([10, 0, 0, 5].into(), NamedTargets::of(&Purge::everything()), ended);
        attribution.report().newest.remove(0)
    }

    fn node(id: &str, steps: &[(Position, Position, u64)]) -> NodeProgress {
        let step = |&(after, last, at_ms)| CursorStep { after, last, at_ms, bans: 2 };
        let cursor = steps.last().map_or(0, |step| step.1);
        NodeProgress { id: NodeId::try_from(id).unwrap(), cursor, steps: steps.iter().map(step).collect() }
    }

    #[test]
    fn a_purge_that_all_have_says_when_the_last_one_got_it() {
        let nodes = [node("a", &[(0, 4, 900), (4, 9, 1100)]), node("b", &[(0, 7, 1030), (7, 9, 1400)])];
        let progress = PurgeProgress::of(record(8), &nodes);
        assert_eq!((progress.has, progress.of, progress.all_after_ms), (2, 2, Some(400)));
        assert_eq!((progress.bans, progress.together, progress.missing.len()), (Some(2), Some(5), 0));
    }

    #[test]
    fn who_lacks_a_purge_is_named() {
        let progress = PurgeProgress::of(record(8), &[node("a", &[(0, 9, 1100)]), node("b", &[(0, 7, 1030)])]);
        assert_eq!((progress.has, progress.all_after_ms), (1, None));
        assert_eq!(progress.missing, [NodeId::try_from("b").unwrap()]);
    }

    #[test]
    fn of_a_step_that_is_forgotten_no_time_is_claimed() {
        let progress = PurgeProgress::of(record(3), &[node("a", &[(4, 9, 1100)])]);
        assert_eq!((progress.has, progress.all_after_ms, progress.bans), (1, None, None));
    }
}
