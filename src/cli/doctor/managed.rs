//! What the management port of a varnishd says, and what follows from that.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::finding::Finding;
use super::parameters::{ParameterContext, judge};
use crate::clock;
use crate::telemetry::causes;
use crate::varnish::cli_text::{
    ListedBackend, ListedBan, Parameters, parse_backends, parse_banner, parse_bans, parse_panic, parse_parameters,
    parse_pids, parse_ping, parse_status, parse_vcls,
};
use crate::varnish::management::{ManagementError, ManagementPort};

/// For connecting, and for each answer.
const STEP: Duration = Duration::from_millis(1500);

/// With more bans than this to be worked off, each hit on an old page costs noticeably.
const MANY_BANS: usize = 1000;

/// Bans that are to be worked off for longer than this stay because something keeps the lurker from them.
const OLD_BAN: Duration = Duration::from_secs(3600);

/// Where a varnishd is managed.
#[derive(Clone, Debug)]
pub(super) struct ManagementAccess {
    /// `HOST:PORT`.
    pub(super) address: String,
    pub(super) secret_file: Option<PathBuf>,
}

/// What it says.
#[derive(Debug, Default)]
pub(super) struct ManagedVarnish {
    version: Option<String>,
    is_running: Option<bool>,
    worker: Option<u32>,
    /// How far its clock is ahead of ours, in seconds.
    pub(super) clock_ahead: Option<i64>,
    parameters: Parameters,
    panic: Option<String>,
    /// The name of the active VCL.
    vcl: Option<String>,
    vcl_text: Option<String>,
    backends: Vec<ListedBackend>,
    bans: Vec<ListedBan>,
    /// Commands whose answers were cut.
    truncated: Vec<&'static str>,
}

/// Why it said nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotManaged {
    #[error("{} cannot be read", .0.display())]
    Secret(PathBuf, #[source] std::io::Error),
    #[error(transparent)]
    Port(#[from] ManagementError),
}

impl ManagedVarnish {
    /// Asks everything.
    pub(super) async fn ask(access: &ManagementAccess) -> Result<Self, NotManaged> {
        let secret = match access.secret_file.as_deref() {
            Some(file) => Some(read_secret(file).await?),
            None => None,
        };
        let mut port = ManagementPort::connect(access.address.as_str(), secret.as_deref(), STEP).await?;
        let mut said = ManagedVarnish::default();
        // First what the manager knows: a worker that hangs answers nothing, and then neither does the manager.
        let text = said.text(&mut port, "ping", None).await?;
        said.clock_ahead = parse_ping(&text).map(seconds_ahead);
        said.version = parse_banner(&said.text(&mut port, "banner", None).await?).map(str::to_owned);
        said.is_running = parse_status(&said.text(&mut port, "status", None).await?);
        said.worker = parse_pids(&said.text(&mut port, "pid", None).await?).and_then(|(_, worker)| worker);
        said.parameters = parse_parameters(&said.text(&mut port, "param.show", None).await?);
        said.panic = parse_panic(&said.text(&mut port, "panic.show", None).await?);
        let vcls = parse_vcls(&said.text(&mut port, "vcl.list", None).await?);
        said.vcl = vcls.into_iter().find(|vcl| vcl.status == "active").map(|vcl| vcl.name);
        if let Some(name) = said.vcl.clone() {
            said.vcl_text = Some(said.text(&mut port, "vcl.show", Some(&name)).await?);
        }
        said.backends = parse_backends(&said.text(&mut port, "backend.list", None).await?);
        said.bans = parse_bans(&said.text(&mut port, "ban.list", None).await?);
        Ok(said)
    }

    /// The text of an answer; empty if varnishd refuses the command: it has no panic to show, or no worker to ask.
    async fn text(
        &mut self,
        port: &mut ManagementPort,
        command: &'static str,
        of: Option<&str>,
    ) -> Result<String, ManagementError> {
        let words: Vec<&str> = std::iter::once(command).chain(of).collect();
        match port.command(&words).await {
            Ok(answer) => {
                self.truncated.extend(answer.is_truncated.then_some(command));
                Ok(answer.text)
            }
            Err(ManagementError::Refused { .. }) => Ok(String::new()),
            Err(error) => Err(error),
        }
    }

    /// Whose VCL it is.
    pub(super) fn vcl_kind(&self) -> Option<&'static str> {
        let text = self.vcl_text.as_deref().filter(|text| !text.is_empty())?;
        Some(if text.contains("/.clearcoat/probe") {
            "clearcoat's"
        } else if !text.contains("X-Magento-Tags-Pattern") {
            "one that knows nothing of X-Magento-Tags-Pattern"
        } else if text.contains("xkey.purge") || text.contains("xkey.softpurge") {
            "one that takes X-Magento-Tags-Pattern apart and purges by key, as elgentos' does"
        } else {
            "Magento's, or one made of it"
        })
    }

    /// What follows from that.
    pub(super) fn findings(&self, context: &ParameterContext) -> Vec<Finding> {
        let mut findings = vec![self.facts()];
        if self.is_running == Some(false) {
            let change =
                "`varnishadm start`; if it ends again, `varnishadm panic.show` and the log of varnishd say why";
            let why = "Nothing is served from this Varnish.";
            findings.push(Finding::error("worker-stopped", "its worker process does not run").why(why).change(change));
        }
        if let Some(panic) = &self.panic {
            let why = "With each panic its cache is empty, and requests under way are cut.";
            let change = "upgrade varnishd, or report it with `varnishadm panic.show`; then `varnishadm panic.clear`";
            findings.push(
                Finding::warning("panicked", format!("its worker has panicked: {panic}")).why(why).change(change),
            );
        }
        let sick = self.backends.iter().filter(|backend| backend.is_sick && self.is_active(&backend.name));
        findings.extend(sick.map(|backend| {
            let why = "Varnish fetches nothing from it; of all backends: pages are served from grace, then 503.";
            let change = "let this machine reach clearcoat's origin listener; `varnishadm backend.list -p` says what its probe \
                          sees, and `varnishadm backend.set_health NAME auto` takes back what was set by hand";
            Finding::warning("backend-sick", format!("its backend {} is sick", backend.name)).why(why).change(change)
        }));
        findings.extend(self.ban_findings());
        findings.extend(judge(&self.parameters, context));
        if !self.truncated.is_empty() {
            let what = format!(
                "varnishd has cut its answers to {} at cli_limit: what follows is not known",
                self.truncated.join(", ")
            );
            findings.push(Finding::info("truncated", what).change("`varnishadm param.set cli_limit 16m`"));
        }
        findings
    }

    fn is_active(&self, backend: &str) -> bool {
        self.vcl.as_deref().is_some_and(|vcl| backend.split_once('.').is_some_and(|(of, _)| of == vcl))
    }

    fn to_work_off(&self) -> impl Iterator<Item = &ListedBan> {
        self.bans.iter().filter(|ban| !ban.is_completed)
    }

    /// The age of the oldest ban that is to be worked off, by the clock of varnishd.
    fn oldest(&self) -> Option<Duration> {
        let now = (clock::now_ms() / 1000).checked_add_signed(self.clock_ahead.unwrap_or(0))?;
        let oldest = self.to_work_off().map(|ban| ban.added).reduce(f64::min)?;
        // Varnish's clock and its answer to `ping` are rounded apart.
        Duration::try_from_secs_f64((now as f64 - oldest).max(0.0)).ok()
    }

    /// The list begins with the newest, so what was cut off is older still.
    fn has_cut_bans(&self) -> bool {
        self.truncated.contains(&"ban.list")
    }

    /// How many are to be worked off, and for how long the oldest of them is; `None` if there is none.
    fn work(&self) -> Option<String> {
        let age = humantime::format_duration(Duration::from_secs(self.oldest()?.as_secs()));
        let least = if self.has_cut_bans() { "at least " } else { "" };
        let count = self.to_work_off().count();
        Some(format!("{least}{count} bans are to be worked off, the oldest for {least}{age}"))
    }

    fn ban_findings(&self) -> Option<Finding> {
        let (count, oldest) = (self.to_work_off().count(), self.oldest().unwrap_or_default());
        let what = self.work().filter(|_| count > MANY_BANS || oldest > OLD_BAN || self.has_cut_bans())?;
        let why =
            "A page is tested against every ban that is newer than its last test: hits cost CPU, and the list grows.";
        let change = "ban on obj.* alone, as the VCL of `clearcoat vcl` does: bans on req.* stay until the last page before them is \
                      gone; see ban_lurker_sleep and ban_lurker_age; delivery = \"xkey\" needs no bans";
        Some(Finding::warning("bans-pile-up", what).why(why).change(change))
    }

    /// What is known of it, in a line.
    fn facts(&self) -> Finding {
        let version = self.version.as_deref().unwrap_or("a varnishd of an unknown version");
        let worker = self.worker.map_or_else(|| "no worker".to_owned(), |pid| format!("worker {pid}"));
        let vcl = self.vcl.as_deref().unwrap_or("unknown");
        let kind = self.vcl_kind().map(|kind| format!(" ({kind})")).unwrap_or_default();
        let work = self.work().map(|work| format!("; {work}")).unwrap_or_default();
        Finding::info("varnishd", format!("{version}, {worker}; VCL {vcl}{kind}{work}"))
    }
}

impl NotManaged {
    /// What to say of it.
    pub(super) fn finding(&self, access: &ManagementAccess) -> Finding {
        let at = &access.address;
        let file = access.secret_file.as_deref().map_or_else(|| "none".to_owned(), |file| file.display().to_string());
        let secret = format!(
            "management_secret_file (now {file}): a copy of the file of varnishd's -S, or of _.secret in its folder (-n), that the \
             user of doctor may read"
        );
        let (name, change) = match self {
            NotManaged::Secret(..) | NotManaged::Port(ManagementError::NoSecret | ManagementError::WrongSecret) => {
                ("management-secret", secret)
            }
            NotManaged::Port(ManagementError::Timeout(_)) => {
                ("management-silent", "look whether varnishd, its worker or its machine hangs".to_owned())
            }
            NotManaged::Port(_) => (
                "management-unreachable",
                format!("start varnishd with -T {at}, or change `management` in its [[node]]"),
            ),
        };
        let what = format!("its management port {at} says nothing: {}", causes(self));
        let why = "Its parameters, bans, panics and its VCL could not be looked at.";
        Finding::warning(name, what).why(why).change(change)
    }
}

/// Whoever waits for this has a limit: a file may be a pipe, or on a volume that hangs.
async fn read_secret(file: &Path) -> Result<Vec<u8>, NotManaged> {
    let unreadable = |error| NotManaged::Secret(file.to_owned(), error);
    let wanted = file.to_owned();
    let read = tokio::task::spawn_blocking(move || std::fs::read(wanted)).await;
    read.map_err(std::io::Error::other).and_then(|read| read).map_err(unreadable)
}

/// By how much a clock is ahead of ours that says this, in seconds since 1970.
pub(super) fn seconds_ahead(theirs: u64) -> i64 {
    let signed = |seconds: u64| i64::try_from(seconds).unwrap_or(i64::MAX);
    signed(theirs) - signed(clock::now_ms() / 1000)
}
