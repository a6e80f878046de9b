//! The traces of purges that another replica is told of.

use std::future::pending;

use tokio::sync::watch;

use super::super::message::PurgeTrace;
use crate::journal::{Position, Shared};
use crate::telemetry::traces::Tracer;

/// The most in one message: they have to fit into [`super::OVERHEAD`], with 130 bytes each.
const MOST: usize = 16;

/// Which traces one replica was told over one connection. After a failure it is told all that are remembered once more, of which
/// it takes those that it waits for.
pub(super) struct ToldTraces<'t> {
    /// `None`: there are no traces here.
    accepted: Option<(&'t Tracer, watch::Receiver<u64>)>,
    /// The serial of the next.
    next: u64,
}

impl<'t> ToldTraces<'t> {
    pub(super) fn of(tracer: Option<&'t Tracer>) -> Self {
        ToldTraces { accepted: tracer.map(|tracer| (tracer, tracer.watch_accepted())), next: 0 }
    }

    /// The next traces of purges up to this position, which the replica has been sent.
    pub(super) fn next(&mut self, journal: &dyn Shared, sent: Position) -> Vec<PurgeTrace> {
        let Some((tracer, noted)) = &mut self.accepted else { return Vec::new() };
        noted.mark_unchanged();
        let traced = tracer.accepted_from(self.next, MOST).into_iter().take_while(|traced| traced.position <= sent);
        let mut traces = Vec::new();
        for traced in traced {
            self.next = traced.serial + 1;
            // A purge that is not held any more was told long ago.
            if let Some(id) = journal.name_of(traced.position) {
                traces.push(PurgeTrace { id: id.to_string(), traceparent: traced.context.to_header() });
            }
        }
        traces
    }

    /// Returns when there may be more.
    pub(super) async fn noted(&mut self) {
        if let Some((_, noted)) = &mut self.accepted
            && noted.changed().await.is_ok()
        {
            return;
        }
        pending::<()>().await;
    }
}
