//! Chooses the node of a request. One algorithm a file; eligibility (healthy, current, not tried yet) is the caller's
//! filter, not part of an algorithm.
//!
//! Everything here is a pure function of the nodes, their load and a [`LbContext`]; the caller supplies the randomness.
//!
//! **A choice costs the same in a fleet of 2 and of 1,000.** What follows from membership, weights and health is laid out once for each
//! snapshot ([`Candidates`](crate::fleet::Candidates)); a choice looks at the few nodes that come into question, and the caller's filter
//! is asked of those alone. All nodes are looked at only if those all refuse, as when most caches are behind. `cargo bench --bench
//! balance` measures it.
//!
//! A node in slow start gets only a share of its traffic ([`Live::share`](crate::fleet::Live::share)). That is not part
//! of the algorithms either: such a node takes part in as many decisions as its share says and is not a candidate in
//! the others. Over many decisions that is its weight times its share, without fractional weights, for which round
//! robin would need a schedule and two choices an artificial load. If there is a key, its hash decides, so that a
//! growing share moves keys to that node one at a time, and no other keys: a cache keeps its pages. If no other node is
//! eligible, a small share is not a reason to refuse.
//!
//! **The own zone** comes first ([`Candidates`](crate::fleet::Candidates) says how far), but not in the hash. A page that has one
//! place in the fleet is rendered once, and a purge, a restart, a new page cost one rendering; with a place in each zone they
//! cost one in each, each zone needs the memory for all pages, and the replicas of a zone that loses its caches begin with empty ones at the others. What
//! is saved is the way between zones, a millisecond where a rendering takes several hundred. Who would rather have each
//! zone keep all pages runs a fleet in each.

mod bounded_load;
mod rendezvous;
mod retry_budget;
#[cfg(test)]
mod testing;
mod two_choices;
mod waiting_line;
mod weighted;

use serde::{Deserialize, Serialize};

pub use self::bounded_load::BoundedLoad;
use self::bounded_load::LoadCheck;
use self::rendezvous::Fitness;
pub use self::retry_budget::{LEAST as LEAST_RETRIES, RetryBudget, WINDOW as RETRY_WINDOW};
pub use self::waiting_line::WaitingLine;
use crate::fleet::{Member, Pool, Tickets, WHOLE_SHARE, WHOLE_TRAFFIC, spread_bits};

/// How a listener chooses among its nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The same key goes to the same node, and a node that leaves moves only its own keys: for caches.
    Rendezvous,
    /// In turn, by weight.
    RoundRobin,
    /// The one with fewer requests of two random nodes ("power of two choices"): for application servers.
    LeastRequest,
    /// The one of two random nodes that is expected to answer sooner, by its latest answers and its requests; one that
    /// fails counts as slow: for application servers that are not alike.
    PeakEwma,
    /// Random, by weight.
    Random,
}

/// The input of one decision.
#[derive(Clone, Copy, Debug, Default)]
pub struct LbContext {
    /// The hash of the requested page.
    pub request_hash: u64,
    /// Increases by one with every request of this chooser. It wraps.
    pub turn: u32,
    /// The time in which latencies are noted ([`crate::fleet::PeakLatency`]).
    pub now_ms: u32,
    /// Random bits.
    pub random: u64,
}

/// Chooses among the eligible nodes; `None` if there is none.
///
/// `bounded_load` only concerns [`Policy::Rendezvous`]: when a node passes a key on to the key's next choice.
pub fn pick<'p>(
    policy: Policy,
    pool: &'p Pool,
    lb: LbContext,
    bounded_load: Option<BoundedLoad>,
    eligible: impl Fn(&Member) -> bool,
) -> Option<&'p Member> {
    let drawn = |lot: u64, draw: &DrawFn<'_, 'p>| draw_near_first(pool, lb, lot, &eligible, draw);
    let two = |cost: &dyn Fn(&Member) -> f64| {
        drawn(lb.random, &|tickets, eligible| two_choices::pick(pool, tickets, lb.random, cost, eligible))
    };
    match policy {
        Policy::Rendezvous => by_hash(pool, lb.request_hash, bounded_load, &eligible),
        Policy::RoundRobin => {
            let turn = lb.turn.into();
            drawn(turn, &|tickets, eligible| weighted::pick(pool, tickets, turn, eligible))
        }
        Policy::LeastRequest => two(&two_choices::requests),
        Policy::PeakEwma => two(&|member| two_choices::latency(member, lb.now_ms)),
        Policy::Random => drawn(lb.random, &|tickets, eligible| weighted::pick(pool, tickets, lb.random, eligible)),
    }
}

/// Draws one of the eligible nodes that hold these tickets.
type DrawFn<'d, 'p> = dyn Fn(&Tickets, &dyn Fn(&Member) -> bool) -> Option<&'p Member> + 'd;

fn by_hash(
    pool: &Pool,
    key: u64,
    bounded_load: Option<BoundedLoad>,
    eligible: impl Fn(&Member) -> bool,
) -> Option<&Member> {
    let load = LoadCheck::new(pool, bounded_load, &eligible);
    let fitness = |member: &Member| Fitness { takes_part: takes_part(member, key), within_bound: load.admits(member) };
    rendezvous::pick(pool, key, |member| eligible(member).then(|| fitness(member)))
}

/// In the own zone, if the request stays there; else among all. `lot` decides about slow starts. A request that falls to a
/// near node which may not serve leaves the zone: the others there are not to carry its part.
fn draw_near_first<'p>(
    pool: &'p Pool,
    lb: LbContext,
    lot: u64,
    eligible: &dyn Fn(&Member) -> bool,
    draw: &DrawFn<'_, 'p>,
) -> Option<&'p Member> {
    let candidates = pool.candidates();
    let takes_part = |member: &Member| takes_part(member, lot) && eligible(member);
    let any_near = |member: &Member| self::takes_part(member, lot);
    let near = stays_near(pool, lb.random).then(|| draw(candidates.near(), &any_near)).flatten();
    near.filter(|member| eligible(member))
        .or_else(|| draw(candidates.all(), &takes_part))
        .or_else(|| draw(candidates.all(), eligible))
}

/// Whether a node takes part in the decision with this lot: always, unless it is in slow start.
fn takes_part(member: &Member, lot: u64) -> bool {
    // Not the number from which scores are made, or the first keys to move would be those that a node wins narrowly.
    const LOTS: u64 = 0x5851_f42d_4c95_7f2d;
    let share = member.node.live.share();
    share == WHOLE_SHARE || mix_seed(lot ^ LOTS, member.node.seed) % u64::from(WHOLE_SHARE) < u64::from(share)
}

/// Whether the request with these random bits stays in the own zone.
fn stays_near(pool: &Pool, random: u64) -> bool {
    // Not the bits that choose the node.
    const ZONES: u64 = 0x9216_d5d9_8979_fb1b;
    let share = pool.candidates().near_share();
    share == WHOLE_TRAFFIC || share > 0 && mix(random, ZONES) % u64::from(WHOLE_TRAFFIC) < u64::from(share)
}

/// Mixes two words so that the result depends on every bit of both.
fn mix(a: u64, b: u64) -> u64 {
    mix_seed(a, spread_bits(b))
}

/// The same with a seed that is [spread](spread_bits) already (the finaliser of MurmurHash3 over their combination).
fn mix_seed(a: u64, seed: u64) -> u64 {
    let mut h = a ^ seed;
    h = (h ^ (h >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

#[cfg(test)]
mod tests;
