//! Applies the purges of all replicas to the local journal, in etcd's order.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::{FLOOR, Inner};
use crate::etcd::follow::{KeyChange, KeyEntry, Listing, Resync, Update};
use crate::journal::disk::NamedPurge;
use crate::journal::{Entry, EntryOrigin, Journal, WriteError};
use crate::telemetry::causes;

/// The maximum number of changes to write together.
const AT_ONCE: usize = 4_096;

/// Applies updates until the sender is dropped. `synced` becomes true with the first list that is stored.
pub(super) async fn run(inner: Arc<Inner>, mut updates: mpsc::Receiver<Update>, synced: watch::Sender<bool>) {
    let mut next = None;
    while let Some(mut update) = match next.take() {
        None => updates.recv().await,
        waiting => waiting,
    } {
        if let Update::Changed(changes) = &mut update {
            next = add_waiting(changes, &mut updates);
        }
        let taken = match &update {
            Update::Listed(listing) if listing.cause == Resync::Start => {
                // Read first, because a delivery task asks for its cursor only once.
                inner.published.read(&inner.etcd, listing.revision).await;
                take_list(&inner, listing).await
            }
            Update::Listed(listing) => {
                let taken = take_list(&inner, listing).await;
                // Read after the purges, which are urgent. Nodes that join later must not find a cursor of another history.
                inner.published.read(&inner.etcd, listing.revision).await;
                taken
            }
            Update::Changed(changes) => take_changes(&inner, changes).await,
        };
        match taken {
            Ok(()) => _ = synced.send_replace(true),
            // Purges from etcd are applied even if the disk is full, so the journal has ended.
            Err(error) => tracing::error!(error = %causes(&error), "purges from etcd cannot be stored"),
        }
    }
}

/// Adds changes that arrived while earlier ones were written. etcd reports each purge separately, and separately each would
/// wait for the disk. Returns the first update of another kind.
fn add_waiting(changes: &mut Vec<KeyChange>, updates: &mut mpsc::Receiver<Update>) -> Option<Update> {
    while changes.len() < AT_ONCE {
        match updates.try_recv().ok()? {
            Update::Changed(more) => changes.extend(more),
            other => return Some(other),
        }
    }
    None
}

async fn take_list(inner: &Inner, listing: &Listing) -> Result<(), WriteError> {
    let (revision, floor) = (unsigned(listing.revision), floor(&listing.items));
    let mut entries: Vec<&KeyEntry> = listing.items.iter().filter(|item| item.key != FLOOR).collect();
    entries.sort_by_key(|item| item.created);
    let listed: HashSet<&str> = entries.iter().map(|item| item.key.as_str()).collect();
    let newest = entries.last().map_or(floor, |last| unsigned(last.created).max(floor));
    let (lost, missed) = {
        let mut position_map = inner.local.readable().position_map.lock();
        let restored = listing.cause == Resync::Restored || revision < position_map.newest();
        let lost = position_map.lost(&listed, revision, floor, restored);
        let missed = floor > position_map.seen();
        position_map.forget(|id| !listed.contains(id));
        if !restored {
            // By name, because the revision may belong to another purge after a restore.
            entries.retain(|item| !position_map.was_held(&item.key));
        }
        if restored {
            position_map.restart(revision, newest);
        }
        position_map.record_deletions(floor);
        (lost, missed)
    };
    if missed {
        if inner.local.has_history() {
            tracing::warn!(
                floor,
                "purges were deleted from etcd before they arrived here: every Varnish that may have missed them drops its pages"
            );
        }
        inner.local.break_off(floor).await?;
    }
    append_answered(inner, entries.into_iter().map(|item| named(inner, item)).collect(), revision).await?;
    if !lost.is_empty() {
        tracing::warn!(count = lost.len(), "etcd has lost purges: they are written again");
        inner.local.found(lost.into_iter().map(|position| (position, None)).collect()).await?;
        inner.uplink.look_again();
    }
    inner.local.readable().position_map.lock().set_synced(revision);
    Ok(())
}

async fn take_changes(inner: &Inner, changes: &[KeyChange]) -> Result<(), WriteError> {
    let mut entries = Vec::new();
    for change in changes {
        match change {
            KeyChange::Put(item) if item.key == FLOOR => {
                inner.local.readable().position_map.lock().record_deletions(floor(std::slice::from_ref(item)));
            }
            KeyChange::Put(item) => entries.push(named(inner, item)),
            // It has expired.
            KeyChange::Deleted { key, .. } => inner.local.readable().position_map.lock().forget_one(key),
        }
    }
    append_answered(inner, entries, unsigned(inner.link.begun_at())).await?;
    let last = changes.iter().map(|change| unsigned(change.revision())).max();
    inner.local.readable().position_map.lock().set_synced(last.unwrap_or(0));
    Ok(())
}

/// Appends entries. Those that are new here and were in etcd by `revision`, before our watch began, were answered without
/// us.
async fn append_answered(inner: &Inner, entries: Vec<NamedPurge>, revision: u64) -> Result<(), WriteError> {
    let before = inner.local.head();
    let old: Vec<bool> = entries.iter().map(|entry| entry.origin.revision.is_some_and(|own| own <= revision)).collect();
    let positions = inner.local.append_all(entries).await?;
    let answered = positions.into_iter().zip(old).filter(|&(position, is_old)| is_old && position > before);
    if let Some(last) = answered.map(|(position, _)| position).max() {
        inner.answered.send_replace(last);
    }
    Ok(())
}

/// Converts an entry. Dated by our own clock, which also decides its retention.
fn named(inner: &Inner, item: &KeyEntry) -> NamedPurge {
    let origin = EntryOrigin {
        id: item.key.as_str().into(),
        revision: Some(unsigned(item.created)),
        ours: inner.names.are_ours(&item.key),
    };
    let now_ms = inner.local.now_ms();
    let (Entry { at_ms, purge, .. }, error) = Entry::read(&item.value, now_ms);
    // The date by the clock of another machine is of no use.
    let at_ms = if origin.ours { at_ms } else { now_ms };
    if let Some(error) = error {
        tracing::error!(
            key = item.key, %error,
            "this is no purge that this version knows: it counts as one of everything"
        );
    }
    NamedPurge { origin, at_ms, purge, in_order: true }
}

/// The last deleted revision, according to its mark.
fn floor(items: &[KeyEntry]) -> u64 {
    let mark = items.iter().find(|item| item.key == FLOOR);
    mark.map_or(0, |mark| {
        String::from_utf8_lossy(&mark.value).trim().parse().unwrap_or_else(|_| {
            tracing::error!(
                key = mark.key,
                "the mark of deleted purges cannot be read: all earlier ones count as deleted"
            );
            unsigned(mark.revision)
        })
    })
}

/// Converts a revision, which is signed on the wire and never negative.
pub(super) fn unsigned(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}
