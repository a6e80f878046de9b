//! Power of two choices: of two randomly drawn nodes, the one with fewer requests.
//!
//! If every worker and replica took the least loaded node of all, all would pick the same one as soon as it looks idle,
//! and a node that fails fast always looks idle. Two draws keep nearly all of the benefit without the herd
//! (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing").

use super::{mix, weighted};
use crate::fleet::Member;

/// The less loaded of two eligible nodes, drawn by weight.
pub(super) fn pick(members: &[Member], random: u64, eligible: impl Fn(&Member) -> bool) -> Option<&Member> {
    let first = weighted::pick(members, random, &eligible)?;
    let others = |member: &Member| eligible(member) && member.node.endpoint_id != first.node.endpoint_id;
    let Some(second) = weighted::pick(members, mix(random, 1), others) else { return Some(first) };
    Some(if load(second) < load(first) { second } else { first })
}

/// Requests per weight, this one included.
fn load(member: &Member) -> f64 {
    f64::from(member.node.live.inflight() + 1) / f64::from(member.node.weight.max(1))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{members, shares};
    use super::*;

    #[test]
    fn the_less_loaded_of_two_is_chosen() {
        let nodes = members(&[1, 1]);
        nodes[0].node.live.request_began();
        assert_eq!(shares(&nodes, (0..100).map(|n| pick(&nodes, mix(n, 3), |_| true))), [0, 100]);
    }

    #[test]
    fn the_most_loaded_of_many_is_never_chosen() {
        let nodes = members(&[1, 1, 1]);
        nodes[1].node.live.request_began();
        let shares = shares(&nodes, (0..3000).map(|n| pick(&nodes, mix(n, 3), |_| true)));
        assert_eq!(shares[1], 0);
        assert!(shares[0] > 1300 && shares[2] > 1300, "{shares:?}");
    }

    #[test]
    fn a_single_node_gets_everything_however_loaded() {
        let nodes = members(&[1]);
        nodes[0].node.live.request_began();
        assert!(pick(&nodes, 1, |_| true).is_some());
    }
}
