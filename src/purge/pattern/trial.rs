//! A second net below `effort.rs`: the pattern is tested with Varnish's own limits.
//!
//! This is not a proof, and not needed if the bounds are right. It exists because an error in them costs a fleet.

use pcre2::bytes::{Regex, RegexBuilder};

use super::BadPattern;
use super::syntax::{PatternNode, Syntax};

/// The defaults of Varnish 7 (`varnishadm param.show`), as options before a pattern (pcre2pattern(3)). Without JIT both
/// apply; a Varnish without executable writable memory (SELinux) has no JIT.
const LIMITS: &str = "(*LIMIT_MATCH=10000)(*LIMIT_DEPTH=20)";

/// The most matcher calls over all subjects: some milliseconds.
const CALLS: u64 = 400_000;

/// Tests a pattern, one position of which costs at most `calls`, on tag lists made to provoke it.
///
/// # Errors
/// [`BadPattern::Effort`] if PCRE2 gives up.
pub(super) fn run(written: &str, syntax: &Syntax, calls: u64) -> Result<(), BadPattern> {
    let regex = limited(written)?;
    let length = usize::try_from(CALLS / calls.max(1)).unwrap_or(0).clamp(64, 4096);
    let gives_up = subjects(syntax, length).any(|subject| regex.is_match(&subject).is_err());
    if gives_up { Err(BadPattern::Effort(0)) } else { Ok(()) }
}

/// Compiles with Varnish's limits.
///
/// # Errors
/// [`BadPattern::Regex`] if it does not compile.
pub(crate) fn limited(written: &str) -> Result<Regex, BadPattern> {
    Ok(RegexBuilder::new().build(&format!("{LIMITS}{written}"))?)
}

/// Tag lists of about this length: Magento's, and repetitions of what the pattern itself matches, up to a last byte
/// that does not match.
fn subjects(syntax: &Syntax, length: usize) -> impl Iterator<Item = Vec<u8>> {
    let mut own = Vec::new();
    syntax.alternatives.iter().for_each(|sequence| sample(sequence, length, &mut own));
    let (first, last) = (own.first().copied().unwrap_or(b'a'), own.last().copied().unwrap_or(b'a'));
    let tags = (1..).map(|id: u32| format!("cat_p_{id},").into_bytes());
    let fill = move |pieces: &mut dyn Iterator<Item = Vec<u8>>| {
        let mut subject = Vec::with_capacity(length + 32);
        while subject.len() < length {
            subject.extend(pieces.next().filter(|piece| !piece.is_empty()).unwrap_or_else(|| vec![b',']));
        }
        subject.push(b'!');
        subject
    };
    let half = own[..own.len() / 2].to_vec();
    let tagged = [&own[..], b","].concat();
    [
        fill(&mut tags.into_iter()),
        fill(&mut std::iter::repeat(tagged)),
        fill(&mut std::iter::repeat(own)),
        fill(&mut std::iter::repeat(half)),
        vec![first; length],
        vec![last; length],
    ]
    .into_iter()
}

/// Something that the sequence matches, roughly.
fn sample(sequence: &[PatternNode], length: usize, out: &mut Vec<u8>) {
    for node in sequence {
        if out.len() >= length {
            return;
        }
        match node {
            PatternNode::Byte(byte) => out.push(*byte),
            PatternNode::Class(class) => {
                out.extend(class.bytes().find(|byte| byte.is_ascii_graphic() && *byte != b','));
            }
            PatternNode::Group { alternatives, .. } | PatternNode::Look { alternatives, .. } => {
                alternatives.iter().for_each(|sequence| sample(sequence, length, out));
            }
            PatternNode::Repeat { node, min, max, .. } => {
                let times = max.map_or(min + 2, |max| max.min(min + 2));
                (0..times).for_each(|_| sample(std::slice::from_ref(node), length, out));
            }
            PatternNode::Start | PatternNode::End | PatternNode::Border(_) => {}
        }
    }
}
