//! What a start finds on the disk, and whether it may be believed.
//!
//! A journal that is not the one on which purges were promised says nothing about what a Varnish has: a node may have
//! missed a purge that is in no journal any more, and nobody would ever know. So each start decides whether it goes on
//! with what it finds or **begins anew**: then the journal begins after a gap, in which anything may have been purged,
//! and each Varnish gets one ban of everything before it serves. (That is what a position before the beginning means to
//! every reader: [`Missed::Truncated`](crate::journal::Missed::Truncated), no cursor, a history. There is no second mechanism.)
//!
//! | found | then |
//! | --- | --- |
//! | a journal, and a marker that agrees | go on |
//! | a journal of format 1, no marker | go on: it is from before there were markers |
//! | a journal that is cut | anew; it is put aside, never deleted |
//! | a journal that cannot be read otherwise | no start, or, with `journal.damaged = "anew"`, as one that is cut |
//! | a journal of another name, or that ends before its marker | anew; it is put aside |
//! | no journal, or an empty file, beside anything else of ours | anew |
//! | nothing at all | as `journal.first_start` says |
//! | a file in use, not permitted, on a volume that fails, or of a newer format | no start |
//!
//! **Damage is of two kinds.** A file that ends too early is what a crash of the machine, or a copy, leaves: the shop is
//! not kept down for that, it costs its caches. Bytes that are not what was written mean a disk that lies, and a new
//! journal on it would be worth no more; so that is for an operator to decide, beforehand or then. Whatever they do
//! (move it away, delete it, all of it), the caches are not trusted afterwards.
//!
//! **Nothing at all** is the first start, or a volume that was lost as a whole; no evidence on this machine tells the
//! two apart, and a Varnish cannot be asked. A promise may not rest on the hope that it is the first, so by default
//! it counts as a loss. Who puts clearcoat before a warm fleet says so once: `first_start = "trust"`.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
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

/// The database.
pub(super) const JOURNAL: &str = "journal.redb";

/// What else clearcoat leaves in its directory, also in earlier versions: where any of these is, it was here before.
const TRACES: [&str; 5] = [JOURNAL, "identity.json", "fleet.json", "replicas.json", "peers.json"];

/// How long the process before this one may take to let go of the file: it was killed while it wrote.
const RELEASE: Duration = Duration::from_secs(3);

/// What the journal starts with.
pub(super) struct Opened {
    pub(super) store: Store,
    pub(super) stored: Stored,
    /// Why it does not go on with what was there.
    pub(super) anew: Option<Anew>,
}

/// Opens the journal in `directory`, or begins it anew. `now_ms`: the time, in ms since 1970.
pub(super) fn open(
    directory: &Path,
    limits: Limits,
    now_ms: u64,
    files: Box<dyn Files>,
    (first_start, damaged): (FirstStart, Damaged),
) -> Result<Opened, OpenError> {
    let unusable = |source| OpenError::Directory { path: directory.to_owned(), source };
    if !directory.is_dir() {
        fs::create_dir_all(directory).map_err(unusable)?;
    }
    let path = directory.join(JOURNAL);
    let marker = Marker::read(directory)?;
    let length = length(&path)?;
    // Before redb sees it, which writes into the header what it finds.
    let is_cut = is_cut(&path, length);
    let (anew, highest) = if length > 0 {
        match read(&*files, &path, limits, now_ms) {
            Ok((database, stored)) => {
                let Some(anew) = distrust(&stored, &marker) else {
                    return go_on(path, limits, now_ms, files, database, stored, &marker);
                };
                // Closed before it is put aside.
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

/// How long the file is. An empty one is what a crash, or a hand, leaves of any other: as good as none.
fn length(path: &Path) -> Result<u64, OpenError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Err(OpenError::file(path.to_owned(), io::ErrorKind::IsADirectory.into())),
        Ok(metadata) => Ok(metadata.len()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(source) => Err(OpenError::file(path.to_owned(), source)),
    }
}

/// Whether the file ends before the end that its header gives. (redb's `docs/design.md`, "Database header", file format 3: from byte
/// 12 on five little-endian u32: the size of a page, the pages of a region's header, the data pages of a full region, how
/// many of these there are, the data pages of the last region where it is not full. One page is before all regions.)
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

/// Reads the file; waits a moment where it is in use still.
fn read(files: &dyn Files, path: &Path, limits: Limits, now_ms: u64) -> Result<(redb::Database, Stored), OpenError> {
    let began = Instant::now();
    loop {
        match Store::read(files, path, limits, now_ms) {
            Err(OpenError::InUse { .. }) if began.elapsed() < RELEASE => thread::sleep(Duration::from_millis(20)),
            read => return read,
        }
    }
}

/// Why a journal that can be read is not the one that was promised on. `None`: it is.
fn distrust(stored: &Stored, marker: &Found) -> Option<Anew> {
    let head = stored.past.head;
    let replaced = |reason: String| Some(Anew::Replaced(reason));
    match (&stored.identity, marker) {
        // From before there were markers.
        (None, Found::Nothing) => None,
        (None, _) => replaced("it has no name, and the file beside it has one".to_owned()),
        // What a start leaves that is killed before its marker is written.
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

/// Whether a journal should be here, where there is none.
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

/// Goes on with what was found.
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
        // Format 1. A volume that is full does not keep us from starting; then it gets its name at the next start.
        if let Err(error) = store.begin(None, now_ms) {
            tracing::warn!(error = %causes(&error), "the journal's file could not be brought to this version's format");
        }
    }
    Ok(Opened { store, stored, anew: None })
}

/// Begins a journal where there is none, after `head` where that is given.
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
        // The file is new, and what is in it is worth nothing while its name is not durable.
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        synced.map_err(|source| OpenError::Directory { path: directory.to_owned(), source })?;
    }
    stored.past.head = head.unwrap_or(0);
    stored.past.floor = stored.past.head;
    Ok(Opened { store, stored, anew })
}

/// Puts a journal that is not used aside, under a name that says when and why.
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
        tracing::warn!(path = %path.display(), aside = %aside.display(), "the journal that is not used was put aside");
        break;
    }
    Ok(())
}

/// 128 random bits. Not secret: two journals must not have the same.
fn new_identity() -> String {
    format!("{:032x}", fastrand::u128(..))
}
