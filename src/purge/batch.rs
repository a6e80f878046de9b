//! Compiles the purges between a cursor and the head into the bans for one Varnish.
//!
//! There are three forms, because VCLs match tags in three ways. A VCL that pastes the pattern into a ban takes any
//! regular expression, so it gets the cheapest one for the whole set. A VCL that parses the pattern knows only
//! Magento's form. A VCL with vmod_xkey looks tags up in an index and gets them unchanged.
//!
//! In each form, the bans of a batch drop exactly the pages that its purges name.

use std::collections::BTreeSet;

use super::tags::{self, AFTER, BEFORE};
use super::{Forward, Pattern, Purge, Target, trie};
use crate::fleet::PurgeDialect;

/// One instruction to one Varnish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ban {
    /// Drop every page whose tag header matches.
    Tags {
        /// The regular expression, one word, within the header limit.
        pattern: String,
        /// Keep the pages for grace if the node supports it.
        soft: bool,
    },
    /// Drop every page with one of these keys.
    Keys {
        /// The keys, separated by blanks, within the header limit.
        keys: String,
        /// Keep the pages for grace.
        soft: bool,
    },
    /// Drop every page whose `X-Pool` header matches.
    Pool {
        /// The regular expression, one word, within the header limit.
        pattern: String,
        /// Keep the pages for grace if the node supports it.
        soft: bool,
    },
    /// Drop every page: for a node with a gap in its history, or one that missed more than is worth replaying. Stronger
    /// than Magento's flush, which keeps pages without tags.
    Everything,
    /// Repeat this request.
    Forward(Forward),
}

/// The bans of one Varnish for some purges.
#[derive(Debug, PartialEq, Eq)]
pub struct CompiledBans {
    /// In any order.
    pub bans: Vec<Ban>,
    /// The number of tags in the purges minus those written into the bans: the saving by uniting and absorbing.
    pub folded: u64,
}

impl Ban {
    /// Whether this adds an entry to Varnish's ban list. xkey purges do not; for forwarded requests we cannot tell.
    pub fn is_listed(&self) -> bool {
        match self {
            Ban::Tags { .. } | Ban::Pool { .. } | Ban::Everything => true,
            Ban::Keys { .. } | Ban::Forward(_) => false,
        }
    }
}

/// The targets of purges of one kind, soft or hard.
#[derive(Default)]
struct Union<'p> {
    everything: bool,
    tags: Vec<&'p str>,
    patterns: BTreeSet<&'p Pattern>,
    pools: BTreeSet<&'p Pattern>,
}

/// Compiles purges into the fewest bans of this form: tag sets united, equal patterns merged, tags and patterns
/// absorbed by a flush, and everything by a flush of all pages. Soft and hard purges stay separate, except that a hard
/// purge makes the same soft one redundant.
///
/// `header_limit` is the longest header value in bytes that the node takes. A tag set is split there; a single tag or
/// pattern that is longer cannot be, so the whole batch becomes [`Ban::Everything`]: too much dropped is slow, too
/// little is wrong.
pub fn compile<'p>(
    purges: impl IntoIterator<Item = &'p Purge>,
    delivery: PurgeDialect,
    header_limit: usize,
) -> CompiledBans {
    let (mut hard, mut soft) = (Union::default(), Union::default());
    let (mut all, mut forwards) = (false, BTreeSet::new());
    for purge in purges {
        let union = if purge.soft { &mut soft } else { &mut hard };
        for target in &purge.targets {
            match target {
                Target::All => all = true,
                Target::Everything => union.everything = true,
                Target::Tags(tags) => union.tags.extend(tags.iter()),
                Target::Pattern(pattern) => _ = union.patterns.insert(pattern),
                Target::Pool(pattern) => _ = union.pools.insert(pattern),
                Target::Forward(forward) => _ = forwards.insert(forward),
            }
        }
    }
    let named = hard.tags.len() + soft.tags.len();
    hard.absorb();
    soft.absorb();
    soft.without(&hard);
    let mut bans = Vec::new();
    let mut written = hard.tags.len() + soft.tags.len();
    let fits = !all
        && hard.write(false, delivery, header_limit, &mut bans).is_some()
        && soft.write(true, delivery, header_limit, &mut bans).is_some();
    if !fits {
        bans = vec![Ban::Everything];
        written = 0;
    }
    bans.extend(forwards.into_iter().cloned().map(Ban::Forward));
    CompiledBans { bans, folded: (named - written) as u64 }
}

impl Union<'_> {
    /// Sorts the tags, drops duplicates and what a flush covers. A flush concerns tags only: pools are other pages.
    fn absorb(&mut self) {
        if self.everything {
            self.tags.clear();
            self.patterns.clear();
        }
        tags::sort(&mut self.tags);
    }

    /// Drops what the other union, also sorted, already has.
    fn without(&mut self, other: &Union<'_>) {
        if other.everything {
            self.everything = false;
            self.tags.clear();
            self.patterns.clear();
        }
        let mut others = other.tags.iter().peekable();
        self.tags.retain(|tag| {
            while others.next_if(|other| *other < tag).is_some() {}
            others.peek() != Some(&tag)
        });
        self.patterns.retain(|pattern| !other.patterns.contains(pattern));
        self.pools.retain(|pattern| !other.pools.contains(pattern));
    }

    /// `None` where something does not fit into a header.
    fn write(&self, soft: bool, delivery: PurgeDialect, header_limit: usize, bans: &mut Vec<Ban>) -> Option<()> {
        let tags = |pattern| Ban::Tags { pattern, soft };
        if self.everything {
            bans.push(tags(".*".to_owned()));
        }
        match delivery {
            PurgeDialect::Magento => bans.extend(trie::patterns(&self.tags, header_limit)?.into_iter().map(tags)),
            PurgeDialect::MagentoPlain => bans.extend(plain_patterns(&self.tags, header_limit)?.into_iter().map(tags)),
            PurgeDialect::Xkey => {
                let (keys, others): (Vec<&str>, Vec<&str>) = self.tags.iter().partition(|tag| is_key(tag));
                let keys = joined(&keys, " ", header_limit, String::push_str)?;
                bans.extend(keys.into_iter().map(|keys| Ban::Keys { keys, soft }));
                bans.extend(trie::patterns(&others, header_limit)?.into_iter().map(tags));
            }
        }
        for pattern in &self.patterns {
            bans.push(tags(within(pattern, header_limit)?));
        }
        for pattern in &self.pools {
            bans.push(Ban::Pool { pattern: within(pattern, header_limit)?, soft });
        }
        Some(())
    }
}

fn within(pattern: &Pattern, header_limit: usize) -> Option<String> {
    let pattern = pattern.as_str();
    (pattern.len() <= header_limit).then(|| pattern.to_owned())
}

/// Whether vmod_xkey takes this as one key: it splits at blanks, tabs and commas, and no tag has the last two.
fn is_key(tag: &str) -> bool {
    !tag.contains(char::is_whitespace)
}

/// The tags in Magento's form, with characters escaped that would end the word in a ban.
fn plain_patterns(tags: &[&str], header_limit: usize) -> Option<Vec<String>> {
    joined(tags, "|", header_limit.min(trie::MAX_PATTERN), |out, tag| {
        out.push_str(BEFORE);
        trie::push_literal(out, tag);
        out.push_str(AFTER);
    })
}

/// The tags, each written by `write`, joined into texts no longer than the limit; `None` if a single tag is longer.
fn joined(tags: &[&str], between: &str, limit: usize, write: impl Fn(&mut String, &str)) -> Option<Vec<String>> {
    let mut texts = Vec::new();
    let mut open = String::new();
    for tag in tags {
        let end = open.len();
        if end > 0 {
            open.push_str(between);
        }
        write(&mut open, tag);
        if end > 0 && open.len() > limit {
            let next = open.split_off(end + between.len());
            open.truncate(end);
            texts.push(std::mem::replace(&mut open, next));
        }
        if open.len() > limit {
            return None;
        }
    }
    if !open.is_empty() {
        texts.push(open);
    }
    Some(texts)
}

#[cfg(test)]
mod tests;
