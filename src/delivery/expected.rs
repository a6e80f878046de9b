//! A purge that is waited for, from before it is accepted until it is answered.
//!
//! What nodes make of a purge they report batch by batch, and any number of batches may follow before its answer is due. So
//! what they report is kept for as long as a purge is waited for that it may concern, and no count bounds it that a storm
//! could exceed: a refusal that was dropped would be answered 200.

use std::net::IpAddr;
use std::time::Duration;

use super::requests::PurgeVerdict;
use super::{Acknowledged, Deliveries, Refusable};
use crate::journal::Position;

/// A purge that is waited for.
pub struct Expected<'d> {
    deliveries: &'d Deliveries,
    /// It is accepted after this position.
    after: Position,
    /// Where it is, if a node may refuse it for itself.
    request: Option<Position>,
}

impl<'d> Expected<'d> {
    pub(super) fn new(deliveries: &'d Deliveries) -> Self {
        let after = deliveries.context.journal.head();
        deliveries.requests.lock().expect(after);
        Expected { deliveries, after, request: None }
    }

    /// It was accepted, and a node may refuse this of it for itself.
    pub fn record_accepted(&mut self, position: Position, what: Refusable, sender: IpAddr) {
        self.request = Some(position);
        let floor = self.deliveries.context.journal.floor();
        self.deliveries.requests.lock().record_accepted(position, what, sender, floor);
    }

    /// Waits until every Varnish that could be waited for has this purge, at most for `timeout`, then raises the
    /// fence. When this returns, the purge may be answered; if a node refused it, or none took it, not as done, and that is
    /// durable if the disk does not hang. `taken_elsewhere`: another replica says that a node has taken it.
    pub async fn acknowledge(&self, position: Position, timeout: Duration, taken_elsewhere: bool) -> Acknowledged {
        self.deliveries.await_acknowledgements(position, timeout).await;
        let outcome = self.outcome(position, taken_elsewhere);
        if !outcome.refused.is_empty() || outcome.is_untaken {
            // It holds in memory at once. A disk that hangs does not keep the sender waiting for a mark.
            let marked = self.deliveries.mark_refused(self.request.into_iter().collect());
            if tokio::time::timeout(self.deliveries.context.pace.longest_wait, marked).await.is_err() {
                tracing::warn!(
                    position,
                    "that a purge was refused is not durable yet: its sender is told all the same"
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
            if member.node.live.cursor() < position {
                self.deliveries.count_fenced(id);
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
