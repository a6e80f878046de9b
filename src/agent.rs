//! The agent: the small process beside a web server or a Varnish that registers it.
//!
//! It is useful only if it needs no attention. So it must never cause an outage: the node starts and runs whatever etcd
//! does, and is registered when etcd is reachable. It exits with the status of the node, passes signals on and reaps
//! orphans, so that it can take the place of the node's own process in a container.
//!
//! A shutdown is not noticed because of its order:
//!
//! 1. The node's record says `drain`: clearcoat gives it no new requests. Purges still come.
//! 2. Time passes ([`AgentSettings::drain`]), so that every clearcoat has heard of it and what is under way is finished.
//! 3. The node is sent its stop signal; if it does not end in time, it is killed.
//! 4. Only now its key goes, and the lease with it.
//!
//! The key of a node that ends by itself goes at once. If the agent was killed or etcd is away, the lease runs out
//! instead.
//!
//! What the node's own check decides, and why a node that fails it stays registered, is in `check.rs`; what an epoch is, in
//! `epoch.rs`; how the VCL of a Varnish follows the clearcoats, in `origins.rs`.

mod address;
mod check;
mod child;
mod epoch;
mod observe;
mod origins;
mod publish;
mod record;
mod signals;

use std::ffi::OsString;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::config;
use crate::etcd::EtcdCluster;
use crate::fleet::{NodeId, Role};
use crate::telemetry::causes;

pub use address::Address;
pub use check::{CheckSettings, CheckUrl};
pub use epoch::Epoch;
pub use origins::VclSettings;
pub use record::Facts;
pub use rustix::process::Signal;

use child::Children;
use origins::OriginFollower;
use signals::{AgentSignals, Wish};

/// The agent's settings.
#[derive(Clone, Debug)]
pub struct AgentSettings {
    /// What the node does.
    pub role: Role,
    /// Its stable name, unique within its role.
    pub id: NodeId,
    /// Where others reach it.
    pub address: Address,
    /// Where it is registered.
    pub etcd: config::Etcd,
    /// How long its key stays without a renewal of its lease.
    pub ttl: Duration,
    /// Whether it is well.
    pub check: CheckSettings,
    /// What else there is to say of it.
    pub facts: Facts,
    /// How the epoch of its cache is found.
    pub epoch: Epoch,
    /// The VCL that follows the clearcoats, if it is ours.
    pub vcl: Option<VclSettings>,
    /// The command to run; empty if somebody else runs the node.
    pub command: Vec<OsString>,
    /// The signal that ends the command.
    pub stop_signal: Signal,
    /// How long the node goes on without new requests before it is ended.
    pub drain: Duration,
    /// How long it has to end by itself.
    pub kill_after: Duration,
}

/// The stage of the agent's own shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EndStage {
    Serving,
    Draining,
    /// The node has ended.
    Leaving,
}

/// Why a wait is over.
enum Turn {
    /// The child has ended, with this status.
    Ended(u8),
    /// We are asked to end.
    Asked,
    TimeIsUp,
}

/// Runs until the node has ended, or is no longer wanted, and gives the status to exit with.
///
/// # Errors
/// If the system refuses to report signals.
pub async fn run(settings: AgentSettings) -> io::Result<u8> {
    // Before there is a child: none is lost.
    let mut signals = AgentSignals::listen(settings.stop_signal)?;
    let mut children = Children::none()?;
    let follower = match &settings.vcl {
        Some(vcl) => tokio::select! {
            follower = OriginFollower::begin(vcl) => match follower {
                Ok(follower) => Some(follower),
                Err(no_vcl) => {
                    tracing::error!(error = %causes(&no_vcl), "there is no VCL to start varnishd with");
                    return Ok(1);
                }
            },
            () = asked_to_end(&mut signals) => return Ok(0),
        },
        None => None,
    };
    if let Err(not_started) = children.start(&settings.command) {
        tracing::error!(error = %causes(&not_started), "cannot run the command");
        return Ok(not_started.status());
    }
    let settings = Arc::new(settings);
    let etcd = Arc::new(EtcdCluster::new(&settings.etcd));
    let (sights, seen) = watch::channel(None);
    let (stage, stages) = watch::channel(EndStage::Serving);
    let child = children.pid();
    tracing::info!(role = %settings.role, id = %settings.id, child, "the agent runs");
    if let Some(follower) = follower {
        tokio::spawn(follower.follow(child.is_some()));
    }
    let of_observer = Arc::clone(&settings);
    tokio::spawn(async move { observe::observe(&of_observer, child, &sights).await });
    let (of_publisher, of_node) = (Arc::clone(&settings), seen.clone());
    let publisher = tokio::spawn(async move { publish::publish(&of_publisher, etcd, of_node, stages).await });
    let mut life = Supervisor { settings: &settings, signals, children };
    let status = life.live(|| seen.borrow().is_some(), &stage).await;
    stage.send_replace(EndStage::Leaving);
    if publisher.await.is_err() {
        tracing::error!("the key was not taken away; it goes with its lease");
    }
    tracing::info!(status, "the agent ends");
    Ok(status)
}

/// Waits until the agent is asked to end, before there is a child to pass signals to.
async fn asked_to_end(signals: &mut AgentSignals) {
    while !matches!(signals.next().await, Wish::End) {}
}

/// The node's process and the signals that ask for its end.
struct Supervisor<'a> {
    settings: &'a AgentSettings,
    signals: AgentSignals,
    children: Children,
}

impl Supervisor<'_> {
    /// From the start of the node to its end.
    async fn live(&mut self, is_known: impl Fn() -> bool, stage: &watch::Sender<EndStage>) -> u8 {
        if let Turn::Ended(status) = self.turn(None).await {
            tracing::warn!(status, "the command has ended by itself");
            return status;
        }
        stage.send_replace(EndStage::Draining);
        if is_known() {
            let drain = self.settings.drain;
            tracing::info!(?drain, "draining; a second signal cuts it short");
            if let Turn::Ended(status) = self.turn(Some(Instant::now() + drain)).await {
                return status;
            }
        }
        if self.children.pid().is_none() { 0 } else { self.end_child().await }
    }

    async fn end_child(&mut self) -> u8 {
        self.children.signal(self.settings.stop_signal);
        let mut deadline = Some(Instant::now() + self.settings.kill_after);
        loop {
            match self.turn(deadline).await {
                Turn::Ended(status) => return status,
                Turn::Asked => self.children.signal(self.settings.stop_signal),
                Turn::TimeIsUp => {
                    tracing::warn!(after = ?self.settings.kill_after, "the command does not end; it is killed");
                    self.children.kill();
                    deadline = None;
                }
            }
        }
    }

    /// Waits for something that matters. What does not is passed on meanwhile.
    async fn turn(&mut self, deadline: Option<Instant>) -> Turn {
        let time_is_up = async {
            match deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let mut time_is_up = std::pin::pin!(time_is_up);
        loop {
            tokio::select! {
                status = self.children.child_ended() => return Turn::Ended(status),
                wish = self.signals.next() => match wish {
                    Wish::End => return Turn::Asked,
                    Wish::PassOn(signal) => self.children.signal(signal),
                },
                () = &mut time_is_up => return Turn::TimeIsUp,
            }
        }
    }
}
