//! The ranges of `[timeouts]`.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::super::Timeouts;

const TEN_MINUTES: Duration = Duration::from_secs(600);
const AN_HOUR: Duration = Duration::from_secs(3600);
const A_DAY: Duration = Duration::from_secs(24 * 3600);

/// The most that a client may go on sending after its last answer.
const LONGEST_FIN: Duration = Duration::from_secs(30);

/// The kernel counts the seconds between keepalive probes, and five of them are sent.
const SILENCE: RangeInclusive<Duration> = Duration::from_secs(5)..=TEN_MINUTES;

impl Timeouts {
    /// The keys whose values are not allowed, without their section, and what is.
    pub(super) fn faults(&self) -> Vec<(&'static str, &'static str)> {
        const UP_TO_TEN_MINUTES: &str = "must be above 0s and at most 600s";
        const UP_TO_A_DAY: &str = "must be above 0s and at most 24h";
        let up_to = |longest: Duration, wait: Duration| !wait.is_zero() && wait <= longest;
        let rules = [
            ("client_header", up_to(TEN_MINUTES, self.client_header), UP_TO_TEN_MINUTES),
            ("client_body", up_to(A_DAY, self.client_body), UP_TO_A_DAY),
            ("client_fin", up_to(LONGEST_FIN, self.client_fin), "must be above 0s and at most 30s"),
            ("connect", up_to(TEN_MINUTES, self.connect), UP_TO_TEN_MINUTES),
            ("first_byte", up_to(A_DAY, self.first_byte), UP_TO_A_DAY),
            ("between_bytes", up_to(A_DAY, self.between_bytes), UP_TO_A_DAY),
            ("fragment", up_to(TEN_MINUTES, self.fragment), UP_TO_TEN_MINUTES),
            ("keep_alive", up_to(A_DAY, self.keep_alive), UP_TO_A_DAY),
            ("node_keep_alive", self.node_keep_alive <= AN_HOUR, "must be at most 1h; 0s keeps none"),
            ("request", self.request.is_none_or(|request| request <= A_DAY), "must be at most 24h; 0s is no limit"),
            ("node_silence", SILENCE.contains(&self.node_silence), "must be 5s to 600s"),
        ];
        rules.into_iter().filter(|(_, holds, _)| !holds).map(|(key, _, reason)| (key, reason)).collect()
    }
}
