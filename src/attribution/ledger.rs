//! The counts: bounded maps behind one lock.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use super::family::{Family, KNOWN_FAMILIES, OTHER, family};
use super::named::FAMILIES;
use super::{Ended, NamedTargets, Noted, PurgeRecord, PurgeReport, SourceTotal, Throttle, Total, WhatTotal, Wide};

/// The number of recent purges kept.
const NEWEST: usize = 100;

/// The number of sources kept, and the number of them with their own label.
const SOURCES: usize = 256;
const LABELLED: usize = 64;

/// All recorded data.
#[derive(Debug, Default)]
pub(super) struct PurgeHistory {
    newest: VecDeque<Arc<PurgeRecord>>,
    sources: BTreeMap<IpAddr, SourceHistory>,
    /// The sources that have a label.
    labelled: BTreeSet<IpAddr>,
    /// The named families of extensions.
    extensions: BTreeSet<Box<str>>,
    what: BTreeMap<Box<str>, Total>,
}

/// The record of one source.
#[derive(Debug)]
struct SourceHistory {
    total: Total,
    /// The throttles of the log, by wide target, and so bounded.
    told: BTreeMap<&'static str, Throttle>,
}

impl PurgeHistory {
    /// Records an accepted purge. Returns the counts and log lines due for it.
    pub(super) fn note(&mut self, source: IpAddr, mut named: NamedTargets, ended: Ended) -> Noted {
        named.families = self.by_name(named.families);
        for (what, tags) in &named.families {
            let is_wide = named.wide.iter().any(|wide| **wide == **what);
            count(self.what.entry(what.clone()).or_insert_with(Total::none), *tags, is_wide, ended.at_ms);
        }
        for what in &named.untagged {
            let is_wide = named.wide.contains(what);
            count(self.what.entry((*what).into()).or_insert_with(Total::none), 0, is_wide, ended.at_ms);
        }
        let told = self.of_source(source, &named, ended.at_ms);
        let families = named.families.iter().map(|(name, tags)| (name.clone(), *tags)).collect();
        let wide = named.wide.iter().zip(told).map(|(&what, left_out)| Wide { what, left_out }).collect();
        let noted = Noted { families, source: self.label(source), wide };
        if self.newest.len() == NEWEST {
            self.newest.pop_front();
        }
        self.newest.push_back(Arc::new(entry(source, named, ended)));
        noted
    }

    /// The same counts under a bounded set of names.
    fn by_name(&mut self, families: BTreeMap<Box<str>, u64>) -> BTreeMap<Box<str>, u64> {
        let mut by_name = BTreeMap::new();
        for (name, tags) in families {
            let has_name = matches!(family(&name), Family::Known(_)) || self.has_name(&name);
            *by_name.entry(if has_name { name } else { OTHER.into() }).or_default() += tags;
        }
        by_name
    }

    fn has_name(&mut self, extension: &str) -> bool {
        if extension == OTHER || self.extensions.contains(extension) {
            return true;
        }
        let has_room = self.extensions.len() < FAMILIES - KNOWN_FAMILIES;
        if has_room {
            self.extensions.insert(extension.into());
        }
        has_room
    }

    /// Counts the purge for its source. Returns for each wide target the number of suppressed lines if a line is due.
    fn of_source(&mut self, source: IpAddr, named: &NamedTargets, at_ms: u64) -> Vec<Option<u64>> {
        if self.sources.len() == SOURCES && !self.sources.contains_key(&source) {
            let unseen =
                self.sources.iter().min_by_key(|(_, known)| known.total.last_seen).map(|(address, _)| *address);
            unseen.and_then(|address| self.sources.remove(&address));
        }
        let new = || SourceHistory { total: Total::none(), told: BTreeMap::new() };
        let known = self.sources.entry(source).or_insert_with(new);
        count(&mut known.total, named.tags, !named.wide.is_empty(), at_ms);
        named.wide.iter().map(|what| known.told.entry(what).or_default().pass(at_ms)).collect()
    }

    fn label(&mut self, source: IpAddr) -> String {
        if self.labelled.len() < LABELLED {
            self.labelled.insert(source);
        }
        if self.labelled.contains(&source) { source.to_string() } else { OTHER.to_owned() }
    }

    /// The complete report.
    pub(super) fn report(&self) -> PurgeReport {
        let sources = self.sources.iter().map(|(&source, known)| SourceTotal { source, total: known.total.clone() });
        let what = self.what.iter().map(|(what, total)| WhatTotal { what: what.clone(), total: total.clone() });
        PurgeReport {
            sources: sources.collect(),
            what: what.collect(),
            newest: self.newest.iter().rev().cloned().collect(),
        }
    }
}

impl Total {
    fn none() -> Self {
        Total { purges: 0, tags: 0, wide: 0, last_seen: 0 }
    }
}

fn count(total: &mut Total, tags: u64, is_wide: bool, at_ms: u64) {
    total.purges += 1;
    total.tags += tags;
    total.wide += u64::from(is_wide);
    total.last_seen = total.last_seen.max(at_ms);
}

fn entry(source: IpAddr, named: NamedTargets, ended: Ended) -> PurgeRecord {
    let NamedTargets { kind, soft, tags, families, wide, sample, .. } = named;
    let Ended { position, at_ms, took, result, applied, fenced, invalidated } = ended;
    let duration_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    PurgeRecord {
        position,
        at_ms,
        source,
        kind,
        soft,
        tags,
        families,
        wide,
        sample,
        result,
        applied,
        fenced,
        invalidated,
        duration_ms,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::purge::{Purge, Target};

    fn ended(position: u64, at_ms: u64) -> Ended {
        let took = Duration::from_millis(7);
        Ended { position, at_ms, took, result: "applied", applied: 2, fenced: vec![], invalidated: 0 }
    }

    fn tags(tags: &[&str]) -> NamedTargets {
        NamedTargets::of(&Purge { targets: vec![Target::Tags(tags.iter().copied().collect())], soft: false })
    }

    fn address(number: u32) -> IpAddr {
        IpAddr::V4(std::net::Ipv4Addr::from_bits(0x0a00_0000 + number))
    }

    #[test]
    fn a_purge_is_counted_for_its_source_and_for_what_it_names() {
        let mut ledger = PurgeHistory::default();
        let noted = ledger.note(address(1), tags(&["cat_p", "cat_p_1", "cms_b_x"]), ended(1, 5000));
        assert_eq!(noted.families, [("cat_p".into(), 2), ("cms_b".into(), 1)]);
        assert_eq!(noted.source, "10.0.0.1");
        assert_eq!(noted.wide, [Wide { what: "cat_p", left_out: Some(0) }]);
        let flush = NamedTargets::of(&Purge { targets: vec![Target::Everything], soft: true });
        assert_eq!(ledger.note(address(2), flush, ended(2, 6000)).wide[0].what, "everything");
        ledger.note(address(1), tags(&["cat_p_9"]), ended(3, 7000));

        let report = ledger.report();
        let flat = |total: &Total| (total.purges, total.tags, total.wide, total.last_seen);
        let sources: Vec<_> = report.sources.iter().map(|row| (row.source, flat(&row.total))).collect();
        assert_eq!(sources, [(address(1), (2, 4, 1, 7000)), (address(2), (1, 0, 1, 6000))]);
        let what: Vec<_> = report.what.iter().map(|row| (&*row.what, flat(&row.total))).collect();
        let expected = [("cat_p", (2, 3, 1, 7000)), ("cms_b", (1, 1, 0, 5000)), ("everything", (1, 0, 1, 6000))];
        assert_eq!(what, expected);
        let newest: Vec<_> = report.newest.iter().map(|entry| (entry.position, entry.kind, entry.soft)).collect();
        assert_eq!(newest, [(3, "tags", false), (2, "everything", true), (1, "tags", false)]);
    }

    #[test]
    fn an_entry_says_when_and_what_in_words_that_tools_read() {
        let mut ledger = PurgeHistory::default();
        ledger.note(address(1), tags(&["cat_p_1"]), ended(4, 1_792_000_000_123));
        let json = serde_json::to_value(ledger.report()).unwrap();
        let expected = serde_json::json!({
            "position": 4, "time": "2026-10-14T17:46:40.123Z", "source": "10.0.0.1", "kind": "tags", "soft": false,
            "tags": 1, "families": {"cat_p": 1}, "wide": [], "sample": ["cat_p_1"], "result": "applied", "applied": 2,
            "fenced": [], "invalidated": 0, "duration_ms": 7,
        });
        assert_eq!(json["newest"][0], expected);
        assert_eq!(json["sources"][0]["last_seen"], "2026-10-14T17:46:40.123Z");
    }

    #[test]
    fn everything_is_bounded_and_the_least_recently_seen_source_is_evicted() {
        let mut ledger = PurgeHistory::default();
        let mut labels = BTreeSet::new();
        let mut families = BTreeSet::new();
        for number in 0..1000 {
            // The first source returns again and again.
            ledger.note(address(0), tags(&["cat_p"]), ended(1, u64::from(number)));
            let noted = ledger.note(address(number), tags(&[&format!("x{number}x_1")]), ended(1, u64::from(number)));
            labels.insert(noted.source);
            families.extend(noted.families.into_iter().map(|(name, _)| name));
        }
        let report = ledger.report();
        assert_eq!((report.sources.len(), report.newest.len()), (SOURCES, NEWEST));
        let has = |number| report.sources.iter().any(|row| row.source == address(number));
        assert!(has(0) && has(999) && !has(1));
        assert_eq!((labels.len(), families.len()), (LABELLED + 1, FAMILIES - KNOWN_FAMILIES + 1));
        assert!(labels.contains("other") && families.contains("other"));
        // A family of Magento's is named however many others came first.
        assert_eq!(ledger.note(address(1), tags(&["cms_p_1"]), ended(1, 1)).families, [("cms_p".into(), 1)]);
    }

    #[test]
    fn a_storm_is_one_line_a_second_for_each_source_and_thing() {
        let mut ledger = PurgeHistory::default();
        let mut left_out =
            |source, tag, at_ms| ledger.note(address(source), tags(&[tag]), ended(1, at_ms)).wide[0].left_out;
        assert_eq!(left_out(1, "cat_p", 5000), Some(0));
        assert_eq!(left_out(1, "cat_p", 5500), None);
        assert_eq!(left_out(1, "cat_c", 5500), Some(0));
        assert_eq!(left_out(2, "cat_p", 5500), Some(0));
        assert_eq!(left_out(1, "cat_p", 6000), Some(1));
    }
}
