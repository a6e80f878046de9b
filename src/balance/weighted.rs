//! Tickets: every node holds as many as its weight, and a number selects one. A counter makes it round robin, a random
//! number makes it random.
//!
//! Most often the holder of a ticket may serve, however large the fleet is. If not, the next node would get twice its share in place
//! of the one that may not; so lots are drawn, which are everybody's alike. In a small fleet, and when
//! many lots have failed, the tickets of those that may serve are counted.

use super::mix;
use crate::fleet::{Member, Pool, Tickets};

/// How many tickets are drawn before those that may serve are counted.
const DRAWS: u64 = 8;

/// As many nodes are counted as quickly as lots are drawn.
const FEW: usize = 16;

/// The eligible node that holds this ticket (modulo their number), or another one.
pub(super) fn pick<'p>(
    pool: &'p Pool,
    tickets: &Tickets,
    ticket: u64,
    eligible: impl Fn(&Member) -> bool,
) -> Option<&'p Member> {
    let draws = if tickets.len() <= FEW { 1 } else { DRAWS };
    for draw in 0..draws {
        let ticket = if draw == 0 { ticket } else { mix(ticket, draw) };
        let member = &pool.members()[tickets.holder(ticket)?];
        if eligible(member) {
            return Some(member);
        }
    }
    count(pool, tickets, ticket, eligible)
}

/// The holder among the eligible alone.
///
/// Eligibility depends on counters that other threads change, so it may differ between the count and the choice: then
/// the last eligible node of the count is chosen.
fn count<'p>(pool: &'p Pool, tickets: &Tickets, ticket: u64, eligible: impl Fn(&Member) -> bool) -> Option<&'p Member> {
    let holders = || tickets.holders().map(|index| &pool.members()[index]).filter(|member| eligible(member));
    let held = |member: &Member| u64::from(member.node.weight);
    let mut left = ticket.checked_rem(holders().map(held).sum())?;
    let mut last = None;
    for member in holders() {
        if left < held(member) {
            return Some(member);
        }
        left -= held(member);
        last = Some(member);
    }
    last
}

#[cfg(test)]
mod tests {
    use super::super::testing::{pool, shares};
    use super::*;

    #[test]
    fn a_counter_goes_round_by_weight() {
        let nodes = pool(&[1, 2, 1]);
        let all = nodes.candidates().all();
        assert_eq!(shares(&nodes, (0..400).map(|turn| pick(&nodes, all, turn, |_| true))), [100, 200, 100]);
    }

    #[test]
    fn the_ineligible_hold_no_ticket_and_their_neighbour_not_two() {
        for count in [3, 5, 40] {
            let nodes = pool(&vec![1; count]);
            let all = nodes.candidates().all();
            let turns = 1000 * count as u64;
            let shares =
                shares(&nodes, (0..turns).map(|turn| pick(&nodes, all, turn, |m| m.node.id().as_str() != "n001")));
            assert_eq!(shares[1], 0);
            let even = turns as usize / (count - 1);
            let others = shares.iter().enumerate().filter(|(index, _)| *index != 1);
            others
                .for_each(|(index, &share)| assert!(share.abs_diff(even) <= even / 20, "{index} of {count}: {share}"));
            assert!(pick(&nodes, all, 0, |_| false).is_none());
        }
    }

    #[test]
    fn who_is_the_only_one_of_many_is_found() {
        let nodes = pool(&[1; 300]);
        let all = nodes.candidates().all();
        for turn in 0..100 {
            let found = pick(&nodes, all, turn, |member| member.node.id().as_str() == "n123").unwrap();
            assert_eq!(found.node.id().as_str(), "n123");
        }
    }
}
