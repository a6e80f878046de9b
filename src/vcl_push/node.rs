//! One Varnish: a connection to its management port that is kept open, and the VCL that is put in use over it.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, sleep_until};

use super::content::{FleetContent, PublishedContent};
use super::decision::{Decision, ReplaceCause, VclInUse, WantedVcl, decide};
use super::place::ManagementPlace;
use super::{NodeVcl, VclPush, VclPushContext, VclState};
use crate::backoff::Backoff;
use crate::fleet::{Health, NodeId, PurgeDialect, Role};
use crate::telemetry::{VclMetrics, causes};
use crate::varnish::cli_text::{ListedVcl, parse_backends, parse_banner, parse_vcls, parse_version};
use crate::varnish::fleet_vcl::{FleetVcl, PREFIX};
use crate::varnish::management::{ManagementError, ManagementPort};
use crate::varnish::vcl::VarnishVersion;

/// Time between two looks at which VCL is in use.
const LOOK: Duration = Duration::from_secs(1);

/// For connecting, and for each answer but that of the compiler.
const STEP: Duration = Duration::from_secs(5);

/// For the compiler: a VCL takes a second of a core, and a varnishd whose worker hangs answers nothing.
const COMPILE: Duration = Duration::from_secs(60);

/// So many VCLs are compiled in this time at most, so that a fleet that changes all the time costs a part of a core only, and a single
/// change waits for nothing.
const BURST: usize = 3;
const BURST_TIME: Duration = Duration::from_secs(3);

/// How long a VCL that was loaded waits for its backends to be well before the old one is given up.
const WELL: Duration = Duration::from_secs(2);

/// Time between two looks at them.
const WELL_LOOK: Duration = Duration::from_millis(50);

/// The pauses after a VCL that was refused.
const REFUSED: Backoff = Backoff { min: Duration::from_secs(1), max: Duration::from_secs(300) };

/// The pauses after a connection that was not made, or broke: a varnishd that is restarted is back in a second.
const CONNECT: Backoff = Backoff { min: Duration::from_millis(50), max: Duration::from_millis(500) };

/// The pauses where somebody has to change something.
const LOCKED_OUT: Backoff = Backoff { min: Duration::from_secs(1), max: Duration::from_secs(30) };

/// How many discarded VCLs of ours may be left in a varnishd.
const MOST_DISCARDED: usize = 20;

/// The most characters of what is wrong: of a compiler's words, the first lines say it.
const MAX_WORDS: usize = 400;

/// Pushes to one Varnish.
pub(super) struct Pusher {
    id: NodeId,
    place: ManagementPlace,
    delivery: PurgeDialect,
    context: PusherContext,
    memory: PushMemory,
}

/// What all share.
pub(super) struct PusherContext {
    pub(super) push: Arc<VclPush>,
    pub(super) around: Arc<VclPushContext>,
    pub(super) content: PublishedContent,
}

/// What outlives a connection.
#[derive(Default)]
struct PushMemory {
    aim: Option<WantedVcl>,
    sight: Option<VclInUse>,
    /// The one of ours that was in use before.
    previous: Option<String>,
    /// When the last compilations began, of [`BURST`] at most.
    compiled: VecDeque<Instant>,
    /// Of what is wanted now, in a row; and when it is tried again.
    refusals: u32,
    next_try: Option<Instant>,
    /// What was said last of what is wrong.
    said: String,
}

/// Why a VCL was not put in use.
#[derive(Debug, thiserror::Error)]
enum VclNotUsed {
    #[error("varnishd does not take its VCL: {0}")]
    Refused(String),
    #[error("its new VCL waits: no web node is well as this Varnish sees them")]
    Unwell,
    #[error("its new VCL waits until varnishd has let go of {0} discarded ones")]
    Crowded(usize),
    /// The connection is of no more use.
    #[error(transparent)]
    Port(ManagementError),
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
enum NoSession {
    #[error("the secret file {} cannot be read", .0.display())]
    Secret(std::path::PathBuf, #[source] io::Error),
    #[error("its management port {0}")]
    Port(String, #[source] ManagementError),
    #[error("its management port {0} was closed: varnishd has ended, or is restarted")]
    Closed(String),
}

impl From<ManagementError> for VclNotUsed {
    fn from(error: ManagementError) -> Self {
        match error {
            ManagementError::Refused { text, .. } => VclNotUsed::Refused(in_a_line(&text)),
            error => VclNotUsed::Port(error),
        }
    }
}

impl Pusher {
    pub(super) fn new(id: NodeId, place: ManagementPlace, delivery: PurgeDialect, context: PusherContext) -> Self {
        Pusher { id, place, delivery, context, memory: PushMemory::default() }
    }

    pub(super) async fn run(mut self) {
        let mut failures = 0;
        loop {
            // A closed channel: the process ends.
            if self.context.content.wait_for(Option::is_some).await.is_err() {
                return;
            }
            let began = Instant::now();
            let Err(error) = self.session().await else { continue };
            // One that had lasted a while was no failure to connect.
            failures = if began.elapsed() > STEP { 1 } else { failures + 1 };
            let is_locked_out = matches!(
                error,
                NoSession::Secret(..) | NoSession::Port(_, ManagementError::NoSecret | ManagementError::WrongSecret)
            );
            let pause = if is_locked_out { LOCKED_OUT } else { CONNECT };
            self.complain(VclState::Unreachable, &causes(&error).to_string());
            self.metrics(|metrics| metrics.outdated.set(1));
            sleep(pause.pause(failures, 0.5 + fastrand::f64() / 2.0)).await;
        }
    }

    /// One connection. Returns without an error when nothing is to be pushed any more.
    async fn session(&mut self) -> Result<(), NoSession> {
        let (mut port, version) = self.connect().await?;
        if self.memory.refusals == 0 {
            // What was said of the way there is over.
            self.memory.said.clear();
        }
        let mut is_first = true;
        loop {
            let Some(content) = self.context.content.borrow_and_update().clone() else { return Ok(()) };
            let next_look = match content.vcl(version, self.delivery) {
                Ok(vcl) => self.turn(&mut port, &content, &vcl, is_first).await.map_err(|error| self.at_port(error))?,
                Err(error) => {
                    self.complain(VclState::Pending, &error.to_string());
                    Instant::now() + LOOK
                }
            };
            is_first = false;
            tokio::select! {
                () = port.closed() => return Err(NoSession::Closed(self.place.address.clone())),
                changed = self.context.content.changed() => if changed.is_err() { return Ok(()) },
                () = sleep_until(next_look) => {}
            }
        }
    }

    fn at_port(&self, error: ManagementError) -> NoSession {
        NoSession::Port(self.place.address.clone(), error)
    }

    async fn connect(&self) -> Result<(ManagementPort, VarnishVersion), NoSession> {
        let secret = match self.place.secret_file.clone() {
            None => None,
            Some(file) => {
                let named = file.clone();
                let read = spawn_blocking(move || std::fs::read(file)).await.map_err(io::Error::other).flatten();
                Some(read.map_err(|error| NoSession::Secret(named, error))?)
            }
        };
        let connected = ManagementPort::connect(self.place.address.as_str(), secret.as_deref(), STEP).await;
        let mut port = connected.map_err(|error| self.at_port(error))?;
        let banner = port.command(&["banner"]).await.map_err(|error| self.at_port(error))?;
        let version = match parse_banner(&banner.text).and_then(parse_version) {
            // `std.ban` is there since 6.6.
            Some(version) if version < (6, 6) => VarnishVersion::Six,
            _ => VarnishVersion::Seven,
        };
        Ok((port, version))
    }

    /// Looks which VCL is in use, and puts ours in its place if it is time. Returns when to look again.
    async fn turn(
        &mut self,
        port: &mut ManagementPort,
        content: &FleetContent,
        vcl: &FleetVcl,
        is_first: bool,
    ) -> Result<Instant, ManagementError> {
        let mut listed = list(port).await?;
        self.see(&listed, vcl, is_first);
        let mut next_look = Instant::now() + LOOK;
        let (Some(aim), Some(sight)) = (&self.memory.aim, &self.memory.sight) else {
            // A worker that does not run, say.
            self.complain(VclState::Pending, "varnishd has no VCL in use");
            return Ok(next_look);
        };
        match decide(aim, sight, (self.context.around.turn)()) {
            Decision::InPlace => self.is_in_place(&listed),
            Decision::LeaveToPeer => {
                self.complain(
                    VclState::LeftToPeer,
                    "it uses the VCL of another clearcoat, which sees another fleet, or is configured in another way",
                );
                self.show(VclState::LeftToPeer, &listed);
            }
            Decision::Replace(due, cause) => {
                let is_loaded = listed.iter().any(|known| is_available(known) && known.name == vcl.name);
                let is_burst = self.memory.compiled.len() == BURST && !is_loaded;
                let paced = self.memory.compiled.front().filter(|_| is_burst).map(|first| *first + BURST_TIME);
                let due = [Some(due), paced, self.memory.next_try].into_iter().flatten().max().unwrap_or(due);
                if due > Instant::now() {
                    self.wait_in_place(cause, &listed);
                    next_look = next_look.min(due);
                } else {
                    self.replace(port, content, vcl, (&mut listed, cause)).await?;
                }
            }
        }
        Ok(next_look)
    }

    /// Remembers what is wanted and what is in use.
    fn see(&mut self, listed: &[ListedVcl], vcl: &FleetVcl, is_first: bool) {
        let now = Instant::now();
        if self.memory.aim.as_ref().is_none_or(|aim| aim.name != vcl.name) {
            self.memory.aim = Some(WantedVcl { name: vcl.name.clone(), since: now, over_peers: 0, over_hands: 0 });
            (self.memory.refusals, self.memory.next_try) = (0, None);
        }
        let active = listed.iter().find(|vcl| vcl.status == "active").map(|vcl| vcl.name.as_str());
        if active != self.memory.sight.as_ref().map(|sight| sight.name.as_str()) {
            let sight = |name: &str| VclInUse { name: name.to_owned(), since: now, at_connect: is_first };
            self.memory.sight = active.map(sight);
        }
    }

    async fn replace(
        &mut self,
        port: &mut ManagementPort,
        content: &FleetContent,
        vcl: &FleetVcl,
        (listed, cause): (&mut Vec<ListedVcl>, ReplaceCause),
    ) -> Result<(), ManagementError> {
        let before = self.memory.sight.as_ref().map(|sight| sight.name.clone()).unwrap_or_default();
        if cause == ReplaceCause::Hand {
            tracing::warn!(node = %self.id, in_use = before, "another VCL is in use; ours is put back");
        }
        match self.put_in_use(port, content, vcl, listed).await {
            Ok(is_compiled) => {
                tracing::info!(node = %self.id, vcl = vcl.name, before, compiled = is_compiled, "a VCL is pushed");
                self.metrics(|metrics| {
                    if is_compiled { &metrics.compiled } else { &metrics.reused }.inc();
                    if cause != ReplaceCause::Old {
                        metrics.drifts.inc();
                    }
                });
                if let Some(aim) = &mut self.memory.aim {
                    match cause {
                        ReplaceCause::Old => {}
                        ReplaceCause::Hand => aim.over_hands += 1,
                        ReplaceCause::Peer => aim.over_peers += 1,
                    }
                }
                self.memory.previous = Some(before).filter(|before| before.starts_with(PREFIX));
                let now = Instant::now();
                self.memory.sight = Some(VclInUse { name: vcl.name.clone(), since: now, at_connect: false });
                *listed = self.tidy_up(port).await?;
                self.is_in_place(listed);
                Ok(())
            }
            Err(VclNotUsed::Port(error)) => {
                self.metrics(|metrics| metrics.failed.inc());
                Err(error)
            }
            Err(error) => {
                let now = Instant::now();
                let (state, pause) = match error {
                    VclNotUsed::Refused(_) => {
                        self.memory.refusals += 1;
                        self.metrics(|metrics| metrics.refused.inc());
                        let share = 0.5 + fastrand::f64() / 2.0;
                        (VclState::Refused, REFUSED.pause(self.memory.refusals, share))
                    }
                    VclNotUsed::Unwell => (VclState::Unwell, LOOK),
                    VclNotUsed::Crowded(_) | VclNotUsed::Port(_) => (VclState::Pending, LOOK),
                };
                self.memory.next_try = Some(now + pause);
                self.complain(state, &error.to_string());
                self.show(state, &list(port).await?);
                Ok(())
            }
        }
    }

    /// Loads a VCL if it is not there, waits until it may be used, and uses it. Returns whether it was compiled.
    async fn put_in_use(
        &mut self,
        port: &mut ManagementPort,
        content: &FleetContent,
        vcl: &FleetVcl,
        listed: &[ListedVcl],
    ) -> Result<bool, VclNotUsed> {
        let there = listed.iter().find(|known| is_available(known) && known.name == vcl.name);
        if there.is_none() {
            self.make_room(port, listed).await?;
            if self.memory.compiled.len() == BURST {
                self.memory.compiled.pop_front();
            }
            self.memory.compiled.push_back(Instant::now());
            port.set_timeout(COMPILE);
            let loaded = port.load(&vcl.name, &vcl.text).await;
            port.set_timeout(STEP);
            match loaded {
                Ok(_) => {}
                // Another clearcoat was faster: it has the same content.
                Err(ManagementError::Refused { text, .. }) if text.contains("Already a VCL") => {}
                Err(error) => return Err(error.into()),
            }
        } else if there.is_some_and(|known| !known.is_warm) {
            port.command(&["vcl.state", &vcl.name, "warm"]).await?;
        }
        self.wait_for_backends(port, content, vcl).await?;
        port.command(&["vcl.use", &vcl.name]).await?;
        // Not warm for good: it is cooled when it is not in use any more, also by whoever comes after us.
        port.command(&["vcl.state", &vcl.name, "auto"]).await?;
        Ok(there.is_none())
    }

    /// Discards what is neither in use nor was before, so that there is room for one more.
    async fn make_room(&self, port: &mut ManagementPort, listed: &[ListedVcl]) -> Result<(), VclNotUsed> {
        for old in self.superfluous(listed) {
            self.attempt(port, &["vcl.discard", &old]).await?;
        }
        let left =
            list(port).await?.iter().filter(|vcl| vcl.status == "discarded" && vcl.name.starts_with(PREFIX)).count();
        if left > MOST_DISCARDED { Err(VclNotUsed::Crowded(left)) } else { Ok(()) }
    }

    /// VCLs of ours that nobody needs.
    fn superfluous(&self, listed: &[ListedVcl]) -> Vec<String> {
        let labelled: BTreeSet<&str> =
            listed.iter().filter(|vcl| vcl.label.is_some()).map(|vcl| vcl.name.as_str()).collect();
        let is_kept = |name: &str| labelled.contains(name) || self.memory.previous.as_deref() == Some(name);
        let ours = listed.iter().filter(|vcl| is_available(vcl) && vcl.name.starts_with(PREFIX));
        ours.filter(|vcl| vcl.status != "active" && !is_kept(&vcl.name)).map(|vcl| vcl.name.clone()).collect()
    }

    /// Cools the one that was in use before, and discards all others of ours. Returns what is loaded then.
    async fn tidy_up(&self, port: &mut ManagementPort) -> Result<Vec<ListedVcl>, ManagementError> {
        let listed = list(port).await?;
        if let Some(previous) = &self.memory.previous {
            self.attempt(port, &["vcl.state", previous, "cold"]).await?;
        }
        for old in self.superfluous(&listed) {
            self.attempt(port, &["vcl.discard", &old]).await?;
        }
        list(port).await
    }

    /// A command that may come too late: somebody else has discarded that VCL meanwhile, uses it, or has put a label to it.
    async fn attempt(&self, port: &mut ManagementPort, words: &[&str]) -> Result<(), ManagementError> {
        match port.command(words).await {
            Err(ManagementError::Refused { text, .. }) => {
                tracing::debug!(node = %self.id, command = words.join(" "), text, "varnishd refuses");
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// Waits until Varnish finds those web nodes well that we do.
    async fn wait_for_backends(
        &self,
        port: &mut ManagementPort,
        content: &FleetContent,
        vcl: &FleetVcl,
    ) -> Result<(), VclNotUsed> {
        let names: Vec<(&NodeId, &str)> = content.web_nodes().collect();
        if names.is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        let pattern = format!("{}.*", vcl.name);
        loop {
            let answer = port.command(&["backend.list", &pattern]).await?;
            let (mut well, mut ill) = (BTreeSet::new(), BTreeSet::new());
            for backend in parse_backends(&answer.text) {
                if let Some((_, name)) = backend.name.split_once('.') {
                    if backend.is_sick { &mut ill } else { &mut well }.insert(name.to_owned());
                }
            }
            // Of a fleet so large that varnishd cuts the list, those are judged that it names.
            let is_awaited = |name: &str| !well.contains(name) && (ill.contains(name) || !answer.is_truncated);
            let fleet = self.context.around.fleet.load();
            let is_up = |id: &NodeId| fleet.web.get(id).is_some_and(|member| member.health == Health::Up);
            let mut missed = names.iter().filter(|(id, name)| is_awaited(name) && is_up(id));
            let has_any = names.iter().any(|(_, name)| well.contains(*name));
            if has_any && (missed.next().is_none() || began.elapsed() >= WELL) {
                return Ok(());
            }
            if began.elapsed() >= WELL {
                return Err(VclNotUsed::Unwell);
            }
            sleep(WELL_LOOK).await;
        }
    }

    fn is_in_place(&mut self, listed: &[ListedVcl]) {
        self.memory.said.clear();
        (self.memory.refusals, self.memory.next_try) = (0, None);
        self.show(VclState::InPlace, listed);
    }

    /// Another VCL than ours is in use, and it is not yet time to replace it, or it was tried and is tried again later.
    fn wait_in_place(&mut self, cause: ReplaceCause, listed: &[ListedVcl]) {
        let shown = self.context.push.of(&self.id).unwrap_or_default();
        let is_tried = self.memory.next_try.is_some();
        if cause != ReplaceCause::Old && !is_tried {
            let name = self.memory.sight.as_ref().map(|sight| sight.name.clone()).unwrap_or_default();
            self.complain(VclState::Pending, &format!("another VCL is in use, {name}"));
        }
        self.show(if is_tried { shown.state } else { VclState::Pending }, listed);
    }

    /// Shows how it stands; what is wrong stays in its words as long as it is not in place.
    fn show(&self, state: VclState, listed: &[ListedVcl]) {
        let loaded = listed.iter().filter(|vcl| vcl.name.starts_with(PREFIX) && vcl.label.is_none()).count();
        let vcl = NodeVcl {
            state,
            wanted: self.memory.aim.as_ref().map(|aim| aim.name.clone()),
            in_use: self.memory.sight.as_ref().map(|sight| sight.name.clone()),
            loaded,
            problem: self.memory.said.as_str().into(),
        };
        self.metrics(|metrics| {
            metrics.outdated.set(i64::from(state != VclState::InPlace));
            metrics.loaded.set(i64::try_from(loaded).unwrap_or(i64::MAX));
        });
        self.context.push.set(&self.id, vcl);
    }

    /// Says what is wrong, in the log once as long as the words are the same.
    fn complain(&mut self, state: VclState, words: &str) {
        let words = in_a_line(words);
        if self.memory.said != words {
            tracing::warn!(node = %self.id, error = words, "the VCL of a Varnish is not the one that it should be");
            self.memory.said = words;
        }
        let shown = self.context.push.of(&self.id).unwrap_or_default();
        let problem = self.memory.said.as_str().into();
        self.context.push.set(&self.id, NodeVcl { state, problem, ..shown });
    }

    fn metrics(&self, count: impl FnOnce(&VclMetrics)) {
        // One that has left has no series any more, and none is made anew.
        if self.context.around.fleet.load().varnish.get(&self.id).is_none() {
            return;
        }
        let node = self.context.around.metrics.node(Role::Varnish, &self.id);
        if let Some(metrics) = node.vcl() {
            count(metrics);
        }
    }
}

async fn list(port: &mut ManagementPort) -> Result<Vec<ListedVcl>, ManagementError> {
    Ok(parse_vcls(&port.command(&["vcl.list"]).await?.text))
}

/// It is a program that is loaded, and not on its way out.
fn is_available(vcl: &ListedVcl) -> bool {
    vcl.label.is_none() && vcl.status != "discarded"
}

/// Words of others in one line, and not too many of them.
fn in_a_line(words: &str) -> String {
    let line = words.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(MAX_WORDS).collect()
}
