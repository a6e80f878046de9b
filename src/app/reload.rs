//! Reloads the configuration of a running process.
//!
//! File and environment are read again on SIGHUP and when the file has changed. If anything is wrong, all of it is
//! refused: half of a configuration is one that nobody wrote. Otherwise `registry::fixed` switches to the new nodes;
//! nodes with unchanged tables are not affected. `log.level` applies at once, because a restart would end the fault
//! under investigation. A change of any other key is logged and needs a restart: a listener could be opened again, but
//! connections accepted under the old rules cannot be checked again, and "most of it applies" is hard to keep in mind.
//!
//! A change is detected by content, for the reasons in `tls/watch.rs`. A file that is being written is incomplete, and
//! the first half of a list of nodes is a valid list of nodes. So a change counts only if the content is still the same
//! a moment later. On SIGHUP the file is assumed to be complete.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::MissedTickBehavior;

use crate::config::{Config, ConfigErrors, ConfigSource, ConfigText, StaticNode};
use crate::fleet::NodeKey;
use crate::telemetry::{IncidentKind, Metrics, ReloadResult, causes, log};

/// The interval at which the file is checked for changes.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How long the content of a changed file must stay the same before the file counts as complete.
const COMPLETE_AFTER: Duration = Duration::from_millis(250);

/// Reads the configuration again.
pub(super) struct Reloader {
    source: ConfigSource,
    /// The configuration at the start, with the nodes and the log level of the last reload.
    running: Config,
    nodes: watch::Sender<Vec<StaticNode>>,
    metrics: Arc<Metrics>,
    /// The text of the file when it was last accepted or refused.
    seen: Option<ConfigText>,
}

/// The reason for a reload.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cause {
    Asked,
    FileChanged,
}

impl Reloader {
    pub(super) fn new(
        source: ConfigSource,
        running: Config,
        nodes: watch::Sender<Vec<StaticNode>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Reloader { source, running, nodes, metrics, seen: None }
    }

    /// Reloads when `asked` is notified and when the file has changed. Never returns.
    pub(super) async fn run(mut self, asked: Arc<Notify>) {
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let (cause, text) = tokio::select! {
                () = asked.notified() => (Cause::Asked, self.read().await),
                _ = looks.tick() => (Cause::FileChanged, self.changed().await),
            };
            let Some(text) = text else { continue };
            self.seen = Some(text.clone());
            let source = self.source.clone();
            match tokio::task::spawn_blocking(move || source.parse(text)).await {
                Ok(outcome) => self.take(cause, outcome),
                Err(error) => tracing::error!(error = %causes(&error), "the configuration could not be looked at"),
            }
        }
    }

    async fn read(&self) -> Option<ConfigText> {
        let source = self.source.clone();
        let read = tokio::task::spawn_blocking(move || source.read()).await;
        read.inspect_err(|error| tracing::error!(error = %causes(error), "the configuration could not be looked at"))
            .ok()
    }

    /// The content of the file, if it is new and complete.
    async fn changed(&self) -> Option<ConfigText> {
        let found = self.read().await?;
        if self.seen.as_ref() == Some(&found) {
            return None;
        }
        tokio::time::sleep(COMPLETE_AFTER).await;
        let again = self.read().await?;
        (found == again).then_some(again)
    }

    fn take(&mut self, cause: Cause, outcome: Result<Config, ConfigErrors>) {
        let config = match outcome {
            Ok(config) => config,
            Err(errors) => {
                for error in errors.iter() {
                    tracing::error!("{error}");
                }
                tracing::error!("the new configuration is refused; the old one goes on");
                self.metrics.count_reload(ReloadResult::Refused);
                let first = errors.iter().next().map_or_else(String::new, |error| error.to_string());
                self.metrics.incidents.note(IncidentKind::ReloadRefused, &first);
                return;
            }
        };
        self.metrics.incidents.end(IncidentKind::ReloadRefused);
        match self.running.keys_that_differ(&config) {
            Ok(keys) if keys.is_empty() => {}
            Ok(keys) => tracing::warn!("takes effect at the next start: {}", keys.join(", ")),
            Err(error) => tracing::warn!(error = %causes(&error), "what else is new takes effect at the next start"),
        }
        let logs_otherwise = self.running.log.level != config.log.level;
        if logs_otherwise {
            log::set_filter(config.log.level.targets());
            tracing::info!(level = %config.log.level, "the log level was changed");
            self.running.log.level = config.log.level;
        }
        let changes = Changes::between(&self.running.nodes, &config.nodes);
        if changes.are_none() {
            if logs_otherwise {
                self.metrics.count_reload(ReloadResult::Applied);
            } else if cause == Cause::Asked {
                tracing::info!("the nodes of the configuration are as they were");
                self.metrics.count_reload(ReloadResult::Unchanged);
            }
            return;
        }
        let Changes { new, gone, changed } = &changes;
        tracing::info!(new = new.join(" "), gone = gone.join(" "), changed = changed.join(" "), "nodes reloaded");
        self.metrics.count_reload(ReloadResult::Applied);
        self.running.nodes.clone_from(&config.nodes);
        self.nodes.send_replace(config.nodes);
    }
}

/// What differs between two lists of nodes, by their names.
#[derive(Debug, PartialEq, Eq)]
struct Changes {
    new: Vec<String>,
    gone: Vec<String>,
    changed: Vec<String>,
}

impl Changes {
    /// The order of the lists does not matter.
    fn between(before: &[StaticNode], now: &[StaticNode]) -> Self {
        let by_name = |nodes: &[StaticNode]| -> BTreeMap<NodeKey, StaticNode> {
            nodes.iter().map(|node| ((node.role, node.id.clone()), node.clone())).collect()
        };
        let (before, now) = (by_name(before), by_name(now));
        let names = |nodes: &BTreeMap<NodeKey, StaticNode>, is_meant: &dyn Fn(&StaticNode) -> bool| {
            nodes.values().filter(|node| is_meant(node)).map(|node| node.id.to_string()).collect()
        };
        let other = |nodes: &BTreeMap<NodeKey, StaticNode>, node: &StaticNode| {
            nodes.get(&(node.role, node.id.clone())).cloned()
        };
        Changes {
            new: names(&now, &|node| other(&before, node).is_none()),
            gone: names(&before, &|node| other(&now, node).is_none()),
            changed: names(&now, &|node| other(&before, node).is_some_and(|before| before != *node)),
        }
    }

    fn are_none(&self) -> bool {
        self.new.is_empty() && self.gone.is_empty() && self.changed.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{NodeId, Role, SecretHeaders, SendProxy};

    fn node(role: Role, id: &str, weight: u32) -> StaticNode {
        let id = NodeId::try_from(id).unwrap();
        let (delivery, header_limit, send_proxy) = (None, None, SendProxy::Off);
        StaticNode {
            role,
            id,
            address: "10.0.0.1:80".into(),
            weight,
            delivery,
            header_limit,
            send_proxy,
            headers: SecretHeaders::default(),
        }
    }

    #[test]
    fn what_differs_is_found_whatever_the_order() {
        let before = [node(Role::Web, "a", 1), node(Role::Web, "b", 1), node(Role::Varnish, "b", 1)];
        let now = [node(Role::Varnish, "b", 1), node(Role::Varnish, "a", 1), node(Role::Web, "b", 2)];
        let name = |name: &str| vec![name.to_owned()];
        let expected = Changes { new: name("a"), gone: name("a"), changed: name("b") };
        assert_eq!(Changes::between(&before, &now), expected);
        let mut turned = before.clone();
        turned.reverse();
        assert!(Changes::between(&before, &turned).are_none());
    }

    /// A reloader of a file with this text, and the file.
    fn reloader(text: &str) -> (Reloader, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let source = ConfigSource::new(Some(file.path().to_owned()), std::iter::empty());
        let running = source.load().unwrap();
        let (nodes, _) = watch::channel(running.nodes.clone());
        (Reloader::new(source, running, nodes, Arc::new(Metrics::new().unwrap())), file)
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_is_being_written_is_left_alone_until_it_is_complete() {
        let (mut reloader, file) = reloader("[[node]]\nrole = 'web'\nid = 'a'\naddress = 'a:80'\n");
        let write = |text| std::fs::write(file.path(), text).unwrap();
        reloader.seen = Some(reloader.source.read());
        assert_eq!(reloader.changed().await, None, "it is as it was");
        write("");
        let rest = async {
            tokio::time::sleep(COMPLETE_AFTER / 2).await;
            write("log.level = 'warn'");
        };
        let (found, ()) = tokio::join!(reloader.changed(), rest);
        assert_eq!(found, None, "it was not complete");
        let found = reloader.changed().await.expect("complete");
        assert!(reloader.source.parse(found).unwrap().nodes.is_empty());
    }

    #[tokio::test]
    async fn only_a_change_counts_unless_somebody_asked() {
        let node = "[[node]]\nrole = 'web'\nid = 'a'\naddress = 'a:80'\n";
        let (mut reloader, file) = reloader(node);
        let counted = |reloader: &Reloader| {
            let text = String::from_utf8(reloader.metrics.render().unwrap()).unwrap();
            let count = |result| {
                let series = format!("clearcoat_reloads_total{{result=\"{result}\"}} ");
                text.lines().find_map(|line| line.strip_prefix(&series)).unwrap().to_owned()
            };
            ["applied", "refused", "unchanged"].map(count).concat()
        };
        for (cause, text, expected) in [
            (Cause::FileChanged, node.to_owned(), "000"),
            (Cause::Asked, node.to_owned(), "001"),
            // A change of a key that needs a restart does not count as a reload.
            (Cause::FileChanged, format!("log.format = 'json'\n{node}"), "001"),
            (Cause::Asked, "log.level = 'loud'".to_owned(), "011"),
            (Cause::FileChanged, "log.level = 'loud'".to_owned(), "021"),
            (Cause::FileChanged, node.replace("a:80", "b:80"), "121"),
            (Cause::Asked, node.replace("a:80", "b:80"), "122"),
            (Cause::Asked, format!("log.level = 'debug'\n{}", node.replace("a:80", "b:80")), "222"),
        ] {
            std::fs::write(file.path(), &text).unwrap();
            let outcome = reloader.source.load();
            reloader.take(cause, outcome);
            assert_eq!(counted(&reloader), expected, "{text}");
        }
        assert_eq!(reloader.nodes.borrow()[0].address, "b:80");
    }
}
