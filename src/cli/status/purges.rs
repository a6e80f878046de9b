//! `clearcoat status --purges`: who empties the cache, and what they name. Two short tables, the busiest first, of all
//! clearcoats together: a shop that sends its purges to several by turns is one sender.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{printable, push_table};

/// How many rows a table has at most: those at the end purge next to nothing.
const ROWS: usize = 20;

/// The fields of `/api/v1/purges/all` that the tables show.
#[derive(Debug, Deserialize)]
pub(super) struct FleetPurges {
    replicas: Vec<OfReplica>,
    /// The clearcoats that have not said what was sent to them.
    missing: Vec<MissingReplica>,
}

#[derive(Debug, Deserialize)]
struct OfReplica {
    purges: Purges,
}

#[derive(Debug, Deserialize)]
struct MissingReplica {
    id: String,
    problem: String,
}

#[derive(Debug, Deserialize)]
struct Purges {
    sources: Vec<SourceRow>,
    what: Vec<WhatRow>,
}

#[derive(Debug, Deserialize)]
struct SourceRow {
    source: String,
    #[serde(flatten)]
    total: TotalCells,
}

#[derive(Debug, Deserialize)]
struct WhatRow {
    what: String,
    #[serde(flatten)]
    total: TotalCells,
}

#[derive(Debug, Default, Deserialize)]
struct TotalCells {
    purges: u64,
    tags: u64,
    wide: u64,
    last_seen: String,
}

impl TotalCells {
    fn add(&mut self, other: TotalCells) {
        self.purges += other.purges;
        self.tags += other.tags;
        self.wide += other.wide;
        // Texts of one form, which are ordered as their times are.
        self.last_seen = std::mem::take(&mut self.last_seen).max(other.last_seen);
    }
}

impl FleetPurges {
    pub(super) fn tables(self) -> String {
        let (mut who, mut what) = (BTreeMap::new(), BTreeMap::new());
        for OfReplica { purges: Purges { sources, what: named } } in self.replicas {
            sources.into_iter().for_each(|row| add(&mut who, row.source, row.total));
            named.into_iter().for_each(|row| add(&mut what, row.what, row.total));
        }
        let mut text = format!("{}\n{}", table("SOURCE", who), table("WHAT", what));
        for MissingReplica { id, problem } in self.missing {
            text.push('\n');
            text.push_str(&printable(&format!("Not in these tables: what was sent to {id} ({problem})")));
            text.push('\n');
        }
        text
    }
}

fn add(totals: &mut BTreeMap<String, TotalCells>, name: String, total: TotalCells) {
    totals.entry(name).or_default().add(total);
}

/// Sorted by the number of wide purges, then of all purges, the largest first.
fn table(name: &str, totals: BTreeMap<String, TotalCells>) -> String {
    let mut rows: Vec<(String, TotalCells)> = totals.into_iter().collect();
    rows.sort_by(|(a, of_a), (b, of_b)| (of_b.wide, of_b.purges).cmp(&(of_a.wide, of_a.purges)).then_with(|| a.cmp(b)));
    let left_out = rows.len().saturating_sub(ROWS);
    let cells = |(name, total): &(String, TotalCells)| {
        let TotalCells { purges, tags, wide, last_seen } = total;
        [printable(name), purges.to_string(), tags.to_string(), wide.to_string(), printable(last_seen)]
    };
    let rows: Vec<_> = rows.iter().take(ROWS).map(cells).collect();
    let mut table = String::new();
    push_table(&mut table, &[name, "PURGES", "TAGS", "WIDE", "LAST"], &rows, false);
    if left_out > 0 {
        table.push_str(&format!("and {left_out} more\n"));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total(purges: u64, wide: u64) -> TotalCells {
        TotalCells { purges, tags: 2 * purges, wide, last_seen: "2026-10-14T17:46:40.123Z".into() }
    }

    #[test]
    fn who_drops_most_at_all_clearcoats_together_stands_first() {
        let text = r#"{"replicas": [
            {"id": "a", "self": true, "purges": {"newest": [],
            "sources": [{"source": "10.0.0.5", "purges": 900, "tags": 7000, "wide": 0, "last_seen": "2026-10-14T17:46:40.123Z"},
                        {"source": "10.0.0.6", "purges": 1, "tags": 1, "wide": 1, "last_seen": "2026-10-14T17:46:00.000Z"}],
            "what": [{"what": "cat_p", "purges": 901, "tags": 7001, "wide": 1, "last_seen": "2026-10-14T17:46:40.123Z"}]}},
            {"id": "b", "purges": {"newest": [],
            "sources": [{"source": "10.0.0.6", "purges": 2, "tags": 2, "wide": 2, "last_seen": "2026-10-14T17:46:41.000Z"}],
            "what": [{"what": "cat_p", "purges": 2, "tags": 2, "wide": 2, "last_seen": "2026-10-14T17:46:41.000Z"}]}}],
            "missing": []}"#;
        let expected = "\
SOURCE    PURGES  TAGS  WIDE  LAST
10.0.0.6  3       3     3     2026-10-14T17:46:41.000Z
10.0.0.5  900     7000  0     2026-10-14T17:46:40.123Z

WHAT   PURGES  TAGS  WIDE  LAST
cat_p  903     7003  3     2026-10-14T17:46:41.000Z
";
        let mut purges: FleetPurges = serde_json::from_str(text).unwrap();
        purges.missing = vec![MissingReplica { id: "clearcoat-3".into(), problem: "no answer within 2s".into() }];
        let named = format!("{expected}\nNot in these tables: what was sent to clearcoat-3 (no answer within 2s)\n");
        assert_eq!(purges.tables(), named);
        assert_eq!(serde_json::from_str::<FleetPurges>(text).unwrap().tables(), expected);
    }

    #[test]
    fn a_long_table_says_how_much_of_it_is_not_shown() {
        let rows = (0..ROWS as u64 + 3).map(|n| (format!("10.0.0.{n}"), total(n + 1, 0))).collect();
        let text = table("SOURCE", rows);
        assert!(text.contains("10.0.0.22 ") && !text.contains("10.0.0.2 "), "{text}");
        assert!(text.ends_with("\nand 3 more\n"), "{text}");
    }
}
