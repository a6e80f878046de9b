//! Tickets: every node holds as many as its weight, and a number selects one. A counter makes it round robin, a random
//! number makes it random.

use crate::fleet::Member;

/// The eligible node that holds this ticket (modulo their number).
///
/// Eligibility depends on counters that other threads change, so it may differ between the count and the choice: then
/// the last eligible node of the count is chosen.
pub(super) fn pick(members: &[Member], ticket: u64, eligible: impl Fn(&Member) -> bool) -> Option<&Member> {
    let tickets = |member: &Member| u64::from(member.node.weight.max(1));
    let total: u64 = members.iter().filter(|member| eligible(member)).map(tickets).sum();
    let mut left = ticket.checked_rem(total)?;
    let mut last = None;
    for member in members.iter().filter(|member| eligible(member)) {
        let held = tickets(member);
        if left < held {
            return Some(member);
        }
        left -= held;
        last = Some(member);
    }
    last
}

#[cfg(test)]
mod tests {
    use super::super::testing::{members, shares};
    use super::*;

    #[test]
    fn a_counter_goes_round_by_weight() {
        let nodes = members(&[1, 2, 1]);
        assert_eq!(shares(&nodes, (0..400).map(|turn| pick(&nodes, turn, |_| true))), [100, 200, 100]);
    }

    #[test]
    fn the_ineligible_hold_no_ticket() {
        let nodes = members(&[1, 1, 1]);
        let shares = shares(&nodes, (0..100).map(|turn| pick(&nodes, turn, |m| m.node.id().as_str() != "n1")));
        assert_eq!(shares, [50, 0, 50]);
        assert!(pick(&nodes, 0, |_| false).is_none());
    }
}
