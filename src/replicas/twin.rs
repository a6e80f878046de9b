//! Detects two processes with one name.
//!
//! By default a replica has the name of its host, so two containers made alike can have the same name. The others then send
//! purges to only one of them, and the other one serves old pages. An operator must see that error at both of them, with
//! both addresses, until one of them ends.
//!
//! A restarted process is not its own twin, although its old key may stay in etcd for a while: that key is older than ours.
//! So with etcd the order decides. A process that finds another record in place of its own has lost the name, and sends a
//! message to the owner, which cannot know. Without etcd both find the other at an address that answers with their own name.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::call::PeerClient;
use super::{Record, Replicas};
use crate::telemetry::causes;

/// The interval of looking for twins.
const LOOK: Duration = Duration::from_millis(250);

/// The number of looks after which a foreign record is no longer taken for that of our former process, which ours will
/// replace.
const LOOKS: u32 = 4;

/// How long a silent twin is believed to exist: it sends a message every second or two.
const SILENT: Duration = Duration::from_secs(6);

/// The observations from which a twin is concluded.
#[derive(Debug, Default)]
pub(super) struct Twins(Mutex<TwinState>);

#[derive(Debug, Default)]
struct TwinState {
    /// Our key was seen with our own record.
    was_ours: bool,
    /// A foreign record under our key, and the number of looks since.
    key: Option<(Record, u32)>,
    /// The last message with our own name, and its time.
    spoken: Option<(Twin, Instant)>,
    current: Option<Twin>,
}

/// Another process with our name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Twin {
    pub(super) address: String,
    /// The others send purges to us, not to it.
    pub(super) ours: bool,
}

impl Twins {
    /// Updates the record under our key, with whether it is ours; `None` if there is no key.
    pub(super) fn set_key(&self, key: Option<(bool, Record)>) {
        let mut state = self.0.lock();
        match key.filter(|(_, record)| !record.leaving) {
            Some((true, _)) => (state.was_ours, state.key) = (true, None),
            Some((false, record)) => state.key = Some((record, 0)),
            None => state.key = None,
        }
    }

    /// Records a message with our name. `ours`: the others send purges to us.
    pub(super) fn record_contact(&self, record: &Record, ours: bool) {
        let twin = Twin { address: record.address.clone(), ours };
        self.0.lock().spoken = (!record.leaving).then(|| (twin, Instant::now()));
    }

    pub(super) fn current(&self) -> Option<Twin> {
        self.0.lock().current.clone()
    }

    /// Looks for a twin. Returns the old and the new one if that has changed.
    fn look(&self, now: Instant) -> Option<(Option<Twin>, Option<Twin>)> {
        let mut state = self.0.lock();
        let was_ours = state.was_ours;
        let by_key = state.key.as_mut().and_then(|(record, looks)| {
            *looks = looks.saturating_add(1);
            (was_ours || *looks > LOOKS).then(|| Twin { address: record.address.clone(), ours: false })
        });
        let spoken = state.spoken.clone().filter(|(_, at)| now.saturating_duration_since(*at) < SILENT);
        let current = by_key.or(spoken.map(|(twin, _)| twin));
        (current != state.current).then(|| (std::mem::replace(&mut state.current, current.clone()), current))
    }

    /// The address of the twin that has our key in etcd.
    fn holder(&self) -> Option<String> {
        let state = self.0.lock();
        let current = state.current.as_ref()?;
        state.key.as_ref().filter(|_| !current.ours).map(|(record, _)| record.address.clone())
    }
}

/// Logs twins, and notifies the one that has our key, until the process ends.
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
                tracing::debug!(address, error = %causes(&error), "the replica with our name could not be notified");
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
        // It announces its shutdown, or its lease expires.
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
