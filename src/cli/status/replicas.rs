//! The clearcoats in front of the fleet, as a table.

use serde::Deserialize;

use super::push_table;
use crate::cli::printable;

/// A replica, as `/api/v1/fleet` reports it.
#[derive(Debug, Deserialize)]
pub(super) struct ReplicaRow {
    id: String,
    address: String,
    journal: String,
    #[serde(default, rename = "self")]
    is_self: bool,
    confirmed: bool,
    #[serde(default)]
    problem: String,
}

const COLUMNS: [&str; 5] = ["REPLICA", "ADDRESS", "JOURNAL", "CONFIRMS", "NOTE"];

/// Adds the table, unless there is one replica only and it has no problem.
pub(super) fn push_replicas(table: &mut String, replicas: &[ReplicaRow], colour: bool) {
    if replicas.len() > 1 || replicas.iter().any(|replica| !replica.problem.is_empty()) {
        table.push('\n');
        let rows: Vec<_> = replicas.iter().map(ReplicaRow::cells).collect();
        push_table(table, &COLUMNS, &rows, colour);
    }
}

impl ReplicaRow {
    fn cells(&self) -> [String; COLUMNS.len()] {
        let confirms = match (self.is_self, self.confirmed) {
            (true, _) => "-",
            (false, true) => "yes",
            (false, false) => "no",
        };
        let note = if self.is_self { format!("this one {}", self.problem) } else { self.problem.clone() };
        [
            printable(&self.id),
            printable(&self.address),
            printable(&self.journal),
            confirms.to_owned(),
            printable(note.trim()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_are_shown_and_who_is_alone_is_not() {
        let replica = |text: &str| serde_json::from_str::<ReplicaRow>(text).unwrap();
        let own = || replica(r#"{"id":"a","address":"10.0.0.2:6081","journal":"etcd","self":true,"confirmed":true}"#);
        let other =
            r#"{"id":"b","address":"10.0.0.3:6081","journal":"etcd","confirmed":false,"problem":"it answered 403"}"#;
        let mut table = String::new();
        push_replicas(&mut table, &[own()], false);
        assert_eq!(table, "");
        push_replicas(&mut table, &[own(), replica(other)], false);
        let rows: Vec<Vec<&str>> = table.lines().skip(2).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[0], ["a", "10.0.0.2:6081", "etcd", "-", "this", "one"]);
        assert_eq!(rows[1], ["b", "10.0.0.3:6081", "etcd", "no", "it", "answered", "403"]);
    }
}
