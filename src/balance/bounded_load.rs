//! Bounded load: a node that is much busier than the mean passes keys on (Mirrokni, Thorup and Zadimoghaddam, "Consistent
//! Hashing with Bounded Loads"; HAProxy's `hash-balance-factor`).
//!
//! **From how many requests on.** The rule alone knows no small numbers: in a fleet of three with nothing else to do, a
//! second request for a page is above 125 % of the mean, goes to another Varnish, and the page is rendered and kept
//! twice; where Varnish would have had the second one wait for the first. A node with few requests is not busy, whatever the mean is: below
//! [`BoundedLoad::from`] it takes all its keys. That also saves the question for the mean in nearly all cases.
//!
//! **By weight.** A node of twice the weight may have twice as many.
//!
//! **Overflow goes to the key's own next choice**, and so to another node for each key: a busy node does not push its
//! neighbour over the bound, and that one its neighbour, as on a ring (envoyproxy/envoy#11888; Chen, Coleman and
//! Shrivastava, "Revisiting Consistent Hashing with Bounded Loads").

use std::cell::OnceCell;

use crate::fleet::{Member, Pool};

/// When a node passes keys on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BoundedLoad {
    /// The multiple of the mean load that is too much, at least 1.
    pub factor: f64,
    /// The requests in flight that are never too much for a node.
    pub from: u32,
}

/// The bound in one decision.
pub(super) struct LoadCheck<'p, E> {
    pool: &'p Pool,
    bound: Option<BoundedLoad>,
    eligible: E,
    mean: OnceCell<f64>,
}

impl<'p, E: Fn(&Member) -> bool> LoadCheck<'p, E> {
    pub(super) fn new(pool: &'p Pool, bound: Option<BoundedLoad>, eligible: E) -> Self {
        LoadCheck { pool, bound, eligible, mean: OnceCell::new() }
    }

    /// Whether the node can take one more request. (Other threads change the loads meanwhile, and a mean may be a little old: it may be that
    /// none can.)
    pub(super) fn admits(&self, member: &Member) -> bool {
        let Some(BoundedLoad { factor, from }) = self.bound else { return true };
        let requests = member.node.live.inflight();
        let limit = || (factor * self.mean() * f64::from(member.node.weight)).ceil();
        requests < from || f64::from(requests) < limit()
    }

    /// Requests for each unit of weight of the eligible nodes, if this one were in.
    fn mean(&self) -> f64 {
        *self.mean.get_or_init(|| {
            let all = self.pool.candidates().all();
            let count = || {
                let eligible = all.holders().map(|index| &self.pool.members()[index]).filter(|m| (self.eligible)(m));
                let add = |(requests, weight): (u64, u64), Member { node, .. }: &Member| {
                    (requests + u64::from(node.live.inflight()), weight + u64::from(node.weight))
                };
                let (requests, weight) = eligible.fold((1, 0), add);
                requests as f64 / weight.max(1) as f64
            };
            self.pool.candidates().load.mean(all.len(), count)
        })
    }
}
