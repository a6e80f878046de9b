//! Notes of tags that no seal shows, which are those of blocks ([`crate::seal::UnsealableTags`]).
//!
//! A block waits until its tags are noted, and passes again and again if it cannot be stored meanwhile. On a slow disk a
//! note of thousands of tags can take longer than any block waits. So a note is a task of its own that nobody's impatience
//! ends, and whoever has tags that are being noted waits for that note, instead of writing them once more.

use std::collections::HashSet;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::{Deliveries, DeliveryContext, SealedPurges, on_a_thread};
use crate::journal::{Entry, Journal, Missed, Position};
use crate::seal::{Name, UnsealableTags, sealed_by};
use crate::telemetry::causes;

/// The maximum number of tags in notes under way, if there are several. Blocks with further ones are not stored meanwhile, so
/// that a disk that hangs takes no memory.
const MAX_UNDER_WAY: usize = 100_000;

/// The notes that are under way.
#[derive(Debug, Default)]
pub(super) struct BlockNotes(Mutex<Vec<BlockNote>>);

#[derive(Debug)]
struct BlockNote {
    names: HashSet<Name>,
    /// Whether it is durable. Closed when the note has ended.
    is_durable: watch::Receiver<bool>,
}

/// A note to be written.
struct NewNote {
    names: Vec<Name>,
    /// Dropped at the end of the note, however it ends.
    done: watch::Sender<bool>,
}

/// What whoever has these tags waits for.
#[derive(Default)]
struct JoinedNotes {
    /// The notes under way that have them.
    notes: Vec<watch::Receiver<bool>>,
    /// The one that is still to be written, which is among them.
    new: Option<NewNote>,
}

impl BlockNotes {
    /// What to wait for until these names are durable; `None` if there is no room for another note.
    fn join(&self, known: &UnsealableTags, names: &[Name]) -> Option<JoinedNotes> {
        let mut under_way = self.0.lock();
        // What ends after this is found durable below, or waited for.
        under_way.retain(|note| note.is_durable.has_changed().is_ok());
        let mut rest = known.not_durable(names);
        let mut joined = JoinedNotes::default();
        for note in &*under_way {
            let before = rest.len();
            rest.retain(|name| !note.names.contains(name));
            if rest.len() < before {
                joined.notes.push(note.is_durable.clone());
            }
        }
        if !rest.is_empty() {
            let others: usize = under_way.iter().map(|note| note.names.len()).sum();
            if others > 0 && others + rest.len() > MAX_UNDER_WAY {
                return None;
            }
            let (done, is_durable) = watch::channel(false);
            joined.notes.push(is_durable.clone());
            under_way.push(BlockNote { names: rest.iter().copied().collect(), is_durable });
            joined.new = Some(NewNote { names: rest, done });
        }
        Some(joined)
    }
}

impl Deliveries {
    /// Records unsealable tags: purges of them are not sealed any more. Pending purges of them are sent at once, and count
    /// as unsealed. Returns whether all that is so and durable: if not, answers with these tags must not be stored.
    pub async fn note_unsealable(self: &Arc<Self>, names: &[Name]) -> bool {
        let Some(sealed) = &self.context.sealed else { return true };
        let Some(JoinedNotes { notes, new }) = self.block_notes.join(sealed.purged.unsealable(), names) else {
            tracing::warn!("too many tags of blocks are being noted: this one is not stored");
            return false;
        };
        if let Some(NewNote { names, done }) = new {
            let (this, sealed) = (Arc::clone(self), Arc::clone(sealed));
            tokio::spawn(async move {
                if this.write_note(&sealed, &names).await {
                    done.send_replace(true);
                }
            });
        }
        let are_durable = async {
            for mut note in notes {
                // Fails if the note has ended otherwise.
                if note.wait_for(|is_durable| *is_durable).await.is_err() {
                    return false;
                }
            }
            true
        };
        let in_time = tokio::time::timeout(self.context.pace.longest_wait, are_durable).await;
        in_time.unwrap_or_else(|_elapsed| {
            tracing::warn!("tags of a block are not noted in time: it is not stored");
            false
        })
    }

    /// Carries a note out. Returns whether it is durable.
    async fn write_note(&self, sealed: &Arc<SealedPurges>, names: &[Name]) -> bool {
        let unsealable = sealed.purged.unsealable();
        unsealable.insert(names);
        self.show_unsealable();
        self.unseal_pending(sealed, names).await;
        match self.context.journal.note_unsealable(names.to_vec()).await {
            Ok(()) => {
                unsealable.record_durable(names);
                true
            }
            Err(error) => {
                tracing::warn!(error = %causes(&error), "tags of a block could not be noted: it is not stored");
                false
            }
        }
    }

    /// Records that unsealable tags, which are durable, are known to all clearcoats.
    pub fn settle_unsealable(&self, names: &[Name]) {
        if let Some(sealed) = &self.context.sealed {
            sealed.purged.unsealable().settle(names);
        }
    }

    /// Updates the metric of unsealable tags.
    pub fn show_unsealable(&self) {
        if let Some(sealed) = &self.context.sealed {
            let count = i64::try_from(sealed.purged.unsealable().count()).unwrap_or(i64::MAX);
            self.context.metrics.seal.unsealable.set(count);
        }
    }

    /// Marks purges of these tags as unsealed if a node has not acknowledged them yet. They may be many: they are looked
    /// through on another thread.
    async fn unseal_pending(&self, sealed: &Arc<SealedPurges>, names: &[Name]) {
        let _turn = self.unsealing.lock().await;
        let DeliveryContext { journal, fence, fleet, .. } = &self.context;
        let fleet = fleet.load_full();
        // Also of nodes that are down: one may be up before it has its bans.
        let Some(least) = fleet.varnish.members().iter().map(|member| member.node.live.cursor()).min() else { return };
        if least >= journal.head() {
            return;
        }
        let (journal, fence, sealed) = (Arc::clone(journal), Arc::clone(fence), Arc::clone(sealed));
        let names = names.to_vec();
        on_a_thread(move || {
            if let Some(last) = last_of(&*journal, least, &names) {
                sealed.unseal(last);
                fence.raise(last);
            }
        })
        .await;
    }
}

/// The last purge after `after` of any of these tags; the head, if the journal does not hold them all.
fn last_of(journal: &dyn Journal, after: Position, names: &[Name]) -> Option<Position> {
    let Missed::Entries(entries) = journal.since(after) else { return Some(journal.head()) };
    // There may be as many as there are blocks.
    let names: HashSet<&Name> = names.iter().collect();
    let concerns = |entry: &&Arc<Entry>| {
        sealed_by(&entry.purge).is_some_and(|purged| purged.iter().any(|name| names.contains(name)))
    };
    entries.iter().rfind(concerns).map(|entry| entry.position)
}
