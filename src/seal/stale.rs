//! A page that a cache has though it was purged.

use super::{Name, Position, Seal, StaleBecause};

/// What is known of a page by an answer that was caught.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StalePage {
    /// Why it is stale.
    pub because: StaleBecause,
    /// The position of its seal.
    pub position: Position,
    /// The random name of the answer: the same for as long as it is the same object of the cache.
    pub id: u64,
    /// The names of the page.
    pub names: Vec<Name>,
    /// The target that was asked for.
    pub target: Vec<u8>,
    /// The host that was; empty if none was.
    pub host: Vec<u8>,
    /// What the cache had acknowledged when it was asked.
    pub asked_at: Position,
}

impl StalePage {
    /// The page with this seal that was answered to a request for this target of this host, by a cache that had acknowledged
    /// everything up to `asked_at` when it was asked.
    pub fn new(seal: &Seal<'_>, because: StaleBecause, (host, target): (&[u8], &[u8]), asked_at: Position) -> Self {
        let Seal { position, id, .. } = *seal;
        let (host, target) = (host.to_owned(), target.to_owned());
        StalePage { because, position, id, names: seal.names().collect(), target, host, asked_at }
    }

    /// The same of an answer without a seal, for a reader who remembers `known`.
    pub fn unsealed(known: Position, (host, target): (&[u8], &[u8]), asked_at: Position) -> Self {
        let (because, host, target) = (StaleBecause::Unsealed(known), host.to_owned(), target.to_owned());
        StalePage { because, position: 0, id: 0, names: Vec::new(), target, host, asked_at }
    }

    /// The name of the answer by its seal; `None` if it has none.
    pub fn seal_id(&self) -> Option<u64> {
        (!matches!(self.because, StaleBecause::Unsealed(_))).then_some(self.id)
    }

    /// Whether it is of another journal, so that its position says nothing here.
    pub fn is_foreign(&self) -> bool {
        self.because == StaleBecause::Foreign
    }

    /// The position in our journal from which on what was purged of it is to be found; `None` if it is in no place of it.
    pub fn known_since(&self) -> Option<Position> {
        match self.because {
            StaleBecause::Purged(_) => Some(self.position),
            StaleBecause::Foreign | StaleBecause::Forgotten | StaleBecause::Unsealed(_) => None,
        }
    }
}
