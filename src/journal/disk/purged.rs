//! The durable data by which seals are judged: the last purge of each name, and the runs of the journal.
//!
//! Names are written in the transaction of their purge, so that no purge is answered whose names a crash could lose.
//! They outlive the journal entry of the purge, since they are far smaller. They are bounded by **generations**: names
//! go to the current one; when it has half of the allowed number, the previous one is dropped as a whole, and the floor
//! rises to the end of the dropped one. Dropping a table costs the same whatever its size, so no purge waits for a
//! clean-up.
//!
//! The journal head is stored with them. A version of clearcoat without names does not advance it; if it differs from
//! the head of the journal, names are missing, and earlier purges count as unknown.

use std::collections::HashMap;
use std::sync::Arc;

use redb::{ReadableTable as _, ReadableTableMetadata as _, Table, TableDefinition, WriteTransaction};

use crate::journal::{Entry, Position};
use crate::seal::{Name, PastNames, PurgedKey, Run, targets};

/// Two generations of names and paths, by their keys.
const NAMES: [TableDefinition<'_, u64, Position>; 2] =
    [TableDefinition::new("names.0"), TableDefinition::new("names.1")];

/// The positions and the generation that belong to the names, by the keys below.
const STATE: TableDefinition<'_, &str, u64> = TableDefinition::new("names.state");

/// The runs in their order, each with the head at which it ended; [`PRESENT`] for the last one.
const RUNS: TableDefinition<'_, u64, (u32, Position)> = TableDefinition::new("runs");

/// The unsealable tags, by the text of their name.
const UNSEALABLE: TableDefinition<'_, &[u8], ()> = TableDefinition::new("names.unsealable");

/// The end of the present run, which has not ended yet.
const PRESENT: Position = Position::MAX;

/// The number of runs kept. Seals of older ones count as foreign.
const MAX_RUNS: u64 = 4096;

/// The current generation: 0 or 1.
const GENERATION: &str = "generation";
/// The last position in the previous generation.
const TURNED: &str = "turned";
/// The position up to which nothing is known.
const FLOOR: &str = "floor";
/// The position up to which every purge after the floor is recorded.
const HEAD: &str = "head";
/// The last purge of all pages.
const ALL: &str = "all";
/// The last purge of all pages with tags.
const TAGGED: &str = "tagged";

/// Records the names of the entries after `before` up to `head`, and keeps about `max_names` in total. If the stored
/// head is not `before`, names are missing, and the floor rises to `before`.
pub(super) fn note(
    transaction: &WriteTransaction,
    entries: &[Arc<Entry>],
    (before, head): (Position, Position),
    max_names: usize,
) -> Result<(), redb::Error> {
    let mut state = State(transaction.open_table(STATE)?);
    if state.get(HEAD)? != before {
        state.set(FLOOR, before)?;
    }
    let mut generation = state.get(GENERATION)? & 1;
    if transaction.open_table(NAMES[generation as usize])?.len()? >= (max_names / 2) as u64 {
        generation = 1 - generation;
        transaction.delete_table(NAMES[generation as usize])?;
        let floor = state.get(FLOOR)?.max(state.get(TURNED)?);
        state.set(FLOOR, floor)?;
        state.set(TURNED, before)?;
        state.set(GENERATION, generation)?;
    }
    let mut names = transaction.open_table(NAMES[generation as usize])?;
    for entry in entries {
        for noted in targets(&entry.purge) {
            match noted {
                PurgedKey::Name(key) => _ = names.insert(key, entry.position)?,
                PurgedKey::All => state.set(ALL, entry.position)?,
                PurgedKey::Tagged => state.set(TAGGED, entry.position)?,
            }
        }
    }
    state.set(HEAD, head)
}

/// Records unsealable tags.
pub(super) fn note_unsealable(transaction: &WriteTransaction, names: &[Name]) -> Result<(), redb::Error> {
    let mut table = transaction.open_table(UNSEALABLE)?;
    for name in names {
        table.insert(name.as_bytes().as_slice(), ())?;
    }
    Ok(())
}

/// Begins a run on a journal whose head is `head`. Returns the earlier runs, and the names of the purges before this
/// run.
pub(super) fn begin_run(
    transaction: &WriteTransaction,
    head: Position,
    run: Run,
) -> Result<(Vec<(Run, Position)>, PastNames), redb::Error> {
    let mut runs = transaction.open_table(RUNS)?;
    let rows: Vec<(u64, u32, Position)> = runs
        .iter()?
        .map(|row| row.map(|(number, row)| (number.value(), row.value().0, row.value().1)))
        .collect::<Result<_, _>>()?;
    let mut ended = Vec::with_capacity(rows.len());
    for (number, run, end) in &rows {
        if *end == PRESENT {
            runs.insert(number, (*run, head))?;
        }
        ended.push((Run(*run), if *end == PRESENT { head } else { *end }));
    }
    let next = rows.last().map_or(0, |(number, ..)| number + 1);
    runs.insert(next, (run.0, PRESENT))?;
    runs.retain_in(..next.saturating_sub(MAX_RUNS), |_, _| false)?;
    Ok((ended, remembered(transaction, head)?))
}

fn remembered(transaction: &WriteTransaction, head: Position) -> Result<PastNames, redb::Error> {
    let mut state = State(transaction.open_table(STATE)?);
    if state.get(HEAD)? != head {
        state.set(FLOOR, head)?;
        state.set(HEAD, head)?;
    }
    let mut last: HashMap<u64, Position> = HashMap::new();
    for table in NAMES {
        for row in transaction.open_table(table)?.iter()? {
            let (key, position) = row?;
            let known = last.entry(key.value()).or_default();
            *known = position.value().max(*known);
        }
    }
    let mut keys: Vec<(u64, Position)> = last.into_iter().collect();
    keys.sort_unstable_by_key(|(_, position)| *position);
    let mut unsealable = Vec::new();
    for row in transaction.open_table(UNSEALABLE)?.iter()? {
        unsealable.extend(Name::parse(row?.0.value()));
    }
    let (floor, all, tagged) = (state.get(FLOOR)?, state.get(ALL)?, state.get(TAGGED)?);
    Ok(PastNames { head, floor, keys, all, tagged, unsealable })
}

/// The open `STATE` table; each value is 0 until it is written.
struct State<'t>(Table<'t, &'static str, u64>);

impl State<'_> {
    fn get(&self, name: &str) -> Result<u64, redb::Error> {
        Ok(self.0.get(name)?.map_or(0, |value| value.value()))
    }

    fn set(&mut self, name: &str, value: u64) -> Result<(), redb::Error> {
        self.0.insert(name, value)?;
        Ok(())
    }
}
