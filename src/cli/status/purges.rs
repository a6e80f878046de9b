//! `clearcoat status --purges`: who empties the cache, and what they name. Two short tables, the busiest first.

use serde::Deserialize;

use super::{printable, push_table};

/// How many rows a table has at most: those at the end purge next to nothing.
const ROWS: usize = 20;

/// The fields of `/api/v1/purges` that the tables show.
#[derive(Debug, Deserialize)]
pub(super) struct Purges {
    sources: Vec<SourceRow>,
    what: Vec<WhatRow>,
    /// The other clearcoats before the fleet.
    #[serde(default)]
    other_replicas: Vec<String>,
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

#[derive(Debug, Deserialize)]
struct TotalCells {
    purges: u64,
    tags: u64,
    wide: u64,
    last_seen: String,
}

impl Purges {
    pub(super) fn tables(self) -> String {
        let who = self.sources.into_iter().map(|row| (row.source, row.total)).collect();
        let what = self.what.into_iter().map(|row| (row.what, row.total)).collect();
        let mut text = format!("{}\n{}", table("SOURCE", who), table("WHAT", what));
        if !self.other_replicas.is_empty() {
            let others: Vec<String> = self.other_replicas.iter().map(|id| printable(id)).collect();
            text.push_str(&format!(
                "\nOnly what was sent to this clearcoat. Ask the others, too (--admin): {}\n",
                others.join(", ")
            ));
        }
        text
    }
}

/// Sorted by the number of wide purges, then of all purges, the largest first.
fn table(name: &str, mut rows: Vec<(String, TotalCells)>) -> String {
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
    fn who_drops_most_stands_first() {
        let text = r#"{"newest": [],
            "sources": [{"source": "10.0.0.5", "purges": 900, "tags": 7000, "wide": 0, "last_seen": "2026-10-14T17:46:40.123Z"},
                        {"source": "10.0.0.6", "purges": 3, "tags": 3, "wide": 3, "last_seen": "2026-10-14T17:46:00.000Z"}],
            "what": [{"what": "cat_p", "purges": 903, "tags": 7003, "wide": 3, "last_seen": "2026-10-14T17:46:40.123Z"}]}"#;
        let expected = "\
SOURCE    PURGES  TAGS  WIDE  LAST
10.0.0.6  3       3     3     2026-10-14T17:46:00.000Z
10.0.0.5  900     7000  0     2026-10-14T17:46:40.123Z

WHAT   PURGES  TAGS  WIDE  LAST
cat_p  903     7003  3     2026-10-14T17:46:40.123Z
";
        let mut purges: Purges = serde_json::from_str(text).unwrap();
        purges.other_replicas = vec!["clearcoat-2".into()];
        let with_others =
            format!("{expected}\nOnly what was sent to this clearcoat. Ask the others, too (--admin): clearcoat-2\n");
        assert_eq!(purges.tables(), with_others);
        assert_eq!(serde_json::from_str::<Purges>(text).unwrap().tables(), expected);
    }

    #[test]
    fn a_long_table_says_how_much_of_it_is_not_shown() {
        let rows = (0..ROWS as u64 + 3).map(|n| (format!("10.0.0.{n}"), total(n + 1, 0))).collect();
        let text = table("SOURCE", rows);
        assert!(text.contains("10.0.0.22 ") && !text.contains("10.0.0.2 "), "{text}");
        assert!(text.ends_with("\nand 3 more\n"), "{text}");
    }
}
