//! The last incident of each kind, in words.
//!
//! A counter says that purges are refused, or that files run out, but not what was refused and why: the log does, a line
//! among many. Who looks at the status page or at `clearcoat status` wants the last one of each kind, so its words are kept:
//! one text a kind, whatever happens how often. An incident that is a state (a configuration that was refused) lasts until
//! it is over; any other one fades ([`Incidents::present`]).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

/// The age at which an incident that is no state is not shown any more: the range of the alerts about it
/// (`deploy/prometheus/rules.yml`).
const FADES_AFTER: Duration = Duration::from_secs(5 * 60);

/// The most characters of an incident's words: a part of them may come from strangers.
const MAX_WORDS: usize = 400;

/// What may happen to this process itself, beside single nodes and requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum IncidentKind {
    /// A purge was not accepted.
    PurgeRefused,
    /// There was too little of files, ports or memory.
    Shortage,
    /// A changed configuration was refused.
    ReloadRefused,
    /// A renewed certificate could not be used.
    CertificateRefused,
    /// Lines of the access log were lost.
    AccessLogLost,
    /// Requests were refused, as every node was at its limit.
    Overload,
}

/// An incident in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incident {
    /// What happened.
    pub words: Arc<str>,
    /// When it did last.
    pub at: SystemTime,
}

/// The last incident of each kind.
#[derive(Debug, Default)]
pub struct Incidents(Mutex<BTreeMap<IncidentKind, Incident>>);

impl IncidentKind {
    /// All kinds.
    pub const ALL: [IncidentKind; 6] = [
        IncidentKind::PurgeRefused,
        IncidentKind::Shortage,
        IncidentKind::ReloadRefused,
        IncidentKind::CertificateRefused,
        IncidentKind::AccessLogLost,
        IncidentKind::Overload,
    ];

    /// Whether it lasts until [`Incidents::end`].
    pub fn is_state(self) -> bool {
        matches!(self, IncidentKind::ReloadRefused | IncidentKind::CertificateRefused)
    }
}

impl Incidents {
    /// Records an incident of now.
    pub fn note(&self, kind: IncidentKind, words: &str) {
        self.note_at(SystemTime::now(), kind, words);
    }

    fn note_at(&self, at: SystemTime, kind: IncidentKind, words: &str) {
        let end = words.char_indices().nth(MAX_WORDS).map_or(words.len(), |(end, _)| end);
        self.0.lock().insert(kind, Incident { words: words[..end].into(), at });
    }

    /// Records that a state is over.
    pub fn end(&self, kind: IncidentKind) {
        self.0.lock().remove(&kind);
    }

    /// Whether one of this kind was recorded and, if it is a state, is not over.
    pub fn has(&self, kind: IncidentKind) -> bool {
        self.0.lock().contains_key(&kind)
    }

    /// The incidents that count at this time.
    pub fn present(&self, now: SystemTime) -> Vec<(IncidentKind, Incident)> {
        let counts = |(kind, incident): &(&IncidentKind, &Incident)| {
            kind.is_state() || now.duration_since(incident.at).unwrap_or_default() < FADES_AFTER
        };
        self.0.lock().iter().filter(counts).map(|(kind, incident)| (*kind, incident.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incident_fades_and_a_state_lasts_until_it_is_over() {
        let incidents = Incidents::default();
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        incidents.note_at(at(1), IncidentKind::PurgeRefused, "first");
        incidents.note_at(at(2), IncidentKind::PurgeRefused, "second");
        incidents.note_at(at(2), IncidentKind::ReloadRefused, "bad");
        let words = |seconds| -> Vec<String> {
            let present = incidents.present(at(seconds));
            present.into_iter().map(|(_, incident)| incident.words.to_string()).collect()
        };
        assert_eq!(words(301), ["second", "bad"]);
        assert_eq!(words(302), ["bad"]);
        // A clock that was set back hides nothing.
        assert_eq!(words(0), ["second", "bad"]);
        incidents.note_at(at(2), IncidentKind::ReloadRefused, &"ä".repeat(MAX_WORDS + 1));
        assert_eq!(words(302), ["ä".repeat(MAX_WORDS)]);
        incidents.end(IncidentKind::ReloadRefused);
        assert!(words(302).is_empty());
    }
}
