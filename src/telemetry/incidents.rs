//! The last incident of each kind, in words.
//!
//! A counter says that purges are refused, or that files run out, but not what was refused and why: the log does, a line
//! among many. Who looks at the status page or at `clearcoat status` wants the last one of each kind, so its words are kept:
//! one text a kind, whatever happens how often. An incident that is a state (a configuration that was refused) lasts until
//! it is over; any other one fades ([`Incidents::present`]).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

/// The age at which an incident that is no state is not shown any more: the range of the alerts about it
/// (`deploy/prometheus/rules.yml`).
const FADES_AFTER: Duration = Duration::from_mins(5);

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
}

/// An incident in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incident {
    /// What happened.
    pub words: Arc<str>,
    /// When it did last, in milliseconds since 1970.
    pub at_ms: u64,
}

/// The last incident of each kind.
#[derive(Debug, Default)]
pub struct Incidents(Mutex<BTreeMap<IncidentKind, Incident>>);

impl IncidentKind {
    /// All kinds.
    pub const ALL: [IncidentKind; 5] = [
        IncidentKind::PurgeRefused,
        IncidentKind::Shortage,
        IncidentKind::ReloadRefused,
        IncidentKind::CertificateRefused,
        IncidentKind::AccessLogLost,
    ];

    /// Whether it lasts until [`Incidents::end`].
    pub fn is_state(self) -> bool {
        matches!(self, IncidentKind::ReloadRefused | IncidentKind::CertificateRefused)
    }
}

impl Incidents {
    /// Records an incident at this time, in milliseconds since 1970.
    pub fn note(&self, kind: IncidentKind, words: impl Into<Arc<str>>, at_ms: u64) {
        self.0.lock().insert(kind, Incident { words: words.into(), at_ms });
    }

    /// Records that a state is over.
    pub fn end(&self, kind: IncidentKind) {
        self.0.lock().remove(&kind);
    }

    /// The incidents that count at this time, in milliseconds since 1970.
    pub fn present(&self, now_ms: u64) -> Vec<(IncidentKind, Incident)> {
        let counts = |(kind, incident): &(&IncidentKind, &Incident)| {
            kind.is_state() || u128::from(now_ms.saturating_sub(incident.at_ms)) < FADES_AFTER.as_millis()
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
        incidents.note(IncidentKind::PurgeRefused, "first", 1_000);
        incidents.note(IncidentKind::PurgeRefused, "second", 2_000);
        incidents.note(IncidentKind::ReloadRefused, "bad", 2_000);
        let words = |now_ms| -> Vec<String> {
            incidents.present(now_ms).into_iter().map(|(_, incident)| incident.words.to_string()).collect()
        };
        assert_eq!(words(301_999), ["second", "bad"]);
        assert_eq!(words(302_000), ["bad"]);
        // A clock that was set back hides nothing.
        assert_eq!(words(0), ["second", "bad"]);
        incidents.end(IncidentKind::ReloadRefused);
        assert!(words(302_000).is_empty());
    }
}
