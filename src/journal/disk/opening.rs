//! Opens the journal on disk, and decides whether to trust it.
//!
//! A journal other than the one for which purges were promised says nothing about the nodes: a node may have missed a purge
//! that is in no journal any more, and nobody would know. So each start either continues with the journal on disk or
//! **begins anew**: the new journal begins after a gap, in which anything may have been purged, so each Varnish gets one ban
//! of everything before it serves. (This is how readers treat a position before the beginning:
//! [`Missed::Truncated`](crate::journal::Missed::Truncated), no cursor, a history. There is no second mechanism.)
//!
//! | found | action |
//! | --- | --- |
//! | a journal and a marker that agree | continue |
//! | a journal of format 1, no marker | continue: it is older than markers |
//! | a truncated journal | anew; the old one is moved aside, never deleted |
//! | an otherwise unreadable journal | no start, or, with `journal.damaged = "anew"`, as if truncated |
//! | a journal of another name, or that ends before its marker | anew; the old one is moved aside |
//! | no journal, or an empty file, beside any other file of ours | anew |
//! | nothing at all | as `journal.first_start` says |
//! | a file in use, without permission, on a failing volume, or of a newer format | no start |
//!
//! **There are two kinds of damage.** A truncated file is the result of a crash of the machine, or of a copy: the shop stays
//! up, at the cost of its caches. Bytes that differ from what was written mean an unreliable disk, on which a new journal
//! would be worth no more. So an operator must decide, in advance or then. Whatever they do (move the journal away, or
//! delete some or all of it), the caches are not trusted afterwards.
//!
//! **Nothing at all** means a first start, or the loss of the whole volume. No evidence on this machine distinguishes the
//! two, and a Varnish cannot be asked. A promise must not rest on hope, so by default it counts as a loss. To put clearcoat
//! in front of a warm fleet, set `first_start = "trust"` once.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::error::OpenError;
use super::file::Files;
use super::load::Stored;
use super::marker::{Found, Marker};
use super::store::Store;
use crate::clock;
use crate::config::{Damaged, FirstStart};
use crate::journal::{Anew, Limits, Position};
use crate::telemetry::causes;

pub(super) const JOURNAL: &str = "journal.redb";

/// Files that clearcoat leaves in its directory, including those of earlier versions: any of them shows that it ran here
/// before.
const TRACES: [&str; 5] = [JOURNAL, "identity.json", "fleet.json", "replicas.json", "peers.json"];

/// How long the earlier process may take to release the file: it may have been killed during a write.
const RELEASE: Duration = Duration::from_secs(3);

/// The result of opening.
pub(super) struct Opened {
    pub(super) store: Store,
    pub(super) stored: Stored,
    /// Why it does not continue the journal that was there.
    pub(super) anew: Option<Anew>,
}

/// What a start does with what it finds.
#[derive(Clone, Copy, Debug)]
pub(super) struct StartRules {
    /// Without any journal.
    pub(super) first_start: FirstStart,
    /// With one that cannot be read.
    pub(super) damaged: Damaged,
    /// Answers are sealed from now on.
    pub(super) seals: bool,
}

/// Opens the journal in `directory`, or begins it anew. `now_ms`: the time, in ms since 1970.
pub(super) fn open(
    directory: &Path,
    limits: Limits,
    now_ms: u64,
    files: Box<dyn Files>,
    rules: StartRules,
) -> Result<Opened, OpenError> {
    let mut opened = find(directory, limits, now_ms, files, rules)?;
    let Opened { store, stored, .. } = &mut opened;
    begin_run(store, stored, rules.seals);
    Ok(opened)
}

/// Goes on with the journal in `directory`, or begins another one.
fn find(
    directory: &Path,
    limits: Limits,
    now_ms: u64,
    files: Box<dyn Files>,
    StartRules { first_start, damaged, .. }: StartRules,
) -> Result<Opened, OpenError> {
    let unusable = |source| OpenError::Directory { path: directory.to_owned(), source };
    if !directory.is_dir() {
        fs::create_dir_all(directory).map_err(unusable)?;
    }
    let path = directory.join(JOURNAL);
    let marker = Marker::read(directory)?;
    let length = length(&path)?;
    // Before redb opens the file, which rewrites the header.
    let is_cut = is_cut(&path, length);
    let (anew, highest) = if length > 0 {
        match read(&*files, &path, limits, now_ms) {
            Ok((database, stored)) => {
                let Some(anew) = distrust(&stored, &marker) else {
                    return go_on(path, limits, now_ms, files, database, stored, &marker);
                };
                // Closed before it is moved aside.
                drop(database);
                (Some(anew), stored.past.head)
            }
            Err(OpenError::Damaged { path, source }) if damaged == Damaged::Anew || is_cut => {
                (Some(Anew::Damaged(format!("{}: {}", path.display(), causes(&source)))), 0)
            }
            Err(error) => return Err(error),
        }
    } else {
        (was_here_before(directory, &marker).map_err(unusable)?, 0)
    };
    let anew = anew.or((first_start == FirstStart::Flush).then_some(Anew::FirstStart));
    if let Some(anew @ (Anew::Damaged(_) | Anew::Replaced(_))) = &anew {
        put_aside(&path, anew).map_err(|source| OpenError::file(path.clone(), source))?;
    }
    let vouched = if let Found::Marker(marker) = &marker { marker.head } else { 0 };
    let head = anew.is_some().then(|| highest.max(vouched) + 1);
    begin(&path, limits, now_ms, files, anew, head)
}

/// The length of the file. An empty one, left by a crash or by hand, counts as missing.
fn length(path: &Path) -> Result<u64, OpenError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Err(OpenError::file(path.to_owned(), io::ErrorKind::IsADirectory.into())),
        Ok(metadata) => Ok(metadata.len()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(source) => Err(OpenError::file(path.to_owned(), source)),
    }
}

/// Whether the file ends before the end that its header gives. (redb's `docs/design.md`, "Database header", file format 3:
/// five little-endian u32 from byte 12: the page size, the header pages of a region, the data pages of a full region, the
/// number of full regions, and the data pages of the last region if it is not full. One page precedes all regions.)
fn is_cut(path: &Path, length: u64) -> bool {
    let mut header = [0; 32];
    if File::open(path).and_then(|mut file| file.read_exact(&mut header)).is_err() {
        return true;
    }
    let field = |at: usize| u64::from(u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]));
    let [page, header_pages, full_pages, full, rest] = [12, 16, 20, 24, 28].map(field);
    let last = if rest > 0 { header_pages + rest } else { 0 };
    let pages = full.saturating_mul(header_pages + full_pages).saturating_add(last).saturating_add(1);
    length < pages.saturating_mul(page)
}

/// Reads the file, after a short wait if it is still in use.
fn read(files: &dyn Files, path: &Path, limits: Limits, now_ms: u64) -> Result<(redb::Database, Stored), OpenError> {
    let began = Instant::now();
    loop {
        match Store::read(files, path, limits, now_ms) {
            Err(OpenError::InUse { .. }) if began.elapsed() < RELEASE => thread::sleep(Duration::from_millis(20)),
            read => return read,
        }
    }
}

/// Why a readable journal is not the one for which purges were promised; `None` if it is.
fn distrust(stored: &Stored, marker: &Found) -> Option<Anew> {
    let head = stored.past.head;
    let replaced = |reason: String| Some(Anew::Replaced(reason));
    match (&stored.identity, marker) {
        // Older than markers.
        (None, Found::Nothing) => None,
        (None, _) => replaced("it has no name, and the file beside it has one".to_owned()),
        // Left by a start that was killed before it wrote its marker.
        (Some(_), Found::Nothing) if head <= 1 && stored.past.entries.is_empty() && stored.cursors.is_empty() => None,
        (Some(_), Found::Nothing) => replaced("identity.json is not beside it".to_owned()),
        (Some(_), Found::Unreadable(reason)) => replaced(reason.clone()),
        (Some(identity), Found::Marker(marker)) if *identity != marker.identity => {
            replaced("it is another journal than the one that was here".to_owned())
        }
        (Some(_), Found::Marker(marker)) if head < marker.head => {
            replaced(format!("it is an older copy: it ends at {head}, and had come to {}", marker.head))
        }
        (Some(_), Found::Marker(_)) => None,
    }
}

/// Whether a journal is missing that was here before.
fn was_here_before(directory: &Path, marker: &Found) -> io::Result<Option<Anew>> {
    let lost = |reason: &str| Ok(Some(Anew::Lost(reason.to_owned())));
    match marker {
        Found::Marker(_) => return lost("journal.redb is gone, and identity.json is there"),
        Found::Unreadable(reason) => return lost(reason),
        Found::Nothing => {}
    }
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if TRACES.iter().any(|trace| name.starts_with(trace)) {
            return lost(&format!("the journal is gone or empty, and {name} is there"));
        }
    }
    Ok(None)
}

/// Continues with a journal.
fn go_on(
    path: PathBuf,
    limits: Limits,
    now_ms: u64,
    files: Box<dyn Files>,
    database: redb::Database,
    mut stored: Stored,
    marker: &Found,
) -> Result<Opened, OpenError> {
    let marked = if let Found::Marker(marker) = marker { Some((marker.head, now_ms)) } else { None };
    let is_named = stored.identity.is_some();
    let identity = stored.identity.take().unwrap_or_else(new_identity);
    let mut store = Store::new(files, path, limits, identity, database, marked);
    if !is_named {
        // Format 1. A full volume does not prevent the start; the next start names the file.
        if let Err(error) = store.begin(None, now_ms) {
            tracing::warn!(error = %causes(&error), "the journal's file could not be upgraded to this version's format");
        }
    }
    Ok(Opened { store, stored, anew: None })
}

/// Begins a journal, after `head` if that is given.
fn begin(
    path: &Path,
    limits: Limits,
    now_ms: u64,
    files: Box<dyn Files>,
    anew: Option<Anew>,
    head: Option<Position>,
) -> Result<Opened, OpenError> {
    let (database, mut stored) = Store::read(&*files, path, limits, now_ms)?;
    let mut store = Store::new(files, path.to_owned(), limits, new_identity(), database, None);
    let refused = |error| OpenError::Begin { path: path.to_owned(), source: Box::new(error) };
    store.begin(head, now_ms).map_err(refused)?;
    if let Some(directory) = path.parent() {
        // The file is new, and its content is lost unless its directory entry is durable.
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        synced.map_err(|source| OpenError::Directory { path: directory.to_owned(), source })?;
    }
    stored.past.head = head.unwrap_or(0);
    stored.past.floor = stored.past.head;
    Ok(Opened { store, stored, anew })
}

/// Begins our run. If the volume does not take that, purges wait for Varnish as they would without seals.
fn begin_run(store: &mut Store, stored: &mut Stored, seals: bool) {
    if !seals {
        // As the file forgets it.
        stored.cursors.values_mut().for_each(|saved| saved.cursor.is_sealed = false);
    }
    match store.begin_run(stored.past.head, seals) {
        Ok(purged) => stored.past.purged = Some(Arc::new(purged)),
        Err(error) => tracing::warn!(
            error = %causes(&error),
            "the journal's file does not take the start of this process: answers are not sealed until the next start"
        ),
    }
}

/// Moves an unused journal aside, to a name with the time and the reason.
fn put_aside(path: &Path, anew: &Anew) -> io::Result<()> {
    let seconds = clock::now_ms() / 1000;
    let base = format!("{JOURNAL}.{}-{seconds}", anew.reason());
    let names = (0..).map(|count| if count == 0 { base.clone() } else { format!("{base}-{count}") });
    for name in names {
        let aside = path.with_file_name(name);
        if aside.exists() {
            continue;
        }
        fs::rename(path, &aside)?;
        tracing::warn!(path = %path.display(), aside = %aside.display(), "the unused journal was moved aside");
        break;
    }
    Ok(())
}

/// 128 random bits. Not secret, but unique.
fn new_identity() -> String {
    format!("{:032x}", fastrand::u128(..))
}
