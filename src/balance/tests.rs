use proptest::prelude::*;

use super::testing::{pool, pool_of, shares};
use super::*;

const POLICIES: [Policy; 5] =
    [Policy::Rendezvous, Policy::RoundRobin, Policy::LeastRequest, Policy::PeakEwma, Policy::Random];

const BOUND: Option<BoundedLoad> = Some(BoundedLoad { factor: 1.25, from: 32 });

/// The context of the n-th request.
fn lb_context(n: u32) -> LbContext {
    LbContext { request_hash: mix(n.into(), 7), turn: n, now_ms: 0, random: mix(n.into(), 3) }
}

fn first_of(policy: Policy, weights: &[u32], share: u32) -> usize {
    let nodes = pool(weights);
    nodes.members()[0].node.live.set_share(share);
    shares(&nodes, (0..10_000).map(|n| pick(policy, &nodes, lb_context(n), None, |_| true)))[0]
}

#[test]
fn what_a_node_gets_grows_with_its_share_by_every_policy() {
    for policy in POLICIES {
        // Of four equal nodes, each gets 2500; of weights 3 and 1, the first gets 7500.
        for (weights, whole) in [(&[1, 1, 1, 1][..], 2500), (&[3, 1], 7500)] {
            let whole = match (policy, weights.len()) {
                (Policy::LeastRequest, 2) => 10_000,
                // The first drawn is taken of two that cost the same, and nothing is known of any.
                _ => whole,
            };
            for share in [WHOLE_SHARE / 16, WHOLE_SHARE / 4, WHOLE_SHARE / 2, WHOLE_SHARE] {
                let expected = whole * share as usize / WHOLE_SHARE as usize;
                let got = first_of(policy, weights, share);
                let near = expected * 3 / 4..=expected * 5 / 4 + 20;
                assert!(near.contains(&got), "{policy:?} {weights:?} at {share}: {got} and not {expected}");
            }
        }
    }
}

#[test]
fn a_growing_share_moves_keys_to_its_node_and_no_others() {
    for count in [3, 100] {
        let nodes = pool(&vec![1; count]);
        let chosen = |key| {
            let lb = LbContext { request_hash: key, ..LbContext::default() };
            pick(Policy::Rendezvous, &nodes, lb, None, |_| true).unwrap().node.id().to_string()
        };
        let all = || (0..5000).map(|key| chosen(mix(key, 7))).collect::<Vec<_>>();
        nodes.members()[1].node.live.set_share(1);
        let mut before = all();
        for share in [20, 100, 200, WHOLE_SHARE] {
            nodes.members()[1].node.live.set_share(share);
            let after = all();
            let moved = before.iter().zip(&after).filter(|(before, after)| before != after);
            assert!(moved.clone().count() > 0 && moved.clone().all(|(_, to)| to == "n001"), "at {share} of {count}");
            before = after;
        }
    }
}

#[test]
fn who_is_the_only_one_gets_everything_however_small_its_share() {
    for count in [2, 100] {
        let nodes = pool(&vec![1; count]);
        nodes.members()[0].node.live.set_share(0);
        for policy in POLICIES {
            let first = |member: &Member| member.node.id().as_str() == "n000";
            assert!((0..100).all(|n| pick(policy, &nodes, lb_context(n), BOUND, first).is_some()), "{policy:?}");
            assert!(pick(policy, &nodes, lb_context(0), BOUND, |_| false).is_none(), "{policy:?}");
        }
    }
}

#[test]
fn simultaneous_requests_for_a_page_stay_together_in_a_small_fleet() {
    let nodes = pool(&[1, 1, 1]);
    let lb = LbContext { request_hash: 9, ..LbContext::default() };
    let mut places = Vec::new();
    for _ in 0..40 {
        let member = pick(Policy::Rendezvous, &nodes, lb, BOUND, |_| true).unwrap();
        member.node.live.request_began();
        places.push(member.node.id().clone());
    }
    let (together, others) = places.split_at(32);
    assert!(together.iter().all(|place| *place == places[0]), "{places:?}");
    assert!(others.iter().any(|place| *place != places[0]), "{places:?}");
}

#[test]
fn a_node_of_twice_the_weight_takes_twice_as_many_before_it_is_busy() {
    let nodes = pool(&[1, 2, 1]);
    let bound = Some(BoundedLoad { factor: 1.25, from: 1 });
    // A mean of 10 for each weight: the bound is 13 for n000, and 25 for n001.
    let live = |index: usize| &nodes.members()[index].node.live;
    (0..19).for_each(|_| live(1).request_began());
    (0..10).for_each(|_| live(0).request_began());
    (0..10).for_each(|_| live(2).request_began());
    let keys = || (0..2000).map(|n| pick(Policy::Rendezvous, &nodes, lb_context(n), None, |_| true));
    let bounded = || (0..2000).map(|n| pick(Policy::Rendezvous, &nodes, lb_context(n), bound, |_| true));
    assert_eq!(shares(&nodes, keys()), shares(&nodes, bounded()));
    // Now it is 39 for n001, which has 40.
    (0..21).for_each(|_| live(1).request_began());
    assert_eq!(shares(&nodes, bounded())[1], 0);
}

#[test]
fn nodes_that_may_not_serve_count_for_no_mean() {
    let nodes = pool(&[1, 1, 1, 1]);
    let bound = Some(BoundedLoad { factor: 1.25, from: 1 });
    // One is stuck with requests, two are idle.
    (0..1000).for_each(|_| nodes.members()[0].node.live.request_began());
    (0..3).for_each(|_| nodes.members()[1].node.live.request_began());
    let eligible = |member: &Member| member.node.id().as_str() != "n000";
    let shares = shares(&nodes, (0..500).map(|n| pick(Policy::Rendezvous, &nodes, lb_context(n), bound, eligible)));
    assert_eq!((shares[0], shares[1]), (0, 0), "its bound is 2, not 300");
}

#[test]
fn the_own_zone_is_used_alone_while_it_has_its_part_of_the_nodes() {
    let fleet = |near: usize, far: usize| {
        let zone = |index| if index < near { Some("a") } else { Some("b") };
        pool_of((0..near + far).map(|index| (index, 1, zone(index))), Some("a"))
    };
    let stayed = |near, far, policy| {
        let nodes = fleet(near, far);
        let shares = shares(&nodes, (0..10_000).map(|n| pick(policy, &nodes, lb_context(n), None, |_| true)));
        shares[..near].iter().sum::<usize>()
    };
    for policy in [Policy::RoundRobin, Policy::LeastRequest, Policy::PeakEwma, Policy::Random] {
        assert_eq!(stayed(3, 3, policy), 10_000, "{policy:?}");
        assert_eq!(stayed(0, 3, policy), 0, "{policy:?}");
        // One of ten nodes has an even share of 1,000 of its own zone's and of the other's. A quarter of what enters here
        // stays, and of what goes to all a tenth comes back.
        let few = stayed(1, 9, policy);
        assert!((3000..3500).contains(&few), "{policy:?}: {few}");
    }
    // Each page has one place in the fleet, wherever that is.
    let hashed = stayed(3, 3, Policy::Rendezvous);
    assert!((4500..5500).contains(&hashed), "{hashed}");
}

#[test]
fn another_zone_is_used_when_nobody_in_the_own_one_may_serve() {
    let nodes = pool_of((0..4).map(|index| (index, 1, if index < 2 { Some("a") } else { None })), Some("a"));
    nodes.members()[0].node.live.set_share(1);
    for policy in [Policy::RoundRobin, Policy::LeastRequest, Policy::PeakEwma, Policy::Random] {
        let far = |member: &Member| member.node.spec.zone.is_none();
        assert!((0..100).all(|n| far(pick(policy, &nodes, lb_context(n), None, far).unwrap())), "{policy:?}");
        // Who has just started in the own zone is not overrun because it is the only one there.
        let one_near = |member: &Member| member.node.id().as_str() != "n001";
        let shares = shares(&nodes, (0..1000).map(|n| pick(policy, &nodes, lb_context(n), None, one_near)));
        assert!(shares[0] < 50, "{policy:?}: {shares:?}");
    }
}

#[test]
fn the_last_near_node_that_may_serve_does_not_get_what_fell_to_the_others() {
    let nodes = pool_of((0..6).map(|index| (index, 1, Some(if index < 3 { "a" } else { "b" }))), Some("a"));
    let one_near = |member: &Member| !["n000", "n001"].contains(&member.node.id().as_str());
    for policy in [Policy::RoundRobin, Policy::LeastRequest, Policy::PeakEwma, Policy::Random] {
        let shares = shares(&nodes, (0..6000).map(|n| pick(policy, &nodes, lb_context(n), None, one_near)));
        assert!((1500..3900).contains(&shares[2]), "{policy:?}: {shares:?}");
    }
}

proptest! {
    #[test]
    fn nobody_is_chosen_who_may_not_be_and_somebody_is_if_anybody_may(
        weights in prop::collection::vec(0_u32..4, 1..90),
        excluded in prop::collection::vec(any::<bool>(), 90),
        busy in prop::collection::vec(0_u32..80, 90),
        n: u32,
    ) {
        let zone = |index: usize| [None, Some("a"), Some("b")][index % 3];
        let nodes = pool_of(weights.iter().enumerate().map(|(index, &weight)| (index, weight, zone(index))), Some("a"));
        for (member, &busy) in nodes.members().iter().zip(&busy) {
            (0..busy).for_each(|_| member.node.live.request_began());
        }
        let allowed = |member: &Member| !excluded[member.node.endpoint_id as usize];
        let any = nodes.members().iter().any(|member| member.node.weight > 0 && allowed(member));
        for policy in POLICIES {
            let chosen = pick(policy, &nodes, lb_context(n), BOUND, allowed);
            prop_assert_eq!(chosen.is_some(), any, "{:?}", policy);
            prop_assert!(chosen.is_none_or(|member| allowed(member) && member.node.weight > 0), "{:?}", policy);
        }
    }
}
