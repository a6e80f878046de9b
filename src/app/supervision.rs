//! Tells the service manager how things stand, and that the loops of this process go on.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use crate::fleet::{Health, Pool, Snapshot};
use crate::service_manager::{Heartbeats, ServiceManager};
use crate::telemetry::{IncidentKind, Incidents};

/// The longest time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// In one interval of the watchdog this many looks are made: a loop that one look finds busy has two more chances.
const LOOKS: u32 = 4;

/// What the service manager is told of.
pub(super) struct Supervised {
    pub(super) manager: ServiceManager,
    /// Turns true when the edge serves.
    pub(super) open: watch::Receiver<bool>,
    pub(super) fleet: Arc<ArcSwap<Snapshot>>,
    pub(super) incidents: Arc<Incidents>,
    /// Of all that must go on.
    pub(super) loops: Heartbeats,
}

/// Tells that the process is ready once it serves, how things stand from then on, and from the start that it is alive. Never
/// returns, but if the edge will not open. For the control plane, which is one of the things that it proves to be alive.
pub(super) async fn supervise(mut supervised: Supervised) {
    let mut status = "starting: waits for its nodes, and until Varnish has the purges that it missed".to_owned();
    supervised.manager.status(&status);
    let mut open = supervised.open.clone();
    let mut is_ready = false;
    let watchdog = supervised.manager.watchdog().map(|interval| interval / LOOKS);
    let mut looks = tokio::time::interval(watchdog.map_or(LOOK_EVERY, |every| every.clamp(MIN_LOOK, LOOK_EVERY)));
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut looked = Instant::now();
    let mut stands_still = false;
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            opened = async { open.wait_for(|open| *open).await.is_ok() }, if !is_ready => {
                if !opened {
                    return;
                }
                is_ready = true;
                status = supervised.describe();
                supervised.manager.ready(&status);
            }
        }
        if is_ready {
            let now = supervised.describe();
            if now != status {
                supervised.manager.status(&now);
                status = now;
            }
        }
        if watchdog.is_some_and(|every| looked.elapsed() >= every) {
            looked = Instant::now();
            stands_still = supervised.prove(stands_still);
        }
    }
}

/// The shortest time between two looks: loops make their turns ten times a second or less.
const MIN_LOOK: Duration = Duration::from_millis(200);

impl Supervised {
    /// One line: how many nodes there are to serve from, and what an operator has to know at once.
    fn describe(&self) -> String {
        let fleet = self.fleet.load();
        let up = |pool: &Pool| {
            let up = pool.members().iter().filter(|member| member.health == Health::Up).count();
            format!("{up} of {}", pool.members().len())
        };
        let refused = self.incidents.has(IncidentKind::ReloadRefused);
        let refused = if refused { "; the changed configuration is refused" } else { "" };
        format!("serves: {} Varnish and {} web nodes up{refused}", up(&fleet.varnish), up(&fleet.web))
    }

    /// Says that the process is alive if each of its loops has gone on since the last look. Returns whether one has not.
    fn prove(&mut self, stood_still: bool) -> bool {
        let stalled = self.loops.stalled();
        if stalled.is_empty() {
            self.manager.alive();
            return false;
        }
        if !stood_still {
            tracing::error!(
                stalled = stalled.join(" "),
                "a part stands still: the service manager is not told that all is alive"
            );
        }
        true
    }
}
