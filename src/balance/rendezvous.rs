//! Rendezvous hashing (highest random weight).
//!
//! Each node gets a score from the key and its own id, and the highest wins. Compared to a hash ring: no table to
//! rebuild, an even spread without virtual nodes, the same result in every replica from the ids alone, and a node that
//! leaves moves exactly its own keys, each to its next choice.
//!
//! A score costs about a nanosecond, as seeds lie side by side ([`Candidates::groups`]), and only nodes with a higher score than the
//! best so far are looked at, which are few. In a large fleet even that is saved for a page that was asked for before:
//! its first nodes are remembered ([`RankMemo`](crate::fleet::RankMemo)). All scores are looked at for a page that is
//! new or has been forgotten, and for one whose first nodes all refuse.

use super::mix_seed;
use crate::fleet::{Candidates, Member, Pool, REMEMBERED, Ranks, WeightGroup};

/// What else counts about a node, before its score.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Fitness {
    /// It is not in slow start, or this is one of the decisions in which it takes part.
    pub(super) takes_part: bool,
    /// It is not busier than others.
    pub(super) within_bound: bool,
}

impl Fitness {
    const FULL: Fitness = Fitness { takes_part: true, within_bound: true };
}

/// The fittest node, and of these the one with the highest score. `fitness` is `None` for a node that may not be chosen.
pub(super) fn pick(pool: &Pool, key: u64, fitness: impl Fn(&Member) -> Option<Fitness>) -> Option<&Member> {
    let (candidates, members) = (pool.candidates(), pool.members());
    if let Some(memo) = candidates.memo() {
        let ranks = memo.get(key).unwrap_or_else(|| {
            let ranks = first_ranks(candidates, key);
            memo.put(key, ranks);
            ranks
        });
        let first = ranks.iter().map(|&index| &members[usize::from(index)]);
        let fit = first.into_iter().find(|member| fitness(member) == Some(Fitness::FULL));
        if fit.is_some() {
            return fit;
        }
    }
    let mut best: Option<(Fitness, f64, &Member)> = None;
    let score = score_of(candidates.groups());
    for group in candidates.groups() {
        let floor = best.filter(|(fitness, ..)| *fitness == Fitness::FULL).map(|(_, score, _)| score);
        visit(group, key, floor, |index, bits| {
            let member = &members[index as usize];
            let rank = (fitness(member)?, score(bits, group.weight));
            if best.is_some_and(|(fitness, highest, _)| rank <= (fitness, highest)) {
                return None;
            }
            best = Some((rank.0, rank.1, member));
            (rank.0 == Fitness::FULL).then_some(bits)
        });
    }
    best.map(|(.., member)| member)
}

/// The nodes with the highest scores. There are at least as many nodes.
fn first_ranks(candidates: &Candidates, key: u64) -> Ranks {
    let mut first = [(0.0, 0); REMEMBERED];
    let score = score_of(candidates.groups());
    for group in candidates.groups() {
        let mut of_group = [None; REMEMBERED];
        let floor = Some(first[REMEMBERED - 1].0).filter(|&last| last > 0.0);
        visit(group, key, floor, |index, bits| {
            insert(&mut of_group, Some((bits, index)));
            of_group[REMEMBERED - 1].map(|(bits, _)| bits)
        });
        of_group.iter().flatten().for_each(|&(bits, index)| insert(&mut first, (score(bits, group.weight), index)));
    }
    first.map(|(_, index)| index as u16)
}

/// Puts one in its place, the highest first, and drops the last.
fn insert<T: PartialOrd>(sorted: &mut [T], one: T) {
    let at = sorted.partition_point(|other| *other >= one);
    if at < sorted.len() {
        sorted[at..].rotate_right(1);
        sorted[at] = one;
    }
}

/// Shows nodes of a group whose score for this key may be higher than `floor`, and the bits that their scores are made of. When `look`
/// returns bits, only nodes with more are shown from then on.
fn visit(group: &WeightGroup, key: u64, floor: Option<f64>, mut look: impl FnMut(u32, u64) -> Option<u64>) {
    let mut least = floor.map_or(0, |floor| least_bits(floor, group.weight));
    for (&seed, &index) in group.seeds.iter().zip(&group.members) {
        let bits = mix_seed(key, seed) >> 11;
        if bits >= least
            && let Some(surpassed) = look(index, bits)
        {
            least = surpassed + 1;
        }
    }
}

/// The scores of nodes in these groups, from their bits and weights. Among equals the bits say it all.
fn score_of(groups: &[WeightGroup]) -> fn(u64, u32) -> f64 {
    if groups.len() == 1 { |bits, _| bits as f64 } else { weighted_score }
}

/// With weight `w`, the score is `w / -ln(u)` for a uniform `u`, here of 53 bits: a node then wins a share of the keys in
/// proportion to its weight, and a change of one weight moves only keys from or to that node.
fn weighted_score(bits: u64, weight: u32) -> f64 {
    let uniform = (bits as f64 + 0.5) / UNIFORM;
    // The highest number is rounded to 1.
    f64::from(weight) / (-uniform.ln()).max(f64::MIN_POSITIVE)
}

/// What the bits must be at least for a weighted score above this one, or a little less.
fn least_bits(score: f64, weight: u32) -> u64 {
    let uniform = (-f64::from(weight) / score).exp();
    // More than rounding takes off: what is told too often is only looked at.
    (uniform * UNIFORM * (1.0 - 1e-12)) as u64
}

const UNIFORM: f64 = (1_u64 << 53) as f64;

#[cfg(test)]
mod tests;
