//! The content of the next message to another replica: our purges, and their answers.
//!
//! A message is never larger than the other replica accepts (`purge.max_request`): a larger one would be refused every time.

use std::time::Duration;

use super::super::Replicas;
use super::Peer;
use crate::journal::{Entry, Missed, Position, PurgeMessage, Shared};
use crate::purge::{Purge, Target};

/// The approximate maximum size of the purges in a message in bytes, unless `purge.max_request` is less.
const MAX_MESSAGE: usize = 256 << 10;

/// The maximum number of refused purges named in a message.
const MAX_REFUSED: usize = 500;

/// The same for the last message, which must fit into any limit.
const MAX_REFUSED_LAST: usize = 100;

#[derive(Default)]
pub(super) struct Next {
    pub(super) purges: Vec<PurgeMessage>,
    /// The names of those purges that were answered as done.
    pub(super) done: Vec<String>,
    /// The names of those that wait for every Varnish.
    pub(super) unsealed: Vec<String>,
    /// The approximate size of all that in bytes.
    pub(super) bytes: usize,
    /// The position up to which the replica has everything then.
    pub(super) last: Position,
    pub(super) closes_gap: bool,
}

/// The purges that were accepted here after `sent`, as far as they fit into `room` bytes.
pub(super) fn next(
    replicas: &Replicas,
    peer: &Peer,
    journal: &dyn Shared,
    sent: Option<Position>,
    room: usize,
) -> Next {
    // Read first, so that later purges are sent after it.
    let head = journal.head();
    let missed = sent.map_or(Missed::Truncated, |sent| journal.since(sent));
    let Missed::Entries(entries) = missed else {
        if replicas.has_journal_in_common() {
            // A replica that missed so much sees the gap in the shared journal, too.
            return Next { last: head, closes_gap: true, ..Next::default() };
        }
        tracing::warn!(
            replica = %peer.id, head,
            "the backlog of a replica is no longer known: it is sent one purge of everything"
        );
        let id = super::super::gap_name(&replicas.own.boot, &peer.record.boot, head);
        let message = PurgeMessage { id, revision: None, at_ms: journal.now_ms(), purge: everything_missed() };
        return Next { purges: vec![message], last: head, closes_gap: true, ..Next::default() };
    };
    let (mut purges, mut done, mut unsealed) = (Vec::new(), Vec::new(), Vec::new());
    let (mut bytes, mut last) = (0, sent.unwrap_or(0));
    for entry in entries {
        let ours = entry.origin.as_ref().filter(|origin| origin.ours);
        if let Some(origin) = ours {
            let (purge, size) = fitting(message(journal.revision(entry.position), &origin.id, &entry), room);
            let is_done = replicas.context.deliveries.is_done(entry.position);
            let is_unsealed = replicas.context.deliveries.has_sealed_purges()
                && !replicas.context.deliveries.is_sealed(entry.position);
            let size = size + (usize::from(is_done) + usize::from(is_unsealed)) * listed(&origin.id);
            if bytes + size > MAX_MESSAGE.min(room) && !purges.is_empty() {
                break;
            }
            bytes += size;
            purges.push(purge);
            done.extend(is_done.then(|| origin.id.to_string()));
            unsealed.extend(is_unsealed.then(|| origin.id.to_string()));
        }
        last = entry.position;
    }
    Next { purges, done, unsealed, bytes, last, closes_gap: false }
}

/// Replaces any number of purges, including those of pages without tags.
fn everything_missed() -> Purge {
    Purge { targets: vec![Target::All], soft: false }
}

/// A purge that fits into a message, and its size there. As JSON it can be larger than it was as a request, and would then
/// be refused every time.
fn fitting(message: PurgeMessage, room: usize) -> (PurgeMessage, usize) {
    let size = |message: &PurgeMessage| serde_json::to_vec(message).map_or(0, |json| json.len());
    let as_it_is = size(&message);
    if as_it_is <= room {
        return (message, as_it_is);
    }
    let message = PurgeMessage { purge: Purge::everything(), ..message };
    let size = size(&message);
    (message, size)
}

fn message(revision: Option<u64>, id: &str, entry: &Entry) -> PurgeMessage {
    PurgeMessage { id: id.to_owned(), revision, at_ms: entry.at_ms, purge: entry.purge.clone() }
}

/// How long the other replica may wait for its Varnish nodes, such that its answer arrives before we answer the sender: our
/// timeout without a margin for receiving and answering, and without the time that etcd took. Of a sealed purge, for which it
/// waits only if it knows better: before we begin to wait for Varnish ourselves, because it did not confirm it. Old purges were
/// answered long ago, so they get the minimum.
fn others_patience(ack_timeout: Duration, is_any_sealed: bool, accepted_ms: u64, now_ms: u64) -> Duration {
    let gone = Duration::from_millis(now_ms.saturating_sub(accepted_ms));
    let eighths = if is_any_sealed { 3 } else { 5 };
    (ack_timeout * eighths / 8).saturating_sub(gone).max(ack_timeout / 8)
}

/// The time for which the other replica may wait with these purges, of which some are sealed here, or none.
pub(super) fn patience(
    replicas: &Replicas,
    journal: &dyn Shared,
    purges: &[PurgeMessage],
    is_any_sealed: bool,
) -> Duration {
    let newest_ms = purges.iter().map(|message| message.at_ms).max().unwrap_or(0);
    // Both times are from our own clock, because the purges were accepted here.
    others_patience(replicas.context.ack_timeout, is_any_sealed, newest_ms, journal.now_ms())
}

/// The names of the newest refused purges, for the last message, after which no replica may report them.
pub(super) fn refused_last(replicas: &Replicas) -> Vec<String> {
    let Some(journal) = &replicas.context.journal else { return Vec::new() };
    let positions = replicas.context.deliveries.newest_refused(MAX_REFUSED_LAST);
    positions.into_iter().filter_map(|position| Some(journal.name_of(position)?.to_string())).collect()
}

/// The names of refused purges, from number `next` on, that the other replica has confirmed, as far as they fit into `room`
/// bytes.
pub(super) fn refused(
    replicas: &Replicas,
    peer: &Peer,
    journal: &dyn Shared,
    next: &mut u64,
    room: usize,
) -> Vec<String> {
    let confirmed = peer.confirmed_up_to();
    let refused = replicas.context.deliveries.refused_from(*next, MAX_REFUSED);
    let refused =
        refused.into_iter().take_while(|(_, position)| confirmed.is_some_and(|confirmed| *position <= confirmed));
    let (mut names, mut bytes) = (Vec::new(), 0);
    for (number, position) in refused {
        // A purge that is no longer held leaves doubt there or not, as it did when it was dropped.
        if let Some(name) = journal.name_of(position) {
            bytes += listed(&name);
            if bytes > room {
                break;
            }
            names.push(name.to_string());
        }
        *next = number + 1;
    }
    names
}

/// The size of a name in a JSON list, in bytes.
fn listed(name: &str) -> usize {
    name.len() + "\"\",".len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_purge_that_no_message_takes_is_told_as_one_of_everything() {
        let request = |pattern: &str| {
            let mut headers = http::HeaderMap::new();
            headers.insert("X-Magento-Tags-Pattern", pattern.parse().unwrap());
            let (method, rules) = (http::Method::from_bytes(b"PURGE").unwrap(), crate::purge::PurgeRules::default());
            crate::purge::parse(&method, &"/".parse().unwrap(), &headers, &rules).unwrap().purge
        };
        let message = |purge| PurgeMessage { id: "a".to_owned(), revision: None, at_ms: 1, purge };
        let (small, large) =
            (message(request("((^|,)cat_p_1(,|$))")), message(request(&format!("a{}", r"\.".repeat(2_000)))));
        assert_eq!(fitting(small.clone(), 4_500).0, small);
        let (fitted, size) = fitting(large, 4_500);
        assert!(fitted.purge.targets == [Target::Everything] && size < 200, "{size}");
    }

    #[test]
    fn the_other_one_answers_before_the_sender_of_the_purge_is_answered() {
        let ack = Duration::from_millis(1_000);
        let patience = |gone: u64| others_patience(ack, false, 10_000, 10_000 + gone).as_millis();
        assert_eq!([0, 350, 700, 60_000].map(patience), [625, 275, 125, 125]);
        // The clock was set back.
        assert_eq!(others_patience(ack, false, 10_000, 9_000).as_millis(), 625);
        assert_eq!(others_patience(ack, true, 10_000, 10_100).as_millis(), 275);
    }
}
