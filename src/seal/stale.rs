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
    /// The path that was asked for.
    pub path: Vec<u8>,
}

impl StalePage {
    /// The page with this seal that was answered to a request for `path`.
    pub fn new(seal: &Seal<'_>, because: StaleBecause, path: &[u8]) -> Self {
        let Seal { position, id, .. } = *seal;
        StalePage { because, position, id, names: seal.names().collect(), path: path.to_owned() }
    }

    /// The position in our journal from which on what was purged of it is to be found; `None` if it is in no place of it.
    pub fn known_since(&self) -> Option<Position> {
        match self.because {
            StaleBecause::Purged(_) => Some(self.position),
            StaleBecause::Foreign | StaleBecause::Forgotten => None,
        }
    }
}
