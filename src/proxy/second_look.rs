//! The retries after a stale answer: no client gets it while a fresh one is available.
//!
//! The cache gets the purges of the page again, and is asked again once it has acknowledged them: this is usually the
//! fastest way to a fresh page, which is then cached again. If that fails, another cache is asked, then a web node past
//! the caches, within the limits for that (`when_all_behind`, `bypass_max_requests_per_node`). If no web node may be
//! asked, the edge tries every cache that may serve, and then serves a stale answer rather than fail, and counts it, as
//! it does when every cache is behind.
//!
//! The request keeps its place at its cache while that is told. A place at another one it takes as any request does, if need be
//! after a wait in the queue, where nobody who can use other nodes only is before it.

use std::sync::Arc;

use super::client::Client;
use super::failure::Failure;
use super::frontend::PastCaches;
use super::node_choice;
use super::node_permit::NodePermit;
use super::request::Request;
use crate::balance::LbContext;
use crate::fleet::{Node, Role};
use crate::seal::StalePage;

/// The number of caches that are asked, each twice, before a web node. If no web node may be asked, all caches are.
const MAX_CACHES: usize = 2;

/// The retries of one request so far.
#[derive(Debug, Default)]
pub(super) struct SecondLook {
    /// The caches that got the purges again, each with the id of the page whose ban it acknowledged, if it was asked
    /// again.
    told: Vec<(Arc<Node>, Option<u64>)>,
    /// A web node was asked.
    went_past: bool,
}

/// The next node to ask.
#[derive(Debug)]
pub(super) enum NextLook {
    /// Ask this node.
    Node(NodePermit),
    /// Ask this node, and accept its answer however old it is.
    AsItIs(NodePermit),
}

impl SecondLook {
    /// The node to ask after that of `permit` returned this stale page. If it is the same node, waits until it has acknowledged
    /// the purges. Fails if the request cannot be repeated: a cache discards the body of a GET and looks the page up
    /// all the same, so the body is gone. The purges are sent even then, since the client may retry.
    pub(super) async fn after(
        &mut self,
        client: &mut Client,
        request: &mut Request,
        permit: NodePermit,
        (page, is_repeatable): (Box<StalePage>, bool),
        lb: LbContext,
    ) -> Result<NextLook, Failure> {
        let told_before = self.told.iter().find(|(told, _)| told.endpoint_id == permit.endpoint_id);
        match (&client.frontend.freshness, told_before) {
            (Some(freshness), Some((_, dropped))) if dropped.is_some() && *dropped == page.seal_id() => {
                freshness.record_kept(permit.id(), &page);
            }
            (Some(freshness), None) => {
                // Only a ban that was sent after the page was seen says that it is gone.
                let id = page.seal_id().filter(|_| page.awaited_delivery().is_none());
                let is_asked_again = freshness.refresh(permit.id(), StalePage::clone(&page)).await && is_repeatable;
                self.told.push((Arc::clone(permit.node()), id.filter(|_| is_asked_again)));
                if is_asked_again {
                    return Ok(NextLook::Node(permit));
                }
            }
            _ => {}
        }
        if !is_repeatable {
            return Err(Failure::Stale(page));
        }
        self.elsewhere(client, request, permit, page, lb).await
    }

    /// Another cache, or a web node past the caches.
    async fn elsewhere(
        &mut self,
        client: &mut Client,
        request: &mut Request,
        permit: NodePermit,
        page: Box<StalePage>,
        lb: LbContext,
    ) -> Result<NextLook, Failure> {
        let told = self.told();
        loop {
            let past = {
                let (fleet, queue) = (client.worker.shared.fleet.load(), &client.worker.queue);
                let select = &client.frontend.select;
                if self.told.len() < MAX_CACHES
                    && let Ok(other) = select.pick(&fleet, lb, &told)
                    && other.node.spec.role() == Role::Varnish
                    && let Some(other) = queue.permit_at(other)
                {
                    return Ok(NextLook::Node(other));
                }
                select.past_caches(&fleet, lb, &told, &permit)
            };
            match past {
                PastCaches::Web(web) => {
                    // Another request may have taken its last place: then it is decided again.
                    if let Some(web) = client.worker.queue.permit_at(web) {
                        self.went_past = true;
                        return Ok(NextLook::Node(web));
                    }
                }
                PastCaches::Cache => {
                    // Nobody has a place at one node while he waits for another.
                    drop(permit);
                    return node_choice::choose(client, request, lb, &told).await.map(NextLook::Node);
                }
                PastCaches::Serve { is_counted } => {
                    if !is_counted {
                        client.worker.shared.metrics.stale_served.inc();
                    }
                    return Ok(NextLook::AsItIs(permit));
                }
                PastCaches::Refuse => return Err(Failure::Stale(page)),
            }
        }
    }

    /// The web node to ask if the last candidate cache fails after a stale answer.
    pub(super) fn after_failure(&mut self, client: &Client, failed: &Node, lb: LbContext) -> Option<NodePermit> {
        if self.told.is_empty() || self.went_past {
            return None;
        }
        let fleet = client.worker.shared.fleet.load();
        let past = client.frontend.select.past_caches(&fleet, lb, &self.told(), failed);
        let PastCaches::Web(web) = past else { return None };
        let web = client.worker.queue.permit_at(web)?;
        self.went_past = true;
        Some(web)
    }

    fn told(&self) -> Vec<u64> {
        self.told.iter().map(|(node, _)| node.endpoint_id).collect()
    }
}
