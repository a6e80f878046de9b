//! Follows what the VCL depends on (the fleet, the configuration, names, a template), and starts and ends the task of each Varnish.
//!
//! All of it is looked at ten times a second while VCL is pushed: a look costs a few comparisons while nothing has changed. Changes that come
//! together become one content: it is published when nothing has changed for a moment, and at the latest soon after the first change.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet, spawn_blocking};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::content::{ContentBackends, FleetContent};
use super::node::{Pusher, PusherContext};
use super::place::{ManagementPlace, place_of};
use super::{NodeVcl, PushSettings, VclPush, VclPushContext, VclState};
use crate::config::{VclBackends, VclMode};
use crate::fleet::{NodeId, PurgeDialect, Role, Snapshot};
use crate::telemetry::causes;
use crate::varnish::origin_names::OriginNames;
use crate::varnish::own_template::OwnTemplate;
use crate::varnish::vcl::OriginAddress;

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(100);

/// A content that has not changed for so long is published.
const QUIET: Duration = Duration::from_millis(100);

/// And one that goes on changing, so long after its first change.
const LONGEST: Duration = Duration::from_millis(500);

/// Time between two looks at names and at the template.
const OUTSIDE: Duration = Duration::from_secs(1);

/// Follows everything.
pub(super) struct FleetFollower {
    push: Arc<VclPush>,
    context: Arc<VclPushContext>,
    outside: OutsideFacts,
    published: watch::Sender<Option<Arc<FleetContent>>>,
    /// What was seen last, since when, and since when it is another one than what is published.
    seen: Option<FleetContent>,
    since: Instant,
    differs_since: Option<Instant>,
    tasks: JoinSet<()>,
    running: BTreeMap<NodeId, (ManagementPlace, PurgeDialect, AbortHandle)>,
}

/// What is not in memory.
struct OutsideFacts {
    settings: Option<Arc<PushSettings>>,
    names: OriginNames,
    origins: BTreeSet<SocketAddr>,
    template: TemplateFile,
    looked: Option<Instant>,
    /// What is wrong with the last look.
    problem: Option<String>,
}

/// A VCL of the shop's own.
#[derive(Default)]
struct TemplateFile {
    file: Option<PathBuf>,
    /// The text of the last look. One that is another than before may be half written.
    text: Option<String>,
    /// The last one that could be used.
    parsed: Option<Arc<OwnTemplate>>,
}

impl FleetFollower {
    pub(super) fn new(push: Arc<VclPush>, context: VclPushContext) -> Self {
        let outside = OutsideFacts {
            settings: None,
            names: OriginNames::new(Vec::new()),
            origins: BTreeSet::new(),
            template: TemplateFile::default(),
            looked: None,
            problem: None,
        };
        FleetFollower {
            push,
            context: Arc::new(context),
            outside,
            published: watch::channel(None).0,
            seen: None,
            since: Instant::now(),
            differs_since: None,
            tasks: JoinSet::new(),
            running: BTreeMap::new(),
        }
    }

    pub(super) async fn run(mut self) {
        // Half a fleet would be pushed otherwise.
        if self.context.listed.clone().wait_for(|listed| *listed).await.is_err() {
            return;
        }
        let mut settings = self.context.settings.clone();
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut known = None;
        loop {
            looks.tick().await;
            let now = Arc::clone(&settings.borrow_and_update());
            let is_on = now.vcl.mode == VclMode::Push;
            let is_other = self.outside.look(&now, is_on).await;
            let fleet = self.context.fleet.load_full();
            let seen = (fleet.version, Arc::clone(&now));
            if is_other || self.has_ended_tasks() || known.as_ref() != Some(&seen) {
                self.take(&now, &fleet, is_on);
                known = Some(seen);
            }
            self.publish_in_time();
            if !is_on && self.published.borrow().is_none() && settings.changed().await.is_err() {
                return;
            }
        }
    }

    /// Takes what there is to be seen now.
    fn take(&mut self, settings: &PushSettings, fleet: &Snapshot, is_on: bool) {
        let content = is_on.then(|| self.outside.content(settings, fleet)).transpose();
        self.say(content.as_ref().err());
        match content {
            Ok(content) if content != self.seen => {
                self.seen = content;
                self.since = Instant::now();
            }
            // Without any, what was there goes on.
            Ok(_) | Err(_) => {}
        }
        self.attend(settings, fleet, is_on);
    }

    fn has_ended_tasks(&mut self) -> bool {
        let mut any = false;
        while let Some(ended) = self.tasks.try_join_next() {
            any = true;
            if let Err(error) = ended
                && error.is_panic()
            {
                tracing::error!(error = %causes(&error), "the task that pushes a VCL panicked");
            }
        }
        any
    }

    /// Says what is wrong, once as long as the words are the same.
    fn say(&self, problem: Option<&String>) {
        let problem = problem.or(self.outside.problem.as_ref());
        let mut said = self.push.problem.lock();
        if problem.map(String::as_str) != said.as_deref() {
            if let Some(problem) = problem {
                tracing::warn!(error = problem, "what the VCL of the fleet is made of is not as it should be");
            }
            *said = problem.map(|problem| problem.as_str().into());
        }
    }

    fn publish_in_time(&mut self) {
        if self.seen.as_ref() == self.published.borrow().as_deref() {
            self.differs_since = None;
            return;
        }
        let now = Instant::now();
        let differs_since = *self.differs_since.get_or_insert(now);
        let is_first = self.published.borrow().is_none();
        if is_first || now - self.since >= QUIET || now - differs_since >= LONGEST {
            self.published.send_replace(self.seen.clone().map(Arc::new));
            self.differs_since = None;
        }
    }

    /// Starts and ends the tasks of Varnish nodes.
    fn attend(&mut self, settings: &PushSettings, fleet: &Snapshot, is_on: bool) {
        let members = fleet.varnish.members().iter().filter(|_| is_on);
        let mut wanted = BTreeMap::new();
        for member in members {
            let spec = &member.node.spec;
            let delivery = spec.varnish.as_ref().map(|settings| settings.delivery).unwrap_or_default();
            match place_of(spec, settings) {
                Ok(place) => _ = wanted.insert(spec.id.clone(), (place, delivery)),
                Err(reason) => {
                    let vcl =
                        NodeVcl { state: VclState::NotManaged, problem: reason.reason().into(), ..NodeVcl::default() };
                    if self.push.of(&spec.id).is_none_or(|shown| shown != vcl) {
                        tracing::warn!(node = %spec.id, "{}", reason.reason());
                        self.push.set(&spec.id, vcl);
                    }
                }
            }
        }
        self.running.retain(|id, (place, delivery, task)| {
            let stays = !task.is_finished() && wanted.get(id) == Some(&(place.clone(), *delivery));
            if !stays {
                task.abort();
            }
            if !is_on && let Some(metrics) = fleet.varnish.get(id).map(|_| self.context.metrics.node(Role::Varnish, id))
            {
                // Nothing is wanted of it any more.
                metrics.vcl().inspect(|metrics| metrics.outdated.set(0));
            }
            stays
        });
        for (id, (place, delivery)) in wanted {
            if self.running.contains_key(&id) {
                continue;
            }
            let context = PusherContext {
                push: Arc::clone(&self.push),
                around: Arc::clone(&self.context),
                content: self.published.subscribe(),
            };
            let task = self.tasks.spawn(Pusher::new(id.clone(), place.clone(), delivery, context).run());
            self.running.insert(id, (place, delivery, task));
        }
        self.push.keep_only(|id| is_on && fleet.varnish.get(id).is_some());
    }
}

impl OutsideFacts {
    /// Looks at names and the template, each second and when the configuration has changed. Returns whether anything is another.
    async fn look(&mut self, settings: &Arc<PushSettings>, is_on: bool) -> bool {
        let is_new = self.settings.as_ref() != Some(settings);
        if is_new {
            self.take(settings);
        }
        if !is_on {
            self.problem = None;
            return is_new;
        }
        if !is_new && self.looked.is_some_and(|looked| looked.elapsed() < OUTSIDE) {
            return false;
        }
        self.looked = Some(Instant::now());
        let before = (self.origins.clone(), self.template.parsed.clone(), self.problem.clone());
        let missing = match settings.vcl.backends {
            VclBackends::Origin => {
                let (found, without) = self.names.resolve().await;
                // A resolver that is away must not cost the fleet its origins.
                if !found.is_empty() {
                    self.origins = found;
                }
                (!without.is_empty()).then(|| format!("origins without an address: {}", without.join("; ")))
            }
            VclBackends::Web => None,
        };
        let unusable = self.template.look().await.err();
        self.problem = missing.or(unusable);
        is_new || before != (self.origins.clone(), self.template.parsed.clone(), self.problem.clone())
    }

    fn take(&mut self, settings: &Arc<PushSettings>) {
        let before = self.settings.replace(Arc::clone(settings));
        let named = |settings: &PushSettings| (settings.vcl.origins.clone(), settings.origin_listen.clone());
        if before.as_deref().map(named) != Some(named(settings)) {
            self.names = OriginNames::new(origins(settings));
            self.origins.clear();
        }
        if self.template.file != settings.vcl.template {
            self.template = TemplateFile { file: settings.vcl.template.clone(), ..TemplateFile::default() };
        }
    }

    /// The content for this fleet.
    ///
    /// # Errors
    /// Why there is none, in words.
    fn content(&self, settings: &PushSettings, fleet: &Snapshot) -> Result<FleetContent, String> {
        let template = match (&self.template.file, &self.template.parsed) {
            (Some(_), None) => {
                return Err(self.problem.clone().unwrap_or_else(|| "vcl.template is not read yet".to_owned()));
            }
            (_, parsed) => parsed.clone(),
        };
        let backends = match settings.vcl.backends {
            VclBackends::Origin if self.origins.is_empty() => {
                return Err(self.problem.clone().unwrap_or_else(|| "no origin has an address".to_owned()));
            }
            VclBackends::Origin => ContentBackends::Origins(self.origins.clone()),
            VclBackends::Web => ContentBackends::of_web(fleet, settings)
                .ok_or_else(|| "there is no web node with a weight".to_owned())?,
        };
        Ok(FleetContent::new(settings, template, backends))
    }
}

/// The origin listeners as the configuration names them.
fn origins(settings: &PushSettings) -> Vec<OriginAddress> {
    let named = settings.vcl.origins.iter().filter_map(|origin| {
        let (host, port) = origin.rsplit_once(':')?;
        Some(OriginAddress { host: host.to_owned(), port: port.parse().ok()? })
    });
    let named: Vec<OriginAddress> = named.collect();
    if named.is_empty() {
        settings.origin_listen.first().map(|listen| (*listen).into()).into_iter().collect()
    } else {
        named
    }
}

impl TemplateFile {
    /// Reads the file again.
    ///
    /// # Errors
    /// What is wrong with it, in words. The last one that could be used goes on.
    async fn look(&mut self) -> Result<(), String> {
        let Some(file) = self.file.clone() else { return Ok(()) };
        let shown = file.display().to_string();
        let wrong = |why: String| format!("vcl.template {shown}: {why}");
        let read = spawn_blocking(move || std::fs::read_to_string(file)).await;
        let read = read.map_err(std::io::Error::other).and_then(|read| read);
        let text = read.map_err(|error| wrong(error.to_string()))?;
        let is_whole = self.parsed.is_none() || self.text.as_ref() == Some(&text);
        let parsed = OwnTemplate::parse(&text).map_err(|error| wrong(error.to_string()));
        self.text = Some(text);
        if is_whole {
            self.parsed = Some(Arc::new(parsed?));
        }
        Ok(())
    }
}
