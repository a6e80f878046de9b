//! An awaited purge, from before its acceptance until its answer.
//!
//! Nodes report their results batch by batch, and any number of batches may follow before the answer to a purge is due. So
//! results are kept as long as a purge is awaited that they may concern. Their number has no limit that a storm could
//! exceed, because a purge whose refusal was dropped would be answered 200.

use std::net::IpAddr;
use std::time::Duration;

use super::requests::PurgeVerdict;
use super::{Acknowledged, Deliveries, Refusable};
use crate::fleet::Role;
use crate::journal::Position;

/// An awaited purge.
pub struct Expected<'d> {
    deliveries: &'d Deliveries,
    /// The head before its acceptance.
    after: Position,
    /// Its position, if a node may refuse it.
    request: Option<Position>,
}

impl<'d> Expected<'d> {
    pub(super) fn new(deliveries: &'d Deliveries) -> Self {
        let after = deliveries.context.journal.head();
        deliveries.requests.lock().expect(after);
        Expected { deliveries, after, request: None }
    }

    /// Records its acceptance; `what` is the part that a node may refuse.
    pub fn record_accepted(&mut self, position: Position, what: Refusable, sender: IpAddr) {
        self.request = Some(position);
        let floor = self.deliveries.context.journal.floor();
        self.deliveries.requests.lock().record_accepted(position, what, sender, floor);
    }

    /// Waits for at most `timeout` until every available Varnish has this purge, then raises the fence, so that the purge
    /// may be answered. A purge that a node refused, or that no node accepted, is not answered as done; that is durable
    /// unless the disk hangs. `taken_elsewhere`: a node has accepted it from another replica.
    pub async fn acknowledge(&self, position: Position, timeout: Duration, taken_elsewhere: bool) -> Acknowledged {
        self.deliveries.await_acknowledgements(position, timeout).await;
        let outcome = self.outcome(position, taken_elsewhere);
        if !outcome.refused.is_empty() || outcome.is_untaken {
            // The mark is valid in memory at once, so the sender does not wait for a disk that hangs.
            let marked = self.deliveries.mark_refused(self.request.into_iter().collect());
            if tokio::time::timeout(self.deliveries.context.pace.longest_wait, marked).await.is_err() {
                tracing::warn!(
                    position,
                    "the mark of a refused purge is not durable yet: its sender is answered all the same"
                );
            }
        }
        outcome
    }

    fn outcome(&self, position: Position, taken_elsewhere: bool) -> Acknowledged {
        let Deliveries { context, nodes, requests, .. } = self.deliveries;
        let mut outcome = Acknowledged::default();
        for member in context.fleet.load().varnish.members() {
            let id = member.node.id();
            if member.node.live.cursor() < position && self.deliveries.is_shown_by(&member.node.live, position) {
                outcome.pending.push(id.clone());
                continue;
            }
            if member.node.live.cursor() < position {
                if let Some(varnish) = &context.metrics.node(Role::Varnish, id).varnish {
                    varnish.fenced.inc();
                }
                outcome.fenced.push(id.clone());
                continue;
            }
            outcome.applied.push(id.clone());
            outcome.invalidated += nodes.get(id).map_or(0, |delivery| delivery.state.invalidated(position));
        }
        if let Some(position) = self.request {
            let is_taken = taken_elsewhere || !outcome.applied.is_empty() || outcome.fenced.is_empty();
            let verdict = requests.lock().answer(position, is_taken);
            match verdict {
                PurgeVerdict::Done => {}
                PurgeVerdict::Refused(refusals) => outcome.refused = refusals,
                PurgeVerdict::Untaken => {
                    outcome.is_untaken = true;
                    self.deliveries.refusals.send_replace(());
                }
            }
        }
        outcome
    }
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        self.deliveries.requests.lock().expect_no_more(self.after, self.request);
    }
}
