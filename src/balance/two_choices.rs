//! Power of two choices: of two nodes, drawn by weight, the one with the lower cost.
//!
//! If every worker and replica took the cheapest node of all, all would pick the same one as soon as it looks idle,
//! and a node that fails fast always looks idle. Two draws keep nearly all of the benefit without the herd
//! (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing"), and cost the same for any number of nodes.
//! Who comes from HAProxy's `leastconn` loses that the single idle node of a busy fleet is found: in a fleet of two it
//! is, and in one of ten with one idle node one request in five finds it.

use super::{mix, weighted};
use crate::fleet::{FAILURE_COST, Member, Pool, Tickets};

/// The cheaper of two eligible nodes.
pub(super) fn pick<'p>(
    pool: &'p Pool,
    tickets: &Tickets,
    random: u64,
    cost: impl Fn(&Member) -> f64,
    eligible: impl Fn(&Member) -> bool,
) -> Option<&'p Member> {
    let first = weighted::pick(pool, tickets, random, &eligible)?;
    let others = |member: &Member| member.node.endpoint_id != first.node.endpoint_id && eligible(member);
    let Some(second) = weighted::pick(pool, tickets, mix(random, 1), others) else { return Some(first) };
    Some(if cost(second) < cost(first) { second } else { first })
}

/// Requests per weight, this one included.
pub(super) fn requests(member: &Member) -> f64 {
    f64::from(member.node.live.inflight() + 1) / f64::from(member.node.weight)
}

/// The time until the answer begins, were the requests of a node carried out one after the other.
///
/// A node of which nothing is known is asked once. While that answer is awaited it counts as one that has failed, or a new
/// node, which seems to take no time at all, would be given all requests until its first answer.
pub(super) fn latency(member: &Member, now_ms: u32) -> f64 {
    let live = &member.node.live;
    let unknown = || if live.inflight() == 0 { 0.0 } else { FAILURE_COST.as_secs_f32() };
    requests(member) * f64::from(live.latency.expected(now_ms).unwrap_or_else(unknown))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::testing::{pool, shares};
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn by_requests(nodes: &Pool, picks: u64) -> Vec<usize> {
        let all = nodes.candidates().all();
        shares(nodes, (0..picks).map(|n| pick(nodes, all, mix(n, 3), requests, |_| true)))
    }

    fn by_latency(nodes: &Pool, picks: u64, now_ms: u32) -> Vec<usize> {
        let all = nodes.candidates().all();
        shares(nodes, (0..picks).map(|n| pick(nodes, all, mix(n, 3), |member| latency(member, now_ms), |_| true)))
    }

    #[test]
    fn the_less_loaded_of_two_is_chosen() {
        let nodes = pool(&[1, 1]);
        nodes.members()[0].node.live.request_began();
        assert_eq!(by_requests(&nodes, 100), [0, 100]);
    }

    #[test]
    fn the_most_loaded_of_many_is_never_chosen() {
        for count in [3, 30] {
            let nodes = pool(&vec![1; count]);
            nodes.members()[1].node.live.request_began();
            let shares = by_requests(&nodes, 1000 * count as u64);
            assert_eq!(shares[1], 0);
            assert!(shares.iter().enumerate().all(|(index, &share)| index == 1 || share > 850), "{shares:?}");
        }
    }

    #[test]
    fn a_single_node_gets_everything_however_loaded() {
        let nodes = pool(&[1]);
        nodes.members()[0].node.live.request_began();
        assert_eq!(by_requests(&nodes, 10), [10]);
    }

    #[test]
    fn the_quicker_of_two_is_chosen_until_its_requests_outweigh_that() {
        let nodes = pool(&[1, 1]);
        let [quick, slow] = [0, 1].map(|index| &nodes.members()[index].node.live);
        quick.latency.record_answer(0, 100 * MS);
        slow.latency.record_answer(0, 350 * MS);
        assert_eq!(by_latency(&nodes, 100, 0), [100, 0]);
        (0..3).for_each(|_| quick.request_began());
        assert_eq!(by_latency(&nodes, 100, 0), [0, 100]);
    }

    #[test]
    fn a_node_that_fails_at_once_draws_no_traffic_until_that_is_long_ago() {
        let nodes = pool(&[1, 1]);
        let [sound, failing] = [0, 1].map(|index| &nodes.members()[index].node.live);
        sound.latency.record_answer(0, 300 * MS);
        failing.latency.record_failure(0, MS);
        assert_eq!(by_latency(&nodes, 100, 0), [100, 0]);
        // The sound one is measured all the while.
        (0..60).for_each(|second| sound.latency.record_answer(second * 1000, 300 * MS));
        assert_eq!(by_latency(&nodes, 100, 59_000), [0, 100]);
    }

    #[test]
    fn where_all_fail_alike_requests_decide() {
        let nodes = pool(&[1, 1]);
        nodes.members().iter().for_each(|member| member.node.live.latency.record_failure(0, MS));
        nodes.members()[1].node.live.request_began();
        assert_eq!(by_latency(&nodes, 100, 10), [100, 0]);
    }

    #[test]
    fn a_new_node_is_asked_once_until_it_has_answered() {
        let nodes = pool(&[1, 1]);
        nodes.members()[0].node.live.latency.record_answer(0, 300 * MS);
        assert_eq!(by_latency(&nodes, 10, 0), [0, 10]);
        nodes.members()[1].node.live.request_began();
        assert_eq!(by_latency(&nodes, 10, 0), [10, 0]);
        nodes.members()[1].node.live.latency.record_answer(0, 20 * MS);
        assert_eq!(by_latency(&nodes, 10, 0), [0, 10]);
    }
}
