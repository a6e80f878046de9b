//! What a VCL is made of, as far as it is the same for every Varnish.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
use tokio::sync::watch;

use super::PushSettings;
use crate::config::{VclDirector, WebChecks};
use crate::fleet::{Member, NodeId, PurgeDialect, Snapshot};
use crate::varnish::fleet_vcl::{FleetBackends, FleetVcl, NoFleetVcl, VclParts, WebBackend, backend_names};
use crate::varnish::own_template::OwnTemplate;
use crate::varnish::vcl::VarnishVersion;

/// The content that counts; `None` while nothing is pushed.
pub(super) type PublishedContent = watch::Receiver<Option<Arc<FleetContent>>>;

/// What a VCL is made of, but for what depends on the Varnish.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct FleetContent {
    template: Option<Arc<OwnTemplate>>,
    allow: Vec<IpNet>,
    ignored_query: Vec<String>,
    backends: ContentBackends,
}

/// The backends of all.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum ContentBackends {
    /// The origin listeners of the clearcoats.
    Origins(BTreeSet<SocketAddr>),
    /// The web nodes, their ids and they themselves in one order.
    Web { ids: Vec<NodeId>, nodes: Vec<WebBackend>, checks: Box<WebChecks>, director: VclDirector },
}

impl ContentBackends {
    /// The web nodes that have a weight; `None` if there is none.
    pub(super) fn of_web(fleet: &Snapshot, settings: &PushSettings) -> Option<Self> {
        let members: Vec<_> = fleet.web.members().iter().filter(|member| member.node.weight > 0).collect();
        let ids: Vec<NodeId> = members.iter().map(|member| member.node.id().clone()).collect();
        let names = backend_names(&ids.iter().collect::<Vec<_>>());
        let backend = |(member, name): (&&Member, String)| WebBackend {
            name,
            address: member.node.spec.address,
            weight: member.node.weight,
        };
        let nodes: Vec<WebBackend> = members.iter().zip(names).map(backend).collect();
        let (checks, director) = (Box::new(settings.health.web.clone()), settings.vcl.director);
        (!nodes.is_empty()).then_some(ContentBackends::Web { ids, nodes, checks, director })
    }
}

impl FleetContent {
    pub(super) fn new(settings: &PushSettings, template: Option<Arc<OwnTemplate>>, backends: ContentBackends) -> Self {
        let (allow, ignored_query) = (settings.vcl.allow.clone(), settings.ignored_query.clone());
        FleetContent { template, allow, ignored_query, backends }
    }

    /// The VCL for a Varnish.
    pub(super) fn vcl(&self, version: VarnishVersion, delivery: PurgeDialect) -> Result<FleetVcl, NoFleetVcl> {
        let parts = VclParts {
            template: self.template.as_deref(),
            version,
            delivery,
            allow: &self.allow,
            ignored_query: &self.ignored_query,
        };
        let backends = match &self.backends {
            ContentBackends::Origins(origins) => FleetBackends::Origins(origins),
            ContentBackends::Web { nodes, checks, director, .. } => {
                FleetBackends::Web { nodes, checks, director: *director }
            }
        };
        FleetVcl::render(&parts, backends)
    }

    /// The ids and the names of its web nodes, if these are its backends.
    pub(super) fn web_nodes(&self) -> impl Iterator<Item = (&NodeId, &str)> {
        let (ids, nodes) = match &self.backends {
            ContentBackends::Origins(_) => (&[][..], &[][..]),
            ContentBackends::Web { ids, nodes, .. } => (&ids[..], &nodes[..]),
        };
        ids.iter().zip(nodes.iter().map(|node| node.name.as_str()))
    }
}
