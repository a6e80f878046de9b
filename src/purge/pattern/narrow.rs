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
use super::syntax::{Alternatives, Node, Syntax};

/// A repeat that passes commas and has more possible lengths than this is a gap.
const LONGEST_LEAP: u32 = 64;

/// Removes gaps. Returns whether the pattern matches more than before.
///
/// # Errors
/// [`BadPattern::Gap`] if the remaining part would not match every page of the original.
pub(super) fn narrow(syntax: &mut Syntax) -> Result<bool, BadPattern> {
    let is_wider = narrow_all(&mut syntax.alternatives, Ends { head: true, tail: true })?;
    // A branch that matches everything makes the others redundant.
    let finds_all = |branch: &[Node]| is_void(branch) || matches!(branch, [Node::Start] | [Node::End]);
    if syntax.alternatives.iter().any(|branch| finds_all(branch)) {
        syntax.alternatives = vec![Vec::new()];
    }
    Ok(is_wider)
}

/// Whether it matches the empty string at any position.
fn is_void(sequence: &[Node]) -> bool {
    sequence.iter().all(|node| match node {
        Node::Group { alternatives, .. } => alternatives.iter().any(|branch| is_void(branch)),
        Node::Repeat { min, .. } => *min == 0,
        _ => false,
    })
}

/// The ends of the pattern that a sequence touches.
#[derive(Clone, Copy)]
struct Ends {
    head: bool,
    tail: bool,
}

fn narrow_all(alternatives: &mut Alternatives, ends: Ends) -> Result<bool, BadPattern> {
    alternatives.iter_mut().try_fold(false, |is_wider, sequence| Ok(narrow_one(sequence, ends)? | is_wider))
}

fn narrow_one(sequence: &mut Vec<Node>, ends: Ends) -> Result<bool, BadPattern> {
    trim(sequence, ends);
    let is_wider = cut(sequence, ends)?;
    trim(sequence, ends);
    let last = sequence.len().saturating_sub(1);
    sequence.iter_mut().enumerate().try_fold(is_wider, |is_wider, (index, node)| {
        let inner = Ends { head: ends.head && index == 0, tail: ends.tail && index == last };
        match node {
            Node::Group { alternatives, .. } => Ok(narrow_all(alternatives, inner)? | is_wider),
            // An assertion or a repeated group has no side that could replace it.
            Node::Look { alternatives, .. } => narrow_all(alternatives, Ends { head: false, tail: false }),
            Node::Repeat { node, .. } => match &mut **node {
                Node::Group { alternatives, .. } => narrow_all(alternatives, Ends { head: false, tail: false }),
                _ => Ok(false),
            },
            _ => Ok(false),
        }
        .map(|inner| inner | is_wider)
    })
}

/// Simplifies the ends of the pattern: in a search, only the required bytes of a repeat count there.
fn trim(sequence: &mut Vec<Node>, ends: Ends) {
    if ends.tail {
        while trim_tail(sequence) {}
    }
    if ends.head {
        while trim_head(sequence) {}
    }
}

/// Returns whether anything was removed.
fn trim_tail(sequence: &mut Vec<Node>) -> bool {
    match &sequence[..] {
        // `.*` reaches the end by itself.
        [.., last, Node::End] if is_anything(last) => _ = sequence.pop(),
        [.., last] if has_slack(last) => drop_slack(sequence, sequence.len() - 1),
        _ => return false,
    }
    true
}

fn trim_head(sequence: &mut Vec<Node>) -> bool {
    match &sequence[..] {
        [Node::Start, first, ..] if is_anything(first) => _ = sequence.remove(0),
        [first, ..] if has_slack(first) => drop_slack(sequence, 0),
        _ => return false,
    }
    true
}

/// Whether it is a repeat of single bytes that can take more than its minimum.
fn has_slack(node: &Node) -> bool {
    matches!(node, Node::Repeat { node, min, max, .. } if node.class().is_some() && Some(*min) != *max)
}

fn drop_slack(sequence: &mut Vec<Node>, at: usize) {
    match &mut sequence[at] {
        Node::Repeat { min: 0, .. } => _ = sequence.remove(at),
        Node::Repeat { min: 1, node, .. } => sequence[at] = node.as_ref().clone(),
        Node::Repeat { min, max, .. } => *max = Some(*min),
        _ => {}
    }
}

/// `.*`: no header has a line feed.
fn is_anything(node: &Node) -> bool {
    matches!(node, Node::Repeat { node, min: 0, max: None, .. }
        if node.class().is_some_and(|class| Class::dot().complement().union(class) == Class::ALL))
}

fn is_gap(node: &Node) -> bool {
    matches!(node, Node::Repeat { node, min, max, .. }
        if max.is_none_or(|max| max - min > LONGEST_LEAP) && node.class().is_some_and(|class| class.contains(b',')))
}

/// Splits a sequence at its gaps and keeps the part that can replace the whole.
fn cut(sequence: &mut Vec<Node>, ends: Ends) -> Result<bool, BadPattern> {
    let Some(gap) = sequence.iter().find(|node| is_gap(node)) else { return Ok(false) };
    let at = match gap {
        Node::Repeat { at, .. } => *at,
        _ => 0,
    };
    if !ends.head && !ends.tail {
        return Err(BadPattern::Gap(at));
    }
    let mut parts: Vec<Vec<Node>> = sequence.split(is_gap).map(<[Node]>::to_vec).collect();
    // If text follows the group, the part next to it must stay, which is the last; if text precedes the group, the
    // first.
    let kept = match ends {
        Ends { head: true, tail: true } => {
            parts.into_iter().rev().max_by_key(|part| part.iter().map(telling).sum::<usize>())
        }
        Ends { head: true, .. } => parts.pop(),
        Ends { .. } => Some(parts.swap_remove(0)),
    };
    let kept = kept.filter(|part| part.iter().map(telling).sum::<usize>() > 0);
    // A part that matches the empty string would match every page.
    *sequence = kept.ok_or(BadPattern::Gap(at))?;
    Ok(true)
}

/// How much a node narrows a search: roughly, its literals.
fn telling(node: &Node) -> usize {
    let of_all = |alternatives: &Alternatives| {
        alternatives.iter().map(|sequence| sequence.iter().map(telling).sum()).min().unwrap_or(0)
    };
    match node {
        Node::Byte(_) => 2,
        Node::Class(class) => usize::from(class.len() < 128),
        Node::Start | Node::End | Node::Border(_) | Node::Look { .. } => 0,
        Node::Group { alternatives, .. } => of_all(alternatives),
        Node::Repeat { node, min, .. } => telling(node) * *min as usize,
    }
}
