//! Bounds the cost of matching a pattern, for every possible header.
//!
//! PCRE tries to match at each position of a header. There it tries one branch after the other, and each repeat longer
//! and shorter, until one way leads to the end. Varnish limits that per position (`pcre2_match_limit` 10,000 and
//! `pcre2_depth_limit` 20, `pcre_match_limit` and `pcre_match_limit_recursion` in 6.0) and does not handle the limit:
//! 7.1 panics, 6.0 treats the page as not matching. So a pattern is accepted only if no header can reach it. The
//! numbers below are upper bounds: parts that exclude one another by their first byte are not multiplied, others are.

use super::BadPattern;
use super::class::Class;
use super::syntax::{PatternNode, Syntax};

/// Calls of PCRE's matcher from one position: half of Varnish's limit, because PCRE versions count differently.
const MAX_CALLS: u64 = 5_000;

/// Simultaneous open decisions.
pub(crate) const MAX_DEPTH: u64 = 18;

/// The number of ways to repeat single bytes at one position, over all repeats.
const MAX_SPREAD: u64 = 300;

/// The longest tag assumed, in bytes: how far a repeat goes that cannot pass a comma.
const LONGEST_TAG: u64 = 256;

/// The cost of a part of a pattern, from one position.
#[derive(Clone, Copy, Debug)]
struct Effort {
    /// The number of ways it can match, each of which tries the rest of the pattern.
    ways: u64,
    /// Calls to try all of them.
    calls: u64,
    depth: u64,
    /// The ways of its repeats of single bytes.
    spread: u64,
}

impl Effort {
    const NONE: Effort = Effort { ways: 1, calls: 0, depth: 0, spread: 1 };

    fn then(self, next: Effort) -> Effort {
        Effort {
            ways: self.ways.saturating_mul(next.ways),
            calls: self.calls.saturating_add(self.ways.saturating_mul(next.calls)),
            depth: self.depth + next.depth,
            spread: self.spread.saturating_mul(next.spread),
        }
    }
}

/// What can follow: its possible first bytes, and whether it can be empty.
#[derive(Clone, Copy)]
struct Begin {
    first: Class,
    empty: bool,
}

/// Checks that no header makes a matcher give up. Returns the largest number of matcher calls for one position.
///
/// # Errors
/// [`BadPattern::Effort`] with the offset of the part at fault.
pub(super) fn check(syntax: &Syntax) -> Result<u64, BadPattern> {
    let measure = Measure { caseless: syntax.caseless };
    // After the end nothing can fail.
    let end = Begin { first: Class::EMPTY, empty: false };
    measure.branches(&syntax.alternatives, end, 0).map(|effort| effort.calls)
}

struct Measure {
    caseless: bool,
}

impl Measure {
    fn branches(&self, alternatives: &[Vec<PatternNode>], follow: Begin, at: usize) -> Result<Effort, BadPattern> {
        let mut all = Effort::NONE;
        // Only branches that begin with the same byte are tried together.
        let (mut ways, mut calls) = ([0_u64; 256], [0_u64; 256]);
        for sequence in alternatives {
            let effort = self.sequence(sequence, follow)?;
            let Begin { first, empty } = self.begin(sequence);
            for byte in (0..=u8::MAX).filter(|&byte| empty || first.contains(byte)) {
                let byte = usize::from(byte);
                ways[byte] = ways[byte].saturating_add(effort.ways);
                calls[byte] = calls[byte].saturating_add(effort.calls);
            }
            all.depth = all.depth.max(effort.depth);
            all.spread = all.spread.max(effort.spread);
        }
        all.ways = ways.into_iter().max().unwrap_or(1).max(1);
        all.calls = (alternatives.len() as u64).saturating_add(calls.into_iter().max().unwrap_or(0));
        all.depth += 1;
        within(all, at)
    }

    fn sequence(&self, sequence: &[PatternNode], follow: Begin) -> Result<Effort, BadPattern> {
        let mut all = Effort::NONE;
        for (index, node) in sequence.iter().enumerate() {
            let rest = self.begin(&sequence[index + 1..]);
            let next = Begin {
                first: if rest.empty { rest.first.union(follow.first) } else { rest.first },
                empty: rest.empty && follow.empty,
            };
            all = within(all.then(self.node(node, next)?), place(node))?;
        }
        Ok(all)
    }

    fn node(&self, node: &PatternNode, follow: Begin) -> Result<Effort, BadPattern> {
        match node {
            PatternNode::Byte(_)
            | PatternNode::Class(_)
            | PatternNode::Start
            | PatternNode::End
            | PatternNode::Border(_) => Ok(Effort::NONE),
            PatternNode::Group { alternatives, at, .. } => self.branches(alternatives, follow, *at),
            PatternNode::Look { alternatives, at, .. } => {
                let end = Begin { first: Class::EMPTY, empty: false };
                let effort = self.branches(alternatives, end, *at)?;
                Ok(Effort { ways: 1, calls: effort.calls + 1, depth: effort.depth + 1, ..effort })
            }
            PatternNode::Repeat { node, min, max, at, .. } => match &**node {
                PatternNode::Group { alternatives, at: group, .. } => {
                    let again = self.begin_of_group(alternatives);
                    let follow = Begin { first: follow.first.union(again.first), empty: follow.empty };
                    let once = self.branches(alternatives, follow, *group)?;
                    repeated(once, u64::from(*min), u64::from(max.unwrap_or(u32::MAX)), *at)
                }
                single => {
                    let class = self.cased(single.class().unwrap_or(Class::ALL));
                    Ok(of_bytes(class, u64::from(*min), max.map(u64::from), follow))
                }
            },
        }
    }

    /// With which bytes a sequence can begin.
    fn begin(&self, sequence: &[PatternNode]) -> Begin {
        let mut begin = Begin { first: Class::EMPTY, empty: true };
        for node in sequence {
            let of_node = match node {
                PatternNode::Byte(_) | PatternNode::Class(_) => {
                    Begin { first: node.class().unwrap_or(Class::ALL), empty: false }
                }
                // Nothing comes behind the end.
                PatternNode::End => Begin { first: Class::EMPTY, empty: false },
                PatternNode::Start | PatternNode::Border(_) | PatternNode::Look { .. } => {
                    Begin { first: Class::EMPTY, empty: true }
                }
                PatternNode::Group { alternatives, .. } => self.begin_of_group(alternatives),
                PatternNode::Repeat { node, min, .. } => {
                    let once = self.begin(std::slice::from_ref(node));
                    Begin { first: once.first, empty: once.empty || *min == 0 }
                }
            };
            begin = Begin { first: begin.first.union(self.cased(of_node.first)), empty: of_node.empty };
            if !begin.empty {
                break;
            }
        }
        begin
    }

    fn begin_of_group(&self, alternatives: &[Vec<PatternNode>]) -> Begin {
        let nothing = Begin { first: Class::EMPTY, empty: false };
        alternatives
            .iter()
            .map(|sequence| self.begin(sequence))
            .fold(nothing, |all, one| Begin { first: all.first.union(one.first), empty: all.empty || one.empty })
    }

    fn cased(&self, class: Class) -> Class {
        if self.caseless { class.caseless() } else { class }
    }
}

/// A repeat of single bytes. If the rest of the pattern cannot begin with one of them, only the longest repeat can
/// succeed.
fn of_bytes(class: Class, min: u64, max: Option<u64>, follow: Begin) -> Effort {
    let longest = max.unwrap_or(u64::MAX).min(min + LONGEST_TAG);
    let tries = longest - min + 1;
    if tries == 1 {
        return Effort::NONE;
    }
    let ways = if class.meets(follow.first) || follow.empty { tries } else { 1 };
    Effort { ways, calls: tries, depth: 1, spread: ways }
}

/// A repeated group, as that many copies in a row.
fn repeated(once: Effort, min: u64, max: u64, at: usize) -> Result<Effort, BadPattern> {
    let optional = Effort { ways: once.ways + 1, calls: once.calls + 1, depth: once.depth + 1, spread: once.spread };
    let mut all = Effort::NONE;
    for index in 0..max {
        all = within(all.then(if index < min { once } else { optional }), at)?;
    }
    Ok(all)
}

fn within(effort: Effort, at: usize) -> Result<Effort, BadPattern> {
    if effort.calls > MAX_CALLS || effort.depth > MAX_DEPTH || effort.spread > MAX_SPREAD {
        return Err(BadPattern::Effort(at));
    }
    Ok(effort)
}

fn place(node: &PatternNode) -> usize {
    match node {
        PatternNode::Group { at, .. } | PatternNode::Look { at, .. } | PatternNode::Repeat { at, .. } => *at,
        _ => 0,
    }
}
