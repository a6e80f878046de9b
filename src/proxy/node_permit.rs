//! A place at a node: the request counts there from the choice of the node until its answer has ended, whatever ends it.
//!
//! A tunnel and an event stream count as long as they last, as HAProxy counts them (`maxconn`): what a node's limit is there to protect, a
//! PHP worker or a thread, is theirs for as long.

use std::fmt;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::frontend::{NoNode, NodeChoice, Select};
use super::request_queue::{QueueFull, QueueTicket, RequestQueue};
use crate::balance::LbContext;
use crate::fleet::{Node, Role, Snapshot};

/// A worker's way to the queue. Workers count their own handles, as a count of all would be written by all for each request.
#[derive(Debug)]
pub(super) struct WorkerQueue(Arc<RequestQueue>);

/// A request that is counted at a node. Frees the place when dropped.
pub(super) struct NodePermit {
    node: Arc<Node>,
    queue: Rc<WorkerQueue>,
}

/// A request that waits in the queue. It leaves when this is dropped.
#[derive(Debug)]
pub(super) struct QueuedRequest {
    ticket: QueueTicket,
    queue: Rc<WorkerQueue>,
}

impl WorkerQueue {
    pub(super) fn new(queue: Arc<RequestQueue>) -> Self {
        WorkerQueue(queue)
    }

    /// Chooses a node with room for a request.
    ///
    /// # Errors
    /// If there is none, or others wait for room.
    pub(super) fn permit(
        self: &Rc<Self>,
        select: &dyn Select,
        fleet: &Snapshot,
        lb: LbContext,
        tried: &[u64],
    ) -> Result<NodePermit, NoNode> {
        self.0.take(select, fleet, lb, tried).map(|node| NodePermit { node, queue: Rc::clone(self) })
    }

    /// A place at a node that was chosen; `None` if it has no room any more.
    pub(super) fn permit_at(self: &Rc<Self>, choice: NodeChoice) -> Option<NodePermit> {
        self.0.count(choice).map(|node| NodePermit { node, queue: Rc::clone(self) })
    }

    /// Joins the queue of this listener.
    ///
    /// # Errors
    /// If the queue is as long as it may be.
    pub(super) fn join(self: &Rc<Self>, role: Role, tried: &[u64], lb: LbContext) -> Result<QueuedRequest, QueueFull> {
        self.0.join(role, tried, lb).map(|ticket| QueuedRequest { ticket, queue: Rc::clone(self) })
    }

    /// Notes that a request of this listener has waited for as long as it may.
    pub(super) fn note_timeout(&self, role: Role) {
        self.0.note_timeout(role);
    }

    /// Serves those who wait, as a node may have room of which nobody was told.
    pub(super) fn serve(&self) {
        self.0.serve();
    }
}

impl QueuedRequest {
    /// Ready with a place at a node.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<NodePermit> {
        self.ticket.poll(cx).map(|node| NodePermit { node, queue: Rc::clone(&self.queue) })
    }
}

impl NodePermit {
    /// The node.
    pub(super) fn node(&self) -> &Arc<Node> {
        &self.node
    }
}

impl Deref for NodePermit {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}

impl Drop for NodePermit {
    fn drop(&mut self) {
        self.queue.0.end_request(&self.node);
    }
}

impl fmt::Debug for NodePermit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("NodePermit").field(self.node.id()).finish()
    }
}
