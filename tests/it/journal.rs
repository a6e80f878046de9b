//! The effects on purges and caches of a failing disk or history of the journal.

mod disk;
mod history;
