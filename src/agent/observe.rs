//! Looks at the node, for as long as the agent runs.

use tokio::sync::watch;

use super::Settings;
use super::address::is_local;
use super::check::Tally;
use super::epoch::Life;

/// How much sooner the next check comes while the node has not been up yet: it is about to start.
const STARTING: u32 = 10;

/// What was seen of a node that has been up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sight {
    pub(super) address: String,
    pub(super) up: bool,
    pub(super) epoch: Option<String>,
}

/// Publishes what is seen, when it changes: nothing until the node is up for the first time.
pub(super) async fn observe(settings: &Settings, child: Option<u32>, sights: &watch::Sender<Option<Sight>>) {
    let mut eye = Eye { settings, child, address: None, epoch: None, trouble: String::new() };
    let mut tally = Tally::new(&settings.check);
    loop {
        let problem = eye.look().await.err();
        let up = tally.count(problem.is_none());
        eye.tell(problem, up, tally.has_been_up());
        if let Some(address) = eye.address.clone().filter(|_| tally.has_been_up()) {
            let sight = Some(Sight { address, up, epoch: eye.epoch.clone() });
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

struct Eye<'a> {
    settings: &'a Settings,
    child: Option<u32>,
    address: Option<String>,
    /// The last life of the cache that was seen.
    epoch: Option<String>,
    /// What was said last.
    trouble: String,
}

impl Eye<'_> {
    /// Looks once. The reason is for people.
    async fn look(&mut self) -> Result<(), String> {
        let address = self.address().await?;
        match self.settings.epoch.look(self.child) {
            Life::Unnamed => self.epoch = None,
            Life::Absent(reason) => return Err(reason.to_owned()),
            Life::Named(name) => {
                if self.epoch.as_ref().is_some_and(|before| *before != name) {
                    tracing::warn!(epoch = name, "the cache began another life, and is empty");
                }
                self.epoch = Some(name);
            }
        }
        self.settings.check.ask(&address).await.map_err(|failed| failed.to_string())
    }

    async fn address(&mut self) -> Result<String, String> {
        if let Some(address) = &self.address {
            return Ok(address.clone());
        }
        let found = tokio::time::timeout(self.settings.check.timeout, self.settings.address.find()).await;
        let address = match found {
            Ok(Ok(address)) => address,
            Ok(Err(unknown)) => return Err(unknown.to_string()),
            Err(_) => return Err("the name of etcd is not resolved in time".to_owned()),
        };
        if is_local(&address) {
            tracing::warn!(address, "only this host can reach the address of this node");
        }
        self.address = Some(address.clone());
        Ok(address)
    }

    /// Says what is new, once.
    fn tell(&mut self, problem: Option<String>, up: bool, has_been_up: bool) {
        let trouble = problem.unwrap_or_default();
        if trouble == self.trouble {
            return;
        }
        match (up, has_been_up) {
            _ if trouble.is_empty() => tracing::info!("the node passes its check"),
            (_, false) => tracing::info!(reason = trouble, "not registered yet: the node does not pass its check"),
            _ => tracing::warn!(reason = trouble, up, "the node fails its check"),
        }
        self.trouble = trouble;
    }
}
