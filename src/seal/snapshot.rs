//! A table of purged names as bytes, for a replica that joins.
//!
//! ```text
//! a line of JSON: journal, head, floor, ... and the number of buckets
//! then for each bucket that is not empty: its number (u32), its floor and its entries (u64 each), little-endian
//! ```
//!
//! The table is sent as it is, since its entries have only a part of each name's hash: whoever gets it keeps it beside its
//! own ([`PurgedNames::inherit`]). Read while it is written to, it has every purge up to its head, and perhaps more.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{Lineage, Name, PastNames, Position, PurgedNames};
use crate::purge::index::{Index, WAYS};

/// The most names that a table is made for (`journal.names`), each with a bucket: it takes a GiB, and as much to be sent.
pub const MAX_NAMES: usize = 1 << 24;

/// Room for everything but the names: 4,096 runs.
const MAX_HEAD: usize = 1 << 20;

/// The length of a bucket.
const ROW: usize = 4 + 8 * (1 + WAYS);

/// Everything but the names.
#[derive(Serialize, Deserialize)]
struct SnapshotHead {
    lineage: Lineage,
    head: Position,
    floor: Position,
    all: Position,
    tagged: Position,
    unsealable: Vec<Name>,
    buckets: usize,
    /// How many buckets follow.
    rows: usize,
}

impl PurgedNames {
    /// The most bytes of a table of [as many names as are allowed](MAX_NAMES), without the tags of blocks.
    pub const MAX_ENCODED: usize = MAX_NAMES * ROW + MAX_HEAD;

    /// Appends the table as bytes. Takes a moment if there are many names.
    ///
    /// # Errors
    /// None that is known: the head is numbers and texts.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), serde_json::Error> {
        // The head first: what is recorded meanwhile is in the table without being claimed.
        let mut head = SnapshotHead {
            lineage: self.lineage.clone(),
            head: self.head(),
            floor: self.floor.load(Ordering::Acquire),
            all: self.all.load(Ordering::Acquire),
            tagged: self.tagged.load(Ordering::Acquire),
            unsealable: self.unsealable.all(),
            buckets: self.names.buckets(),
            rows: self.names.buckets(),
        };
        let start = out.len();
        // How many rows there are turns out at the end: there is room for the largest number, and blanks in what is left.
        serde_json::to_writer(&mut *out, &head)?;
        let end = out.len();
        out.push(b'\n');
        let rows = out.len();
        // Once, as a buffer that grows is twice in memory; what is not written to takes none.
        out.reserve_exact(self.names.buckets() * ROW);
        for (bucket, row) in self.names.rows() {
            out.extend_from_slice(&u32::try_from(bucket).unwrap_or(u32::MAX).to_le_bytes());
            row.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
        }
        head.rows = (out.len() - rows) / ROW;
        let (known, blanks) = (serde_json::to_vec(&head)?, b' ');
        out[start..end].fill(blanks);
        out[start..start + known.len()].copy_from_slice(&known);
        Ok(())
    }

    /// The table with these bytes; `None` if they are not one.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let end = memchr::memchr(b'\n', bytes)?;
        let (head, follow) = (&bytes[..end], &bytes[end + 1..]);
        let SnapshotHead { lineage, head, floor, all, tagged, unsealable, buckets, rows } =
            serde_json::from_slice(head).ok()?;
        if buckets > MAX_NAMES || Some(follow.len()) != rows.checked_mul(ROW) {
            return None;
        }
        let mut names = Index::new(buckets);
        for row in follow.as_chunks::<ROW>().0 {
            let (bucket, values) = row.split_first_chunk()?;
            let mut values = values.as_chunks().0.iter().map(|value| u64::from_le_bytes(*value));
            let row = std::array::from_fn(|_| values.next().unwrap_or_default());
            if !names.set_row(u32::from_le_bytes(*bucket) as usize, row) {
                return None;
            }
        }
        let remembered = PastNames { head, floor, keys: Vec::new(), all, tagged, unsealable };
        Some(PurgedNames::of(lineage, names, &remembered))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Judgement, MAX_STAMPS, Run, Seal, StaleBecause, write_seal};
    use super::*;
    use crate::purge::{Purge, TagSet, Target};

    fn table(journal: u64) -> PurgedNames {
        PurgedNames::new(Lineage::new(journal, Run(1), vec![]), 1_000, &PastNames::default())
    }

    fn purge(tag: &str) -> Purge {
        Purge { targets: vec![Target::Tags([tag].into_iter().collect::<TagSet>())], soft: false }
    }

    /// The table as another replica has it.
    fn sent(table: &PurgedNames) -> PurgedNames {
        let mut bytes = b"before it".to_vec();
        let start = bytes.len();
        table.encode(&mut bytes).unwrap();
        PurgedNames::decode(&bytes[start..]).unwrap()
    }

    /// Judges, by `table`, a page with this tag that these tables have sealed.
    fn judge(table: &PurgedNames, tag: &str, sealed_by: &[&PurgedNames]) -> Judgement {
        let mut text = Vec::new();
        let stamps = sealed_by.iter().map(|table| table.stamp());
        write_seal(&mut text, stamps, 1, &mut vec![Name::of_tag(tag.as_bytes())]);
        table.judge(&Seal::parse(&text, table.lineage.journal()).unwrap(), b"/", table.head())
    }

    #[test]
    fn a_table_comes_over_whole_or_not_at_all() {
        let sent = table(7);
        (1..500).for_each(|n| sent.note(n, &purge(&n.to_string())));
        sent.unsealable().settle(&[Name::of_tag(b"block")]);
        let mut bytes = Vec::new();
        sent.encode(&mut bytes).unwrap();
        let got = PurgedNames::decode(&bytes).unwrap();
        assert_eq!((got.head(), got.lineage(), got.unsealable().all()), (499, sent.lineage(), sent.unsealable().all()));
        assert!(sent.names.rows().eq(got.names.rows()));
        for end in 0..bytes.len().min(400) {
            assert!(PurgedNames::decode(&bytes[..end]).is_none(), "cut after {end}");
        }
        assert!(PurgedNames::decode(&bytes[..bytes.len() - 1]).is_none());
    }

    #[test]
    fn pages_from_before_a_replica_joined_are_judged_by_what_the_others_knew() {
        let (older, old) = (table(1), table(2));
        older.note(1, &purge("a"));
        old.note(1, &purge("b"));
        let joined = table(3);
        // Nobody has told it of the others yet.
        assert_eq!(judge(&joined, "x", &[&old]), Judgement::Stale(StaleBecause::Foreign));
        let before = [table(1), table(2)];
        joined.inherit("older".into(), sent(&older));
        joined.inherit("old".into(), sent(&old));
        let stale = Judgement::Stale(StaleBecause::Forgotten);
        let both = [&older, &old];
        assert_eq!(["a", "b", "x"].map(|tag| judge(&joined, tag, &both)), [Judgement::Fresh; 3]);
        let both = [&before[0], &before[1]];
        assert_eq!(["a", "b", "x"].map(|tag| judge(&joined, tag, &both)), [stale, stale, Judgement::Fresh]);
        // What only the other one knows of may be newer than the page.
        assert_eq!(judge(&joined, "b", &[&older]), stale);
        assert_eq!(judge(&joined, "x", &[&table(9)]), Judgement::Stale(StaleBecause::Foreign));
        joined.note(1, &purge("x"));
        assert_eq!(judge(&joined, "x", &both), Judgement::Stale(StaleBecause::Purged(1)));
        let all = [&before[0], &before[1], &joined];
        assert_eq!(judge(&joined, "x", &all), Judgement::Fresh);
        // Purges were missed here since.
        joined.forget_up_to(5);
        assert_eq!(judge(&joined, "y", &both), Judgement::Stale(StaleBecause::Foreign));
    }

    #[test]
    fn a_purge_that_only_others_know_is_seen_until_it_has_come() {
        let (before, other) = (table(1), table(2));
        before.note(1, &purge("a"));
        let page = |tag: &str, stamps: &[&PurgedNames]| {
            let mut text = Vec::new();
            let stamps = stamps.iter().map(|table| table.stamp());
            write_seal(&mut text, stamps, 1, &mut vec![Name::of_tag(tag.as_bytes())]);
            text
        };
        let both = ["a", "b"].map(|tag| page(tag, &[&before, &other]));
        let alone = ["a", "b"].map(|tag| page(tag, &[&before]));
        // This one did not run then.
        other.note(1, &purge("b"));
        let past = PastNames { head: before.head(), ..PastNames::default() };
        let now = PurgedNames::new(Lineage::new(1, Run(2), vec![(Run(1), before.head())]), 1_000, &past);
        let verdicts = |pages: &[Vec<u8>; 2]| {
            pages.each_ref().map(|text| now.judge(&Seal::parse(text, 1).unwrap(), b"/", now.head()))
        };
        assert_eq!(verdicts(&both), [Judgement::Fresh; 2]);
        now.inherit("other".into(), sent(&other));
        let stale = Judgement::Stale(StaleBecause::Forgotten);
        assert_eq!((verdicts(&both), verdicts(&alone)), ([Judgement::Fresh, stale], [Judgement::Fresh, stale]));
        // What this process has sealed was rendered after that purge.
        let new = ["a", "b"].map(|tag| page(tag, &[&now]));
        assert_eq!(verdicts(&new), [Judgement::Fresh; 2]);
        now.note(2, &purge("b"));
        now.set_caught_up();
        let purged = Judgement::Stale(StaleBecause::Purged(2));
        assert_eq!((verdicts(&both), verdicts(&new)), ([Judgement::Fresh, purged], [Judgement::Fresh, purged]));
    }

    #[test]
    fn what_is_heard_of_others_is_kept_by_journal_and_does_not_go_back() {
        let (here, other) = (table(1), Lineage::new(2, Run(5), vec![]));
        assert!(here.heard().is_none());
        here.hear(here.stamp());
        [4, 7, 6].into_iter().for_each(|position| here.hear(other.stamp(position)));
        assert_eq!(*here.heard().unwrap(), [other.stamp(7)]);
        let restarted = Lineage::new(2, Run(6), vec![]);
        here.hear(restarted.stamp(3));
        assert_eq!(*here.heard().unwrap(), [restarted.stamp(3)]);
        (3..6).for_each(|journal| here.hear(Lineage::new(journal, Run(1), vec![]).stamp(1)));
        here.forget_journals_but(&[2]);
        assert_eq!(here.heard().unwrap().iter().map(|stamp| stamp.journal).collect::<Vec<_>>(), [2, 4, 5]);
        (10..99).for_each(|journal| here.hear(Lineage::new(journal, Run(1), vec![]).stamp(1)));
        assert_eq!(here.heard().unwrap().len(), MAX_STAMPS - 2);
    }
}
