//! What becomes of purges, and of caches, when the journal's disk or its history fails.

mod disk;
mod history;
