use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::mix;
use super::super::testing::{pool, pool_of, shares};
use super::*;

fn full(_: &Member) -> Option<Fitness> {
    Some(Fitness::FULL)
}

fn chosen(pool: &Pool, key: u64) -> &Member {
    pick(pool, key, full).unwrap()
}

/// The definition: the best of all, by the fitness and then by the score.
fn defined(pool: &Pool, key: u64, fitness: impl Fn(&Member) -> Option<Fitness>) -> Option<&Member> {
    let rank = |member: &Member| {
        let uniform = ((mix_seed(key, member.node.seed) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        fitness(member).map(|fitness| (fitness, f64::from(member.node.weight) / -uniform.ln()))
    };
    let members = pool.members().iter().filter(|member| member.usable && rank(member).is_some());
    members.max_by(|a, b| rank(a).partial_cmp(&rank(b)).unwrap())
}

#[test]
fn keys_spread_evenly_over_equal_nodes_however_many() {
    for (count, keys, tolerance) in [(4, 8000, 10), (200, 100_000, 20)] {
        let nodes = pool(&vec![1; count]);
        let shares = shares(&nodes, (0..keys).map(|key| pick(&nodes, mix(key, 7), full)));
        let even = keys as usize / count;
        assert!(shares.iter().all(|share| share.abs_diff(even) < even * tolerance / 100), "{shares:?}");
    }
}

#[test]
fn keys_follow_unequal_weights() {
    let nodes = pool(&[1, 3]);
    let shares = shares(&nodes, (0..8000).map(|key| pick(&nodes, mix(key, 7), full)));
    assert!((1800..2200).contains(&shares[0]), "{shares:?}");
}

/// What every replica and every version must agree on: who has these keys.
#[test]
fn the_same_ids_and_weights_give_the_same_places_for_ever() {
    let places = |pool: &Pool| (0..12).map(|key| chosen(pool, mix(key, 7)).node.endpoint_id).collect::<Vec<_>>();
    assert_eq!(places(&pool(&[1, 1, 1])), GOLDEN_EQUAL);
    assert_eq!(places(&pool(&[1, 2, 3, 4])), GOLDEN_WEIGHTED);
    assert_eq!(places(&pool(&[1; 100])), GOLDEN_LARGE);
    let again = pool(&[1; 100]);
    assert_eq!((places(&again), places(&again)), (GOLDEN_LARGE.to_vec(), GOLDEN_LARGE.to_vec()), "as remembered");
}

const GOLDEN_EQUAL: [u64; 12] = [2, 0, 2, 0, 1, 2, 2, 0, 2, 0, 0, 2];
const GOLDEN_WEIGHTED: [u64; 12] = [2, 3, 2, 0, 1, 2, 2, 0, 3, 0, 3, 2];
const GOLDEN_LARGE: [u64; 12] = [33, 71, 94, 58, 46, 95, 43, 48, 19, 41, 26, 33];

#[test]
fn who_is_less_fit_passes_its_keys_on_and_no_others() {
    for count in [3, 100] {
        let nodes = pool(&vec![1; count]);
        let busy =
            |member: &Member| Some(Fitness { within_bound: member.node.id().as_str() != "n000", ..Fitness::FULL });
        let without = pool_of((1..count).map(|index| (index, 1, None)), None);
        for key in (0..2000).map(|key| mix(key, 7)) {
            let (before, after) = (chosen(&nodes, key).node.id(), pick(&nodes, key, busy).unwrap().node.id());
            assert_eq!(after, chosen(&without, key).node.id());
            assert!(before == after || before.as_str() == "n000");
        }
    }
}

#[test]
fn nobody_eligible_is_nobody() {
    for nodes in [pool(&[]), pool(&[1]), pool(&[1; 100])] {
        assert!(pick(&nodes, 1, |_| None).is_none());
    }
    assert!(pick(&pool(&[0, 0]), 1, full).is_none(), "they are drained");
}

/// What a table or a ring does worse: with Maglev, others' keys move as well.
#[test]
fn a_node_that_leaves_a_large_fleet_moves_its_own_keys_alone() {
    let nodes = pool(&[1; 100]);
    let fewer = pool_of((0..100).filter(|index| *index != 42).map(|index| (index, 1, None)), None);
    let mut heirs = BTreeMap::<u64, usize>::new();
    for key in (0..40_000).map(|key| mix(key, 7)) {
        let (before, after) = (chosen(&nodes, key).node.endpoint_id, chosen(&fewer, key).node.endpoint_id);
        if before == 42 {
            *heirs.entry(after).or_default() += 1;
        } else {
            assert_eq!(before, after);
        }
    }
    assert!(heirs.len() > 90, "{heirs:?}");
}

#[test]
fn a_memory_counts_only_for_nodes_that_are_as_they_were() {
    let keys = || (0..3000).map(|key| mix(key, 7));
    let before = pool(&[1; 100]);
    keys().for_each(|key| _ = chosen(&before, key));
    for now in [pool(&[1; 100]), pool(&[2; 100]), pool_of((0..99).map(|index| (index, 1, None)), None)] {
        let now = now.remembering(&before);
        for key in keys() {
            assert_eq!(Some(chosen(&now, key).node.id()), defined(&now, key, full).map(|member| member.node.id()));
        }
    }
}

proptest! {
    #[test]
    fn the_choice_is_that_of_the_definition(
        weights in prop::collection::vec(0_u32..5, 1..150),
        fitness in prop::collection::vec(prop::option::of((any::<bool>(), any::<bool>())), 150),
        keys in prop::collection::vec(any::<u64>(), 1..20),
    ) {
        let nodes = pool(&weights);
        let fitness = |member: &Member| {
            let (takes_part, within_bound) = fitness[member.node.endpoint_id as usize]?;
            Some(Fitness { takes_part, within_bound })
        };
        for key in keys.iter().chain(&keys) {
            let (found, defined) = (pick(&nodes, *key, fitness), defined(&nodes, *key, fitness));
            prop_assert_eq!(found.map(|member| member.node.id()), defined.map(|member| member.node.id()));
        }
    }

    #[test]
    fn another_weight_moves_keys_from_or_to_its_node_alone(
        mut weights in prop::collection::vec(1_u32..100, 2..100), changed: usize, to in 1_u32..100, keys in prop::collection::vec(any::<u64>(), 1..50),
    ) {
        let before = pool(&weights);
        let changed = changed % weights.len();
        let grows = to >= weights[changed];
        weights[changed] = to;
        let after = pool(&weights);
        for key in keys {
            let [from, to] = [&before, &after].map(|pool| chosen(pool, key).node.endpoint_id as usize);
            let its_own = if grows { to } else { from };
            prop_assert!(from == to || its_own == changed);
        }
    }
}
