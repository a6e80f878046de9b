//! The progress of the other replicas in our journal, if each has its own journal.
//!
//! A mark is like the cursor of a Varnish: a position up to which another replica has confirmed everything. It includes the
//! name of *that replica's* journal, because a replica that lost its journal lost the purges in it. Marks are saved lazily:
//! one that is too low repeats a few purges, and a missing one makes the replica unknown.
//!
//! The file is beside the journal, and contains the journal's own name and a lower bound of its head. A journal that ends
//! before that, or that [begins anew](crate::journal::Anew), is another journal: its marks are void, and it gets a new name,
//! which tells the others what has happened.
//!
//! Beside the marks it says which replicas were there, for the caches that count as sealed ([`super::names`]).

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::names::KnownJournals;
use crate::fleet::NodeId;
use crate::journal::Position;

/// The maximum number of marks, above any number of replicas. The lowest are dropped first.
const MOST: usize = 256;

/// The progress of one other replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark {
    pub(super) journal: String,
    /// It has confirmed every purge of ours up to here.
    pub(super) position: Position,
}

/// The format of the file. Later formats are not read.
const FORMAT: u64 = 1;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Content {
    format: u64,
    journal: String,
    /// A lower bound of its head.
    head: Position,
    #[serde(default)]
    peers: BTreeMap<NodeId, Mark>,
    /// The replicas that are there.
    #[serde(default)]
    known: KnownJournals,
}

/// The marks of all other replicas.
#[derive(Debug)]
pub(super) struct Marks {
    /// `None`: marks end with the process, as the journal does.
    path: Option<PathBuf>,
    content: Content,
    saved: Content,
}

impl Marks {
    /// Reads the marks for a journal that ends at `head`. Blocks on the disk.
    pub(super) fn open(path: Option<PathBuf>, head: Position, is_anew: bool) -> Self {
        let read = path.as_deref().map_or(Ok(None), read).unwrap_or_else(|error| {
            tracing::warn!(?path, %error, "the progress of the other replicas cannot be read: they are sent what is here");
            None
        });
        let content = match read {
            Some(content) if content.head <= head && !is_anew => content,
            Some(_) => {
                tracing::warn!(?path, "the journal is not the one known to the other replicas");
                Content::new(head)
            }
            None => Content::new(head),
        };
        Marks { path, content, saved: Content::default() }
    }

    pub(super) fn journal(&self) -> &str {
        &self.content.journal
    }

    /// The progress of another replica.
    pub(super) fn get(&self, id: &NodeId) -> Option<&Mark> {
        self.content.peers.get(id)
    }

    /// The replicas that are there, or that the last process knew.
    pub(super) fn known(&self) -> &KnownJournals {
        &self.content.known
    }

    /// Updates which replicas are there.
    pub(super) fn set_known(&mut self, known: KnownJournals) {
        self.content.known = known;
    }

    /// Updates the progress of another replica.
    pub(super) fn note(&mut self, id: &NodeId, mark: Mark) {
        self.content.head = self.content.head.max(mark.position);
        self.content.peers.insert(id.clone(), mark);
        while self.content.peers.len() > MOST {
            let last = self.content.peers.iter().min_by_key(|(_, mark)| mark.position).map(|(id, _)| id.clone());
            last.and_then(|id| self.content.peers.remove(&id));
        }
    }

    /// The path and content to write if anything has changed; `head` is that of the journal.
    pub(super) fn unsaved(&mut self, head: Position) -> Option<(PathBuf, Vec<u8>)> {
        let path = self.path.clone()?;
        self.content.head = head;
        if self.content == self.saved {
            return None;
        }
        self.saved = self.content.clone();
        Some((path, serde_json::to_vec(&self.content).unwrap_or_default()))
    }
}

impl Content {
    fn new(head: Position) -> Self {
        let journal = format!("{:016x}", fastrand::u64(..));
        Content { format: FORMAT, journal, head, peers: BTreeMap::new(), known: KnownJournals::new() }
    }
}

fn read(path: &Path) -> io::Result<Option<Content>> {
    match std::fs::read(path) {
        Ok(bytes) => {
            let content: Content = serde_json::from_slice(&bytes)?;
            match content.format {
                FORMAT => Ok(Some(content)),
                format => Err(io::Error::other(format!("it has format {format}, and only {FORMAT} is known here"))),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::atomic_file;

    fn id(id: &str) -> NodeId {
        NodeId::try_from(id).unwrap()
    }

    fn save(marks: &mut Marks, head: Position) {
        let (path, bytes) = marks.unsaved(head).unwrap();
        atomic_file::replace(&path, &bytes).unwrap();
        assert_eq!(marks.unsaved(head), None);
    }

    #[test]
    fn marks_are_read_back_and_those_of_another_journal_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = Some(folder.path().join("peers.json"));
        let mut marks = Marks::open(path.clone(), 0, false);
        let name = marks.journal().to_owned();
        let mark = Mark { journal: "b's".to_owned(), position: 7 };
        marks.note(&id("b"), mark.clone());
        let known = KnownJournals::from([(id("b"), Some(u64::MAX)), (id("c"), None)]);
        marks.set_known(known.clone());
        save(&mut marks, 9);
        let again = Marks::open(path.clone(), 9, false);
        assert_eq!(*again.known(), known);
        assert_eq!((again.get(&id("b")), again.journal()), (Some(&mark), &*name));
        // A journal that was deleted, or restored from a backup.
        let lost = Marks::open(path.clone(), 3, false);
        assert_eq!(lost.get(&id("b")), None);
        assert_ne!(lost.journal(), name);
        // A journal that continues at the same position, but has lost its entries.
        let anew = Marks::open(path.clone(), 9, true);
        assert_eq!(anew.get(&id("b")), None);
        assert_ne!(anew.journal(), name);
        for unreadable in ["{", r#"{"format":2,"journal":"x","head":0}"#] {
            std::fs::write(path.as_ref().unwrap(), unreadable).unwrap();
            assert_eq!(Marks::open(path.clone(), 9, false).get(&id("b")), None);
        }
    }

    #[test]
    fn there_are_never_more_than_some() {
        let mut marks = Marks::open(None, 0, false);
        for number in 0..1_000 {
            marks.note(&id(&format!("pod-{number}")), Mark { journal: "x".to_owned(), position: number });
        }
        assert_eq!(marks.content.peers.len(), MOST);
        assert!(marks.get(&id("pod-999")).is_some() && marks.get(&id("pod-1")).is_none());
    }
}
