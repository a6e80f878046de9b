//! Reloads the configuration of a running process.
//!
//! File and environment are read again on SIGHUP and when the file has changed, and so are the files that it names: tokens and
//! certificates. If anything is wrong, all of it is refused: half of a configuration is one that nobody wrote. Otherwise everything
//! that can change without cutting a connection does ([`Config::adopting`] says what), for the next request of every connection;
//! what cannot is named in one warning, and takes effect at the next start.
//!
//! Nodes with unchanged tables are not affected by a change of others, and one that is taken out finishes the requests that it has.
//!
//! A change is detected by content, for the reasons in `tls/watch.rs`. A file that is being written is incomplete, and
//! the first half of a list of nodes is a valid list of nodes. So a change counts only if the content is still the same
//! a moment later. On SIGHUP the file is assumed to be complete.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::MissedTickBehavior;

use super::running_parts::RunningParts;
use crate::config::{Config, ConfigErrors, ConfigSource, ConfigText, StaticNode};
use crate::fleet::NodeKey;
use crate::proxy::TrafficRules;
use crate::service_manager::ServiceManager;
use crate::telemetry::{IncidentKind, Metrics, ReloadResult, causes};

/// The interval at which the file is checked for changes.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How long the content of a changed file must stay the same before the file counts as complete.
const COMPLETE_AFTER: Duration = Duration::from_millis(250);

/// How long a reload waits for the workers, which look ten times a second. One that is late takes the rules all the same.
const WORKERS_FOLLOW: Duration = Duration::from_secs(5);

/// Reads the configuration again.
pub(super) struct Reloader {
    source: ConfigSource,
    /// The configuration in effect.
    running: Config,
    parts: Arc<dyn TakeSettings>,
    metrics: Arc<Metrics>,
    manager: ServiceManager,
    /// The text of the file when it was last accepted.
    seen: Option<ConfigText>,
    /// Why the file was refused at the last look, in words that are not told again.
    refused: Vec<String>,
}

/// Takes another configuration, all of it or nothing.
pub(super) trait TakeSettings: Send + Sync {
    /// Blocks while files are read. Returns the rules of before, for whoever waits until no worker goes by them any more.
    ///
    /// # Errors
    /// What of `now` cannot be used. Then everything is as before.
    fn take(&self, before: &Config, now: &Config) -> anyhow::Result<Weak<TrafficRules>>;
}

impl TakeSettings for RunningParts {
    fn take(&self, before: &Config, now: &Config) -> anyhow::Result<Weak<TrafficRules>> {
        let prepared = self.prepare(before, now)?;
        Ok(self.apply(prepared, before, now))
    }
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
        parts: Arc<dyn TakeSettings>,
        metrics: Arc<Metrics>,
        manager: ServiceManager,
    ) -> Self {
        Reloader { source, running, parts, metrics, manager, seen: None, refused: Vec::new() }
    }

    /// Reloads when `asked` is notified and when the file has changed. Never returns.
    pub(super) async fn run(mut self, asked: Arc<Notify>) {
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let cause = tokio::select! {
                () = asked.notified() => Cause::Asked,
                _ = looks.tick() => Cause::FileChanged,
            };
            match cause {
                Cause::Asked => {
                    self.manager.reloading();
                    let text = self.read().await;
                    self.reload(cause, text).await;
                    self.manager.reloaded();
                }
                Cause::FileChanged => {
                    let text = self.changed().await;
                    self.reload(cause, text).await;
                }
            }
        }
    }

    async fn reload(&mut self, cause: Cause, text: Option<ConfigText>) {
        let Some(text) = text else { return };
        self.seen = Some(text.clone());
        let source = self.source.clone();
        match tokio::task::spawn_blocking(move || source.parse(text)).await {
            Ok(outcome) => self.take(cause, outcome).await,
            Err(error) => tracing::error!(error = %causes(&error), "the configuration could not be looked at"),
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

    async fn take(&mut self, cause: Cause, outcome: Result<Config, ConfigErrors>) {
        let config = match outcome {
            Ok(config) => config,
            Err(errors) => return self.refuse(cause, errors.iter().map(ToString::to_string).collect()),
        };
        let now = match self.running.adopting(&config) {
            Ok(now) => now,
            Err(fault) => {
                return self.refuse(cause, vec![format!("what takes effect before the next start is wrong: {fault}")]);
            }
        };
        // Files that it names may have changed, too: a certificate is looked at in any case.
        let (parts, before, taken) = (Arc::clone(&self.parts), self.running.clone(), now.clone());
        let rules = match tokio::task::spawn_blocking(move || parts.take(&before, &taken)).await {
            Ok(Ok(rules)) => rules,
            Ok(Err(error)) => return self.refuse(cause, vec![format!("{error:#}")]),
            Err(error) => return self.refuse(cause, vec![causes(&error).to_string()]),
        };
        self.refused.clear();
        self.metrics.incidents.end(IncidentKind::ReloadRefused);
        match now.keys_that_differ(&config) {
            Ok(keys) if keys.is_empty() => {}
            Ok(keys) => tracing::warn!("takes effect at the next start: {}", keys.join(", ")),
            Err(error) => tracing::warn!(error = %causes(&error), "what else is new takes effect at the next start"),
        }
        if !followed(rules).await {
            tracing::warn!("a worker is busy, and takes the new configuration later");
        }
        let before = std::mem::replace(&mut self.running, now);
        self.report(cause, &before);
    }

    fn report(&self, cause: Cause, before: &Config) {
        if *before == self.running {
            if cause == Cause::Asked {
                tracing::info!("the configuration is as it was");
                self.metrics.count_reload(ReloadResult::Unchanged);
            }
            return;
        }
        let Changes { new, gone, changed } = &Changes::between(&before.nodes, &self.running.nodes);
        if before.nodes != self.running.nodes {
            tracing::info!(new = new.join(" "), gone = gone.join(" "), changed = changed.join(" "), "nodes reloaded");
        }
        let keys = before.keys_that_differ(&self.running).unwrap_or_default();
        tracing::info!("the configuration was reloaded: {}", keys.join(", "));
        self.metrics.count_reload(ReloadResult::Applied);
    }

    /// Says what is wrong, once. It is looked at again and again: a file that the configuration names may be mended without a change
    /// of the configuration.
    fn refuse(&mut self, cause: Cause, errors: Vec<String>) {
        self.seen = None;
        if cause == Cause::FileChanged && errors == self.refused {
            return;
        }
        for error in &errors {
            tracing::error!("{error}");
        }
        tracing::error!("the new configuration is refused; the old one goes on");
        self.metrics.count_reload(ReloadResult::Refused);
        self.metrics.incidents.note(IncidentKind::ReloadRefused, errors.first().map_or("", String::as_str));
        self.refused = errors;
    }
}

/// Waits until no worker goes by these rules any more. Returns whether that is so.
async fn followed(rules: Weak<TrafficRules>) -> bool {
    let gone = async {
        while rules.strong_count() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(WORKERS_FOLLOW, gone).await.is_ok()
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
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

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
            zone: None,
            delivery,
            header_limit,
            send_proxy,
            headers: SecretHeaders::default(),
            management: None,
            management_secret_file: None,
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
        let none = Changes { new: vec![], gone: vec![], changed: vec![] };
        assert_eq!(Changes::between(&before, &turned), none);
    }

    /// Parts that remember what they took, and refuse a health check at `/refused`.
    #[derive(Default)]
    struct Parts(Mutex<Vec<Config>>);

    impl TakeSettings for Parts {
        fn take(&self, _before: &Config, now: &Config) -> anyhow::Result<Weak<TrafficRules>> {
            anyhow::ensure!(now.health.web.path != "/refused", "no such file");
            self.0.lock().push(now.clone());
            Ok(Weak::new())
        }
    }

    /// A reloader of a file with this text, and the file.
    fn reloader(text: &str) -> (Reloader, Arc<Parts>, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let source = ConfigSource::new(Some(file.path().to_owned()), std::iter::empty());
        let running = source.load().unwrap();
        let parts = Arc::<Parts>::default();
        let metrics = Arc::new(Metrics::new().unwrap());
        let reloader =
            Reloader::new(source, running, Arc::clone(&parts) as _, metrics, ServiceManager::of_this_process());
        (reloader, parts, file)
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_is_being_written_is_left_alone_until_it_is_complete() {
        let (mut reloader, _, file) = reloader("[[node]]\nrole = 'web'\nid = 'a'\naddress = 'a:80'\n");
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
    async fn what_was_refused_for_a_file_that_it_names_is_taken_once_that_is_there() {
        let (mut reloader, parts, file) = reloader("");
        let folder = tempfile::tempdir().unwrap();
        let token = folder.path().join("token");
        std::fs::write(file.path(), format!("purge.token_file = {token:?}\n")).unwrap();
        for _ in 0..2 {
            let text = reloader.changed().await.expect("it is looked at again");
            reloader.reload(Cause::FileChanged, Some(text)).await;
        }
        assert_eq!(counted(&reloader), "010");
        std::fs::write(&token, "a-token-that-is-long-enough\n").unwrap();
        let text = reloader.changed().await.expect("it is looked at again");
        reloader.reload(Cause::FileChanged, Some(text)).await;
        assert_eq!((counted(&reloader).as_str(), parts.0.lock().len()), ("110", 1));
        assert!(reloader.changed().await.is_none());
    }

    fn counted(reloader: &Reloader) -> String {
        let text = String::from_utf8(reloader.metrics.render().unwrap()).unwrap();
        let count = |result| {
            let series = format!("clearcoat_reloads_total{{result=\"{result}\"}} ");
            text.lines().find_map(|line| line.strip_prefix(&series)).unwrap().to_owned()
        };
        ["applied", "refused", "unchanged"].map(count).concat()
    }

    #[tokio::test]
    async fn only_a_change_counts_unless_somebody_asked() {
        let node = "[[node]]\nrole = 'web'\nid = 'a'\naddress = 'a:80'\n";
        let (mut reloader, parts, file) = reloader(node);
        for (cause, text, expected) in [
            (Cause::FileChanged, node.to_owned(), "000"),
            (Cause::Asked, node.to_owned(), "001"),
            // A change of a key that needs a restart does not count as a reload.
            (Cause::FileChanged, format!("log.format = 'json'\n{node}"), "001"),
            (Cause::Asked, "log.level = 'loud'".to_owned(), "011"),
            // It is looked at again and again, and told of once.
            (Cause::FileChanged, "log.level = 'loud'".to_owned(), "011"),
            (Cause::Asked, "log.level = 'loud'".to_owned(), "021"),
            (Cause::FileChanged, "log.level = 'louder'".to_owned(), "031"),
            (Cause::FileChanged, node.replace("a:80", "b:80"), "131"),
            (Cause::Asked, node.replace("a:80", "b:80"), "132"),
            (Cause::Asked, format!("log.level = 'debug'\n{}", node.replace("a:80", "b:80")), "232"),
        ] {
            std::fs::write(file.path(), &text).unwrap();
            let outcome = reloader.source.load();
            reloader.take(cause, outcome).await;
            assert_eq!(counted(&reloader), expected, "{text}");
        }
        assert_eq!(parts.0.lock().last().unwrap().nodes[0].address, "b:80");
    }

    #[tokio::test]
    async fn what_the_parts_refuse_is_refused_as_a_whole_and_tried_again() {
        let (mut reloader, parts, file) = reloader("");
        let before = reloader.running.clone();
        std::fs::write(file.path(), "health.web.path = '/refused'\nlog.level = 'debug'").unwrap();
        for expected in ["010", "020"] {
            let outcome = reloader.source.load();
            reloader.take(Cause::Asked, outcome).await;
            assert_eq!((counted(&reloader), &reloader.running), (expected.to_owned(), &before));
        }
        assert!(parts.0.lock().is_empty() && reloader.metrics.incidents.has(IncidentKind::ReloadRefused));
        std::fs::write(file.path(), "health.web.path = '/taken'\njournal.path = '/other'").unwrap();
        let outcome = reloader.source.load();
        reloader.take(Cause::Asked, outcome).await;
        // What needs a restart is not shown to any part.
        let taken = parts.0.lock().last().cloned().unwrap();
        assert_eq!((&*taken.health.web.path, &taken.journal), ("/taken", &before.journal));
        assert!(!reloader.metrics.incidents.has(IncidentKind::ReloadRefused));
    }
}
