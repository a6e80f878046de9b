//! Starts what pushes VCL to Varnish nodes.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::engine::Engine;
use crate::config::Config;
use crate::registry::RegistryStatus;
use crate::replicas::Replicas;
use crate::vcl_push::{PushSettings, PushTurn, VclPush, VclPushContext};

/// Starts it. `listed` turns true when the nodes of the start are known. Returns what shows how it stands, and what it is to go by.
pub(super) fn start_pushing(
    config: &Config,
    engine: &Engine,
    listed: &watch::Receiver<bool>,
    (replicas, registry): (Option<&Arc<Replicas>>, Option<&RegistryStatus>),
    tasks: &mut JoinSet<()>,
) -> (Arc<VclPush>, watch::Sender<Arc<PushSettings>>) {
    let push = Arc::<VclPush>::default();
    let (settings, followed) = watch::channel(Arc::new(PushSettings::of(config)));
    let (replicas, registry) = (replicas.cloned(), registry.cloned());
    let context = VclPushContext {
        fleet: Arc::clone(&engine.fleet),
        listed: listed.clone(),
        settings: followed,
        turn: Box::new(move || PushTurn {
            rank: replicas.as_ref().map_or(0, |replicas| replicas.rank()),
            is_informed: registry.as_ref().is_none_or(RegistryStatus::is_connected),
        }),
        metrics: Arc::clone(&engine.metrics),
    };
    tasks.spawn(Arc::clone(&push).run(context));
    (push, settings)
}
