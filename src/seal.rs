//! The seal: what an answer says about itself, so that whoever serves it later can tell whether it is fresh.
//!
//! A ban proves nothing about the page that a cache serves next: the page may still have been on its way when the ban came,
//! the cache may have answered "200 Purged" and done nothing, its clock, its disk or its VCL may differ from what we
//! believe. So the promise rests on the answer and not on the node. The origin writes a **seal** on each answer that a
//! Varnish could store: up to which position every purge was known before the page was rendered, and the names of the page.
//! Varnish keeps it with the object and returns it with each hit. The edge knows what was purged since, and so it can tell
//! from the answer alone whether a purge after that position concerned it.
//!
//! Three decisions shape it:
//!
//! - **It errs to one side.** A name is 48 bits of a hash, what was purged is a table that forgets, and a seal that cannot be
//!   read is none. Each error makes a fresh page look stale, which costs one more fetch. None makes a stale page fresh.
//! - **A seal is worth something only in the journal whose position it names.** So it names the journal and its run, and a
//!   position is believed up to the end of that run ([`Lineage`]): a journal that was lost, or set back to a copy, gives
//!   the same positions to other purges.
//! - **The text is the key.** Names are eight characters of an alphabet in ASCII order, sorted: nothing is decoded and
//!   nothing is allocated while a page waits.

mod lineage;
mod name;
mod purged;
mod stale;
mod text;
mod unsealable;

pub use lineage::{Lineage, Run};
pub use name::Name;
pub use purged::{Judgement, PastNames, PurgedKey, PurgedNames, StaleBecause, path_key, sealed_by, targets};
pub use stale::StalePage;
pub use text::{Asked, Seal, asked_prefix, write_asked, write_seal};
pub use unsealable::UnsealableTags;

/// A place in the journal; 0 is before the first. Positions grow, not always by one, and none is given twice.
pub type Position = u64;
