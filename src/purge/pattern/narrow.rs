//! Removes the parts of a pattern that would make Varnish read a whole tag header again and again.
//!
//! A *gap* is a repeat that can pass a comma and extend over a whole header: `.*`, `.+`, `[^x]*`. At each match of the
//! part before it, PCRE goes on to the end of the header and backtracks byte by byte. With one gap that is quadratic in
//! a length of 64 KiB, 2 s of a worker's time for each object; with two PCRE gives up, which fails an assertion in
//! Varnish 7.1.
//!
//! A gap at either end of a pattern has no effect (a search finds its position by itself), so it is left out without a
//! change of meaning: `.*foo.*` is `foo`. A gap in the middle cannot be kept. The pattern is then reduced to its more
//! specific side, which matches every page of the whole pattern and others too: `cat_p_.*cms_b_1` as `cat_p_`. Dropping
//! too much is slow, too little is wrong, and Magento ignores the answer to a purge.

use super::BadPattern;
use super::class::Class;
use super::syntax::{Alternatives, PatternNode, Syntax};

/// A repeat that passes commas and has more possible lengths than this is a gap.
const LONGEST_LEAP: u32 = 64;

/// Removes gaps. Returns whether the pattern matches more than before.
///
/// # Errors
/// [`BadPattern::Gap`] if the remaining part would not match every page of the original.
pub(super) fn narrow(syntax: &mut Syntax) -> Result<bool, BadPattern> {
    let is_wider = narrow_all(&mut syntax.alternatives, PatternEnds { head: true, tail: true })?;
    // A branch that finds everything leaves nothing to the others.
    let finds_all =
        |branch: &[PatternNode]| is_void(branch) || matches!(branch, [PatternNode::Start] | [PatternNode::End]);
    if syntax.alternatives.iter().any(|branch| finds_all(branch)) {
        syntax.alternatives = vec![Vec::new()];
    }
    Ok(is_wider)
}

/// Whether nothing at all matches it, wherever it stands.
fn is_void(sequence: &[PatternNode]) -> bool {
    sequence.iter().all(|node| match node {
        PatternNode::Group { alternatives, .. } => alternatives.iter().any(|branch| is_void(branch)),
        PatternNode::Repeat { min, .. } => *min == 0,
        _ => false,
    })
}

/// The ends of the pattern that a sequence touches.
#[derive(Clone, Copy)]
struct PatternEnds {
    head: bool,
    tail: bool,
}

fn narrow_all(alternatives: &mut Alternatives, ends: PatternEnds) -> Result<bool, BadPattern> {
    alternatives.iter_mut().try_fold(false, |is_wider, sequence| Ok(narrow_one(sequence, ends)? | is_wider))
}

fn narrow_one(sequence: &mut Vec<PatternNode>, ends: PatternEnds) -> Result<bool, BadPattern> {
    trim(sequence, ends);
    let is_wider = cut(sequence, ends)?;
    trim(sequence, ends);
    let last = sequence.len().saturating_sub(1);
    sequence.iter_mut().enumerate().try_fold(is_wider, |is_wider, (index, node)| {
        let inner = PatternEnds { head: ends.head && index == 0, tail: ends.tail && index == last };
        match node {
            PatternNode::Group { alternatives, .. } => Ok(narrow_all(alternatives, inner)? | is_wider),
            // What is not there once, or is there and must not be, has no side that could stand for it.
            PatternNode::Look { alternatives, .. } => {
                narrow_all(alternatives, PatternEnds { head: false, tail: false })
            }
            PatternNode::Repeat { node, .. } => match &mut **node {
                PatternNode::Group { alternatives, .. } => {
                    narrow_all(alternatives, PatternEnds { head: false, tail: false })
                }
                _ => Ok(false),
            },
            _ => Ok(false),
        }
        .map(|inner| inner | is_wider)
    })
}

/// Leaves out at the ends of the pattern what a search does by itself: there, only so many bytes count as must be.
fn trim(sequence: &mut Vec<PatternNode>, ends: PatternEnds) {
    if ends.tail {
        while trim_tail(sequence) {}
    }
    if ends.head {
        while trim_head(sequence) {}
    }
}

/// Says whether there was something to leave out.
fn trim_tail(sequence: &mut Vec<PatternNode>) -> bool {
    match &sequence[..] {
        // `.*` reaches the end.
        [.., last, PatternNode::End] if is_anything(last) => _ = sequence.pop(),
        [.., last] if has_slack(last) => drop_slack(sequence, sequence.len() - 1),
        _ => return false,
    }
    true
}

fn trim_head(sequence: &mut Vec<PatternNode>) -> bool {
    match &sequence[..] {
        [PatternNode::Start, first, ..] if is_anything(first) => _ = sequence.remove(0),
        [first, ..] if has_slack(first) => drop_slack(sequence, 0),
        _ => return false,
    }
    true
}

/// Whether it is a repeat of single bytes that can take more than it must.
fn has_slack(node: &PatternNode) -> bool {
    matches!(node, PatternNode::Repeat { node, min, max, .. } if node.class().is_some() && Some(*min) != *max)
}

fn drop_slack(sequence: &mut Vec<PatternNode>, at: usize) {
    match &mut sequence[at] {
        PatternNode::Repeat { min: 0, .. } => _ = sequence.remove(at),
        PatternNode::Repeat { min: 1, node, .. } => sequence[at] = node.as_ref().clone(),
        PatternNode::Repeat { min, max, .. } => *max = Some(*min),
        _ => {}
    }
}

/// `.*`: no header has a line feed.
fn is_anything(node: &PatternNode) -> bool {
    matches!(node, PatternNode::Repeat { node, min: 0, max: None, .. }
        if node.class().is_some_and(|class| Class::dot().complement().union(class) == Class::ALL))
}

fn is_gap(node: &PatternNode) -> bool {
    matches!(node, PatternNode::Repeat { node, min, max, .. }
        if max.is_none_or(|max| max - min > LONGEST_LEAP) && node.class().is_some_and(|class| class.contains(b',')))
}

/// Cuts a sequence at its gaps and keeps the part that can stand for the whole.
fn cut(sequence: &mut Vec<PatternNode>, ends: PatternEnds) -> Result<bool, BadPattern> {
    let Some(gap) = sequence.iter().find(|node| is_gap(node)) else { return Ok(false) };
    let at = match gap {
        PatternNode::Repeat { at, .. } => *at,
        _ => 0,
    };
    if !ends.head && !ends.tail {
        return Err(BadPattern::Gap(at));
    }
    let mut parts: Vec<Vec<PatternNode>> = sequence.split(is_gap).map(<[PatternNode]>::to_vec).collect();
    // What follows a group that stands first, or precedes one that stands last, must stay beside it.
    let kept = match ends {
        PatternEnds { head: true, tail: true } => {
            parts.into_iter().rev().max_by_key(|part| part.iter().map(telling).sum::<usize>())
        }
        PatternEnds { head: true, .. } => parts.pop(),
        PatternEnds { .. } => Some(parts.swap_remove(0)),
    };
    let kept = kept.filter(|part| part.iter().map(telling).sum::<usize>() > 0);
    // A part that matches the empty string would match every page.
    *sequence = kept.ok_or(BadPattern::Gap(at))?;
    Ok(true)
}

/// How much a node narrows a search down: roughly, its literals.
fn telling(node: &PatternNode) -> usize {
    let of_all = |alternatives: &Alternatives| {
        alternatives.iter().map(|sequence| sequence.iter().map(telling).sum()).min().unwrap_or(0)
    };
    match node {
        PatternNode::Byte(_) => 2,
        PatternNode::Class(class) => usize::from(class.len() < 128),
        PatternNode::Start | PatternNode::End | PatternNode::Border(_) | PatternNode::Look { .. } => 0,
        PatternNode::Group { alternatives, .. } => of_all(alternatives),
        PatternNode::Repeat { node, min, .. } => telling(node) * *min as usize,
    }
}
