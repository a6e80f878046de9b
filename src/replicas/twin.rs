//! Two processes with one name.
//!
//! The name of a replica is the host's unless somebody gives it one, so two containers made alike can have the same. The
//! others tell one of them of purges then, and the other one serves old pages: an error that an operator must see, at both
//! of them, with both addresses, and that is over when one of them is.
//!
//! A process that was restarted is no twin of what it was before, though its key may stand in etcd for a while: that key is
//! older than ours. So with etcd it is the order that tells. Whoever finds another one's key where its own has been has
//! lost the name; it says so to the one that has it, which could not know. Without etcd both find each other at an address
//! that answers with their own name.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use super::call::PeerClient;
use super::{Record, Replicas};
use crate::telemetry::causes;

/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// Another one's key that stands there for so many looks is not that of our former self which ours is about to replace.
const LOOKS: u32 = 4;

/// How long a twin is believed to be there that has said nothing: it speaks every second or two.
const SILENT: Duration = Duration::from_secs(6);

/// What is known of twins.
#[derive(Debug, Default)]
pub(super) struct Twins(Mutex<TwinState>);

#[derive(Debug, Default)]
struct TwinState {
    /// Our key has been seen with our own record.
    was_ours: bool,
    /// What stands there instead, and for how many looks.
    key: Option<(Record, u32)>,
    /// Who has spoken to us by our own name, and when.
    spoken: Option<(Twin, Instant)>,
    current: Option<Twin>,
}

/// Another process with our name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Twin {
    /// Where it is.
    pub(super) address: String,
    /// It is us whom the others tell of purges.
    pub(super) ours: bool,
}

impl Twins {
    /// What stands under our key: whether that is ours, and the record; `None` where nothing does.
    pub(super) fn set_key(&self, key: Option<(bool, Record)>) {
        let mut state = self.state();
        match key.filter(|(_, record)| !record.leaving) {
            Some((true, _)) => (state.was_ours, state.key) = (true, None),
            Some((false, record)) => state.key = Some((record, 0)),
            None => state.key = None,
        }
    }

    /// Another process has said that it has our name. `ours`: the others tell us, and not it.
    pub(super) fn record_contact(&self, record: &Record, ours: bool) {
        let twin = Twin { address: record.address.clone(), ours };
        self.state().spoken = (!record.leaving).then(|| (twin, Instant::now()));
    }

    /// The twin that there is.
    pub(super) fn current(&self) -> Option<Twin> {
        self.state().current.clone()
    }

    /// Finds out whether there is one. Gives what has changed, if anything has: who it was and who it is now.
    fn look(&self, now: Instant) -> Option<(Option<Twin>, Option<Twin>)> {
        let mut state = self.state();
        let was_ours = state.was_ours;
        let by_key = state.key.as_mut().and_then(|(record, looks)| {
            *looks = looks.saturating_add(1);
            (was_ours || *looks > LOOKS).then(|| Twin { address: record.address.clone(), ours: false })
        });
        let spoken = state.spoken.clone().filter(|(_, at)| now.saturating_duration_since(*at) < SILENT);
        let current = by_key.or(spoken.map(|(twin, _)| twin));
        (current != state.current).then(|| (std::mem::replace(&mut state.current, current.clone()), current))
    }

    /// Who has our key in etcd.
    fn holder(&self) -> Option<String> {
        let state = self.state();
        let current = state.current.as_ref()?;
        state.key.as_ref().filter(|_| !current.ours).map(|(record, _)| record.address.clone())
    }

    fn state(&self) -> MutexGuard<'_, TwinState> {
        self.0.lock()
    }
}

/// Says it when there is a twin, here and to the twin, until the process ends.
pub(super) async fn watch(replicas: Arc<Replicas>) {
    let mut looks = tokio::time::interval(LOOK);
    for look in 0_u32.. {
        looks.tick().await;
        if let Some((before, now)) = replicas.twins.look(Instant::now()) {
            match (before, now) {
                (_, Some(twin)) => tracing::error!(
                    address = twin.address,
                    own_address = replicas.own.address,
                    "{}",
                    replicas.same_name(&twin.address)
                ),
                (Some(twin), None) => tracing::info!(
                    id = %replicas.id, address = twin.address, "the name of this replica is its own again"
                ),
                (None, None) => {}
            }
            replicas.context.metrics.journal.same_id.set(replicas.twins.current().is_some().into());
        }
        if look % LOOKS == 0
            && let Some(address) = replicas.twins.holder()
        {
            let said = PeerClient::to(address.clone()).post(&replicas, &replicas.hello(Duration::ZERO)).await;
            if let Err(error) = said {
                tracing::debug!(address, error = %causes(&error), "the other one of our name does not hear of it");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::JournalKind;

    fn record(address: &str) -> Record {
        Record::new(address.to_owned(), JournalKind::Etcd)
    }

    fn looks(twins: &Twins, count: u32) -> Option<Twin> {
        (0..count).for_each(|_| _ = twins.look(Instant::now()));
        twins.current()
    }

    #[test]
    fn the_key_of_ones_former_self_is_no_twin_and_one_that_comes_later_is() {
        let twins = Twins::default();
        twins.set_key(Some((false, record("10.0.0.9:6081"))));
        assert_eq!(looks(&twins, LOOKS), None);
        twins.set_key(Some((true, record("10.0.0.2:6081"))));
        assert_eq!(looks(&twins, LOOKS * 2), None);
        twins.set_key(Some((false, record("10.0.0.7:6081"))));
        assert_eq!(looks(&twins, 1), Some(Twin { address: "10.0.0.7:6081".to_owned(), ours: false }));
        // It says goodbye, or its lease runs out.
        twins.set_key(Some((false, Record { leaving: true, ..record("10.0.0.7:6081") })));
        assert_eq!(looks(&twins, 1), None);
    }

    #[test]
    fn a_key_that_was_taken_before_we_saw_ours_is_a_twins_if_it_stays() {
        let twins = Twins::default();
        twins.set_key(Some((false, record("10.0.0.9:6081"))));
        assert!(looks(&twins, LOOKS + 1).is_some());
    }

    #[test]
    fn who_has_spoken_is_a_twin_until_it_falls_silent_and_is_told_of_once() {
        let twins = Twins::default();
        twins.record_contact(&record("10.0.0.7:6081"), true);
        let now = Instant::now();
        assert!(twins.look(now).is_some() && twins.look(now).is_none());
        twins.record_contact(&record("10.0.0.7:6081"), true);
        assert!(twins.look(now).is_none());
        let (before, after) = twins.look(now + SILENT + LOOK).unwrap();
        assert!(before.is_some() && after.is_none());
    }
}
