//! A purged page that a cache still has.

use super::{Name, Position, Seal, StaleBecause};

/// A page, as known from a stale answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StalePage {
    /// Why it is stale.
    pub because: StaleBecause,
    /// The position of our stamp in its seal. Without one: that before the purge for which it is stale, or 0.
    pub position: Position,
    /// The random id of the answer: the same for as long as the cache has the same object.
    pub id: u64,
    /// Its seal has a stamp of our journal.
    pub has_own_stamp: bool,
    /// The names of the page.
    pub names: Vec<Name>,
    /// The target of the request.
    pub target: Vec<u8>,
    /// The host of the request; empty if it had none.
    pub host: Vec<u8>,
    /// The position that the cache had acknowledged when it was asked.
    pub asked_at: Position,
}

impl StalePage {
    /// The page of an answer with this seal to a request for this host and target. `asked_at`: the position that the
    /// cache had acknowledged when it was asked.
    pub fn new(seal: &Seal<'_>, because: StaleBecause, (host, target): (&[u8], &[u8]), asked_at: Position) -> Self {
        let before = match because {
            StaleBecause::Purged(position) => position - 1,
            StaleBecause::Foreign | StaleBecause::Forgotten | StaleBecause::Unsealed(_) => 0,
        };
        let (id, position) = (seal.id, seal.own.map_or(before, |stamp| stamp.position));
        let has_own_stamp = seal.own.is_some();
        let (host, target) = (host.to_owned(), target.to_owned());
        StalePage { because, position, id, has_own_stamp, names: seal.names().collect(), target, host, asked_at }
    }

    /// The page of an answer without a seal, for a reader who remembers `known`.
    pub fn unsealed(known: Position, (host, target): (&[u8], &[u8]), asked_at: Position) -> Self {
        let (because, host, target) = (StaleBecause::Unsealed(known), host.to_owned(), target.to_owned());
        StalePage { because, position: 0, id: 0, has_own_stamp: false, names: Vec::new(), target, host, asked_at }
    }

    /// The id of the answer, by which a cache that keeps it is recognised; `None` if it has no seal, or none with our stamp: it
    /// may be as fresh as it can be known.
    pub fn seal_id(&self) -> Option<u64> {
        self.has_own_stamp.then_some(self.id)
    }

    /// The purge for which it is stale, if its cache had not acknowledged that when it was asked: then the regular delivery is
    /// enough, and proves nothing about a page that was stored after its ban was sent.
    pub fn awaited_delivery(&self) -> Option<Position> {
        match self.because {
            StaleBecause::Purged(position) | StaleBecause::Unsealed(position) => {
                Some(position).filter(|position| self.asked_at < *position)
            }
            StaleBecause::Foreign | StaleBecause::Forgotten => None,
        }
    }

    /// Whether its seal is of another journal, so that its position is meaningless here.
    pub fn is_foreign(&self) -> bool {
        self.because == StaleBecause::Foreign
    }

    /// The position in our journal after which its purges can be found; `None` if it is unknown.
    pub fn known_since(&self) -> Option<Position> {
        match self.because {
            StaleBecause::Purged(_) => Some(self.position),
            StaleBecause::Foreign | StaleBecause::Forgotten | StaleBecause::Unsealed(_) => None,
        }
    }
}
