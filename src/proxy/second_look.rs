//! What follows a stale answer: no client sees it while anybody has a fresh one.
//!
//! The cache is told once more of what was purged, and asked again when it has acknowledged that: most often it is the
//! quickest way to a fresh page, and the page is then cached again. If that fails, another cache is asked, then a web node
//! past the caches, as far as they may be (`when_all_behind`, `bypass_max_requests_per_node`). Beyond that the edge serves
//! rather than fails, and says so: as it does when every cache is behind. Before that each cache that may serve was asked.

use std::sync::Arc;

use super::Frontend;
use super::client::Client;
use super::failure::Failure;
use super::frontend::{NoNode, PastCaches};
use crate::balance::LbContext;
use crate::fleet::{Node, Role};
use crate::seal::StalePage;

/// How many caches are asked, each twice, before a web node. If none may be asked, all are.
const MAX_CACHES: usize = 2;

/// The looks of one request, so far.
#[derive(Debug, Default)]
pub(super) struct SecondLook {
    /// The caches that were told once more, each with the page that it acknowledged to have dropped, by its id.
    told: Vec<(Arc<Node>, Option<u64>)>,
    /// A web node was asked.
    went_past: bool,
}

/// Where to look next.
#[derive(Debug)]
pub(super) enum NextLook {
    /// At this node.
    Node(Arc<Node>),
    /// At this node, whose answer is taken however old it is.
    AsItIs(Arc<Node>),
}

impl SecondLook {
    /// Where to look after this page of this node. Waits for the node, if that is where. Nowhere if the request cannot be
    /// repeated: a cache drops the body of a GET and looks the page up all the same, and the body is gone. Then the node is told
    /// all the same, for the client may repeat it.
    pub(super) async fn after(
        &mut self,
        client: &Client,
        node: &Arc<Node>,
        page: StalePage,
        is_repeatable: bool,
        lb: LbContext,
    ) -> Result<NextLook, Failure> {
        let Frontend { freshness, select, .. } = &*client.frontend;
        let told_before = self.told.iter().find(|(told, _)| told.endpoint_id == node.endpoint_id);
        match (freshness, told_before) {
            (Some(freshness), Some((_, dropped))) if dropped.is_some() && *dropped == page.seal_id() => {
                freshness.record_kept(node.id(), &page);
            }
            (Some(freshness), None) => {
                let id = page.seal_id();
                let is_asked_again = freshness.refresh(node.id(), page).await && is_repeatable;
                self.told.push((Arc::clone(node), id.filter(|_| is_asked_again)));
                if is_asked_again {
                    return Ok(NextLook::Node(Arc::clone(node)));
                }
            }
            _ => {}
        }
        if !is_repeatable {
            return Err(Failure::NoNode(NoNode::AllBehind));
        }
        let fleet = client.worker.shared.fleet.load();
        if self.told.len() < MAX_CACHES
            && let Ok(other) = select.pick(&fleet, lb, Some(node.endpoint_id))
            && other.spec.role() == Role::Varnish
            && self.told.iter().all(|(told, _)| told.endpoint_id != other.endpoint_id)
        {
            return Ok(NextLook::Node(other));
        }
        match select.past_caches(&fleet, lb, &self.told(), node) {
            PastCaches::Web(web) => {
                self.went_past = true;
                Ok(NextLook::Node(web))
            }
            PastCaches::Cache(cache) => Ok(NextLook::Node(cache)),
            PastCaches::Serve { is_counted } => {
                if !is_counted {
                    client.worker.shared.metrics.stale_served.inc();
                }
                Ok(NextLook::AsItIs(Arc::clone(node)))
            }
            PastCaches::Refuse => Err(Failure::NoNode(NoNode::AllBehind)),
        }
    }

    /// The web node to ask if the last cache fails that could be asked after a stale answer.
    pub(super) fn after_failure(&mut self, client: &Client, failed: &Node, lb: LbContext) -> Option<Arc<Node>> {
        if self.told.is_empty() || self.went_past {
            return None;
        }
        let fleet = client.worker.shared.fleet.load();
        let past = client.frontend.select.past_caches(&fleet, lb, &self.told(), failed);
        let PastCaches::Web(web) = past else { return None };
        self.went_past = true;
        Some(web)
    }

    fn told(&self) -> Vec<u64> {
        self.told.iter().map(|(node, _)| node.endpoint_id).collect()
    }
}
