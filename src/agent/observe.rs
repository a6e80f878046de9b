//! Looks at the node, for as long as the agent runs.

use tokio::sync::watch;

use super::AgentSettings;
use super::address::is_local;
use super::check::Tally;
use super::epoch::CacheLife;
use crate::telemetry::causes;

/// How much sooner the next check comes while the node has not been up yet: it is about to start.
const STARTING: u32 = 10;

/// An observation of a node that has been up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sight {
    pub(super) address: String,
    pub(super) up: bool,
    pub(super) epoch: Option<String>,
}

/// Publishes observations when they change, from the first time on that the node is up.
pub(super) async fn observe(settings: &AgentSettings, child: Option<u32>, sights: &watch::Sender<Option<Sight>>) {
    let mut observer = Observer { settings, child, address: None, epoch: None, why_not: String::new() };
    let mut tally = Tally::new(&settings.check);
    let mut up = false;
    loop {
        let problem = observer.look().await.err();
        let was_up = up;
        up = tally.count(problem.is_none());
        match problem {
            None if up && !was_up => tracing::info!("the node passes its check"),
            Some(reason) if was_up && !up => tracing::warn!(reason, "the node fails its check, and drains"),
            Some(reason) if !tally.has_been_up() => observer.tell_why_not(reason),
            Some(reason) => tracing::debug!(reason, "a check has failed"),
            None => {}
        }
        if let Some(address) = observer.address.clone().filter(|_| tally.has_been_up()) {
            let sight = Some(Sight { address, up, epoch: observer.epoch.clone() });
            sights.send_if_modified(|before| {
                let changes = *before != sight;
                *before = sight;
                changes
            });
        }
        let interval = settings.check.interval;
        tokio::time::sleep(if tally.has_been_up() { interval } else { interval / STARTING }).await;
    }
}

struct Observer<'a> {
    settings: &'a AgentSettings,
    child: Option<u32>,
    /// The address that was found last.
    address: Option<String>,
    /// The last life of the cache that was seen.
    epoch: Option<String>,
    /// The reason logged last.
    why_not: String,
}

impl Observer<'_> {
    /// Checks once. The reason is for people.
    async fn look(&mut self) -> Result<(), String> {
        let address = self.address().await?;
        match self.settings.epoch.look(self.child) {
            CacheLife::Unnamed => self.epoch = None,
            CacheLife::Absent(reason) => return Err(reason.to_owned()),
            CacheLife::Named(name) => {
                if self.epoch.as_ref().is_some_and(|before| *before != name) {
                    tracing::warn!(epoch = name, "the cache began another life, and is empty");
                }
                self.epoch = Some(name);
            }
        }
        self.settings.check.ask(&address).await.map_err(|failed| causes(&failed).to_string())
    }

    async fn address(&mut self) -> Result<String, String> {
        if let Some(address) = self.address.as_ref().filter(|address| self.settings.address.still_is(address)) {
            return Ok(address.clone());
        }
        let found = tokio::time::timeout(self.settings.check.timeout, self.settings.address.find()).await;
        let address = match found {
            Ok(Ok(address)) => address,
            Ok(Err(unknown)) => return Err(causes(&unknown).to_string()),
            Err(_) => return Err("the name of etcd is not resolved in time".to_owned()),
        };
        if self.address.as_ref() != Some(&address) {
            if is_local(&address) {
                tracing::warn!(address, "only this host can reach the address of this node");
            } else if let Some(before) = &self.address {
                tracing::warn!(before, address, "this host has another address");
            }
            self.address = Some(address.clone());
        }
        Ok(address)
    }

    /// Logs why the node is not registered yet, once for each reason.
    fn tell_why_not(&mut self, reason: String) {
        if reason != self.why_not {
            tracing::info!(reason, "not registered yet: the node does not pass its check");
            self.why_not = reason;
        }
    }
}
