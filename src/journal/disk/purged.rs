//! The durable part of what seals are judged by: names by their last purge, and the runs of the journal.
//!
//! Names are written in the transaction of their purge, so that none is answered whose names a crash could lose, and they
//! stay when the purge itself retires: they are far smaller. They are bounded by **generations**. Names go to the present
//! one; when that holds half of what is allowed, the one before it is dropped as a whole, and the floor rises to where it
//! ended. To drop a table costs the same however much is in it, so no purge waits for a clean-up.
//!
//! The head is noted beside them. A version of clearcoat that knows no names leaves it behind, and then nothing is known of
//! what was purged before.

use std::collections::HashMap;
use std::sync::Arc;

use redb::{ReadableTable as _, ReadableTableMetadata as _, Table, TableDefinition, WriteTransaction};

use crate::journal::{Entry, Position};
use crate::seal::{Name, PastNames, PurgedKey, Run, targets};

/// Two generations of names and paths, by their keys.
const NAMES: [TableDefinition<'_, u64, Position>; 2] =
    [TableDefinition::new("names.0"), TableDefinition::new("names.1")];

/// The numbers beside them.
const STATE: TableDefinition<'_, &str, u64> = TableDefinition::new("names.state");

/// The runs in their order, each with the head at which it ended; [`PRESENT`] for the last one.
const RUNS: TableDefinition<'_, u64, (u32, Position)> = TableDefinition::new("runs");

/// The tags that no seal shows, by the text of their name.
const UNSEALABLE: TableDefinition<'_, &[u8], ()> = TableDefinition::new("names.unsealable");

/// The present run has not ended.
const PRESENT: Position = Position::MAX;

/// How many runs are kept. Seals of older ones count as foreign.
const MAX_RUNS: u64 = 4096;

/// Which generation is the present one: 0 or 1.
const GENERATION: &str = "generation";
/// Up to where the generation before the present one goes.
const TURNED: &str = "turned";
/// Up to where nothing is known.
const FLOOR: &str = "floor";
/// Up to where everything after the floor is noted.
const HEAD: &str = "head";
/// The last purge of all pages.
const ALL: &str = "all";
/// The last purge of all pages with tags.
const TAGGED: &str = "tagged";

/// Notes the names of entries after `before` up to `head`, and keeps about `max_names` of all. A file that has not noted
/// everything up to `before` knows nothing of it.
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

/// Notes tags that no seal shows.
pub(super) fn note_unsealable(transaction: &WriteTransaction, names: &[Name]) -> Result<(), redb::Error> {
    let mut table = transaction.open_table(UNSEALABLE)?;
    for name in names {
        table.insert(name.as_bytes().as_slice(), ())?;
    }
    Ok(())
}

/// Begins a run on a journal that ends at `head`. Returns it with those before it, and what is known of the purges before.
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

/// The numbers, each 0 until it is written.
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
