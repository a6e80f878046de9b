//! Whether answers are sealed, and who is told of a stale one.
//!
//! A seal is worth something only where its position means the same to whoever wrote it and whoever reads it. Clearcoats
//! with journals of their own have positions of their own, so beside other replicas answers are not sealed.

use std::sync::Arc;

use super::engine::Engine;
use crate::config::Config;
use crate::proxy::Freshness;
use crate::seal::PurgedNames;

/// What the two listeners need to seal answers, and to judge them.
#[derive(Default)]
pub(super) struct Sealing {
    /// For the origin.
    pub(super) purged: Option<Arc<PurgedNames>>,
    /// For the edge.
    pub(super) freshness: Option<Freshness>,
}

impl Sealing {
    /// As configured, and as the journal allows.
    pub(super) fn of(engine: &Engine, config: &Config) -> Self {
        let is_wanted = config.edge.seal && !engine.has_replicas();
        let Some(purged) = engine.journal.purged().filter(|_| is_wanted) else { return Sealing::default() };
        let (deliveries, patience) = (Arc::clone(&engine.deliveries), config.purge.ack_timeout);
        let refresh = Arc::new(move |node: &_, page| {
            let (deliveries, node) = (Arc::clone(&deliveries), Clone::clone(node));
            Box::pin(async move { deliveries.drop_caught(&node, page, patience).await }) as _
        });
        let freshness = Freshness::new(Arc::clone(purged), refresh, Arc::clone(&engine.metrics));
        Sealing { purged: Some(Arc::clone(purged)), freshness: Some(freshness) }
    }
}
