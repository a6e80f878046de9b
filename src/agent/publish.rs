//! Keeps the node's key as the node is, from its first pass to the end of the agent.

use std::time::Duration;

use tokio::sync::watch;

use super::observe::Sight;
use super::record::{OwnRecord, WriterMark};
use super::{AgentSettings, EndStage};
use crate::etcd::{Registration, RegistrationStatus, SharedEtcd};
use crate::fleet::ServingState;
use crate::telemetry::causes;

/// How long deleting the key may delay the end of the agent, for which a container runtime waits.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// Registers the node once it has been seen, and ends when the agent leaves, with the key taken away.
pub(super) async fn publish(
    settings: &AgentSettings,
    etcd: SharedEtcd,
    mut sights: watch::Receiver<Option<Sight>>,
    mut stages: watch::Receiver<EndStage>,
) {
    let writer = WriterMark::new();
    let value = |sight: &Sight, stage| value(settings, &writer, sight, stage);
    let first = tokio::select! {
        first = sights.wait_for(Option::is_some) => first.ok().and_then(|sight| value(sight.as_ref()?, EndStage::Serving)),
        // A node that is about to go is not introduced any more.
        _ = stages.wait_for(|stage| *stage != EndStage::Serving) => None,
    };
    let Some(first) = first else { return };
    let key = etcd.key(&format!("nodes/{}/{}", settings.role, settings.id));
    let (record, records) = watch::channel(Some(first));
    let (status, _) = watch::channel(RegistrationStatus::default());
    let registration = tokio::spawn(Registration::new(etcd, key, settings.ttl).run(records, status));
    while changed(&mut sights, &mut stages).await {
        let stage = *stages.borrow_and_update();
        let sight = sights.borrow_and_update().clone();
        let now = sight.filter(|_| stage != EndStage::Leaving).and_then(|sight| value(&sight, stage));
        if now.is_none() {
            break;
        }
        record.send_if_modified(|before| {
            let changes = *before != now;
            *before = now;
            changes
        });
    }
    record.send_replace(None);
    if tokio::time::timeout(LAST_WORDS, registration).await.is_err() {
        tracing::warn!("etcd does not take the key away in time; the key goes with its lease");
    }
}

/// Waits for something else to write; `false` if all senders are gone.
async fn changed(sights: &mut watch::Receiver<Option<Sight>>, stages: &mut watch::Receiver<EndStage>) -> bool {
    tokio::select! {
        changed = sights.changed() => changed.is_ok(),
        changed = stages.changed() => changed.is_ok(),
    }
}

fn value(settings: &AgentSettings, writer: &WriterMark, sight: &Sight, stage: EndStage) -> Option<Vec<u8>> {
    let state = if sight.up && stage == EndStage::Serving { ServingState::Up } else { ServingState::Drain };
    let Sight { address, epoch, .. } = sight;
    let record = OwnRecord { address, state, epoch: epoch.as_deref(), facts: &settings.facts, writer };
    let value = record.to_json();
    value.inspect_err(|error| tracing::error!(error = %causes(error), "the record of this node cannot be written")).ok()
}
