//! The VCL of each Varnish, pushed to its management port (`[vcl]`).
//!
//! Nothing of it is needed for what clearcoat promises: a VCL that is rendered once does, as long as the origin listeners keep their
//! addresses. Where they do not, or where no page is to pass clearcoat on its way into a cache, the VCL has to follow.
//!
//! **One task for each Varnish** ([`node`]) keeps a connection to its management port open. A varnishd that ends closes it, so a
//! restart is noticed at once and not at the next look; the new one is connected to as soon as it listens. Each second the task
//! asks which VCL is in use, and compares that with the one that should be: what it has pushed once proves nothing, because an
//! operator, a deployment or a restart may have put another one in its place since.
//!
//! **The name of a VCL is a hash of its content** ([`crate::varnish::fleet_vcl`]), and health is no part of it. So what is in use is
//! compared by name, a restart of clearcoat pushes nothing, and several clearcoats want the same VCL by the same name: whoever comes
//! second finds it in use.
//!
//! **A VCL is used once its backends are well.** It is loaded beside the one in use, and Varnish probes its backends at once; it is used
//! when all that clearcoat itself finds well have passed, or after a moment, if any has. If none has, the old one stays: a Varnish that
//! does not reach the web nodes, because a firewall is in the way, say, is not switched over to 503.
//!
//! **What is refused** leaves everything as it is, is shown with the compiler's words, and is tried again with the next change, and
//! with pauses that grow: a vmod may have been installed, a disk emptied.
//!
//! **At most three VCLs of ours are loaded**: the one in use, the one before, which is cold (so that its probes end, and a node that
//! comes and goes costs no compiler), and one that is being loaded. Others are discarded; none that is in use, or has a label. varnishd
//! itself keeps a discarded one until the last request and the last idle thread (after a minute) have let it go; with too many of those
//! nothing is loaded until some are gone.
//!
//! **Several clearcoats do not fight** ([`decision`]). All want the same as soon as they know the same. What each does when they do not
//! follows from its rank, the place of its `replica.id` among those that confirm purges: a change is pushed by the first, and by the
//! next ones a second later each if it has not been by then. What another one has put in place *after* our own last change is put back by
//! the first alone, and only after ten seconds, if it knows the fleet of now; by the second after a minute. The first does it three times for one
//! content, the second twice, so there is an end also where two are configured differently. Two that do not see each other are the
//! first both, and change it six times. (A lock in etcd would be exact, but not there where there is no etcd, and would have to be
//! broken when its holder hangs.)
//!
//! **Whom we prove our secret to.** The proof is a hash over a challenge, and whoever we connect to chooses that: one who can make us
//! connect to himself can hand on the challenge of another varnishd that has the same secret, and is then let in there. Who manages a
//! varnishd can have it run anything (`cc_command`). So we connect where the configuration says alone: to the `management` of a
//! `[[node]]`, or to `health.varnish.management_port` at the address of one. A secret of its own for each node would not mend that for
//! nodes of a registry: who may write a record may name that very node. So those are left alone unless their address lies in
//! `vcl.trusted_networks`, by which an operator says that whoever may register a node there may manage Varnish.

mod content;
mod decision;
mod follow;
mod node;
mod place;

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::watch;

use crate::config::{Config, HealthChecks, StaticNode, VclPushing};
use crate::fleet::{NodeId, Snapshot};
use crate::telemetry::Metrics;

/// What of the configuration it depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct PushSettings {
    vcl: VclPushing,
    /// `origin.listen`, in place of origins that are not named.
    origin_listen: Vec<std::net::SocketAddr>,
    ignored_query: Vec<String>,
    nodes: Vec<StaticNode>,
    health: HealthChecks,
}

impl PushSettings {
    /// Those of this configuration.
    pub fn of(config: &Config) -> Self {
        PushSettings {
            vcl: config.vcl.clone(),
            origin_listen: config.origin.listen.clone(),
            ignored_query: config.edge.hash_ignore_query.clone(),
            nodes: config.nodes.clone(),
            health: config.health.clone(),
        }
    }
}

/// What this clearcoat is among several, now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PushTurn {
    /// How many before it may push.
    pub rank: u32,
    /// It knows the fleet as it is now, and not as it was when its registry was last there.
    pub is_informed: bool,
}

/// The dependencies.
pub struct VclPushContext {
    /// The nodes.
    pub fleet: Arc<ArcSwap<Snapshot>>,
    /// Turns true when the nodes of the start are known.
    pub listed: watch::Receiver<bool>,
    /// The configuration, which may change.
    pub settings: watch::Receiver<Arc<PushSettings>>,
    /// Whose turn it is.
    pub turn: Box<dyn Fn() -> PushTurn + Send + Sync>,
    /// Counts pushes.
    pub metrics: Arc<Metrics>,
}

/// How it stands with the VCL of a Varnish.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum VclState {
    /// It uses the one that it should.
    InPlace,
    /// It will soon.
    #[default]
    Pending,
    /// varnishd does not take it.
    Refused,
    /// None of the web nodes is well as that Varnish sees them.
    Unwell,
    /// Its management port does not answer.
    Unreachable,
    /// It uses one of another clearcoat, which sees another fleet or has another configuration.
    LeftToPeer,
    /// Its management port is not known, or not believed.
    NotManaged,
}

/// The VCL of a Varnish, as it is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NodeVcl {
    /// How it stands.
    pub state: VclState,
    /// The name of the one that it should use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wanted: Option<String>,
    /// The name of the one that it uses, when it was last asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_use: Option<String>,
    /// How many of ours were loaded then.
    pub loaded: usize,
    /// What is wrong, in words; empty if nothing is.
    pub problem: Arc<str>,
}

/// What is known of all, for those who show it.
#[derive(Debug, Default)]
pub struct VclPush {
    nodes: Mutex<BTreeMap<NodeId, NodeVcl>>,
    /// Why there is nothing to push.
    problem: Mutex<Option<Arc<str>>>,
}

impl VclPush {
    /// The VCL of this Varnish; `None` while nothing is pushed.
    pub fn of(&self, id: &NodeId) -> Option<NodeVcl> {
        self.nodes.lock().get(id).cloned()
    }

    /// Why there is nothing to push, or the last of what there was goes on.
    pub fn problem(&self) -> Option<Arc<str>> {
        self.problem.lock().clone()
    }

    /// Pushes for as long as the process runs.
    pub async fn run(self: Arc<Self>, context: VclPushContext) {
        follow::FleetFollower::new(self, context).run().await;
    }

    fn set(&self, id: &NodeId, vcl: NodeVcl) {
        self.nodes.lock().insert(id.clone(), vcl);
    }

    fn keep_only(&self, keeps: impl Fn(&NodeId) -> bool) {
        self.nodes.lock().retain(|id, _| keeps(id));
    }
}
