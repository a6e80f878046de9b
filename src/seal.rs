//! The seal: data in an answer from which the edge can determine later whether the answer is still fresh.
//!
//! A ban proves nothing about the page that a cache serves next: the page may still have been in flight when the ban
//! arrived, the cache may have answered "200 Purged" and done nothing, its clock, its disk or its VCL may differ from
//! what we believe. So the promise rests on the answer and not on the node. The origin adds a **seal** to each answer
//! that a Varnish could store: the position up to which every purge was known before the page was rendered, and the
//! names of the page. Varnish keeps it with the object and returns it with each hit. The edge knows the later purges,
//! and so can determine from the answer alone whether one of them concerned it.
//!
//! Three decisions shape it:
//!
//! - **It errs to one side.** A name is 48 bits of a hash, the table of purges forgets old ones, and an unreadable seal
//!   counts as missing. Such an error can make a fresh page look stale, which costs one more fetch, but never a stale
//!   page look fresh.
//! - **A seal is valid only for the journal that its position belongs to.** So it contains the journal and its run, and
//!   a position is trusted only up to the end of that run ([`Lineage`]): a journal that was lost, or restored from a
//!   copy, assigns the same positions to other purges.
//! - **The text is the key.** Names are eight characters of an alphabet in ASCII order, sorted: nothing is decoded or
//!   allocated while a request waits.

mod lineage;
mod name;
mod purged;
mod snapshot;
mod stale;
mod text;
mod unsealable;

pub use lineage::{Lineage, Run, Stamp};
pub use name::Name;
pub use purged::{Judgement, PastNames, PurgedKey, PurgedNames, StaleBecause, path_key, sealed_by, targets};
pub use snapshot::MAX_NAMES;
pub use stale::StalePage;
pub use text::{Asked, MAX_STAMPS, STAMP_LEN, Seal, asked_prefix, write_asked, write_seal};
pub use unsealable::UnsealableTags;

/// A place in the journal; 0 is before the first. Positions grow, not always by one, and none is given twice.
pub type Position = u64;
