//! The parsers of the flags' values. Their errors say what is accepted instead.

use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::agent::Signal;
use crate::config::{HEADER_LIMIT, is_host_port};
use crate::fleet::NodeId;

/// The shortest TTL of a lease: etcd itself grants no lease that an election could outlast.
const SHORTEST_TTL: Duration = Duration::from_secs(2);
const LONGEST_TTL: Duration = Duration::from_secs(3600);
const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);

pub(super) fn stop_signal() -> impl TypedValueParser<Value = Signal> {
    PossibleValuesParser::new(["TERM", "INT", "QUIT", "WINCH", "USR1", "USR2"]).map(|name| match name.as_str() {
        "INT" => Signal::INT,
        "QUIT" => Signal::QUIT,
        "WINCH" => Signal::WINCH,
        "USR1" => Signal::USR1,
        "USR2" => Signal::USR2,
        _ => Signal::TERM,
    })
}

pub(super) fn node_id(text: &str) -> Result<NodeId, String> {
    NodeId::try_from(text).map_err(|error| error.to_string())
}

pub(super) fn host_port(text: &str) -> Result<String, &'static str> {
    if is_host_port(text) {
        Ok(text.to_owned())
    } else {
        Err("wanted HOST:PORT such as 192.0.2.11:6081 or [2001:db8::1]:80")
    }
}

pub(super) fn text(text: &str) -> Result<String, &'static str> {
    let is_text = !text.is_empty() && text.len() <= 256 && !text.chars().any(char::is_control);
    if is_text { Ok(text.to_owned()) } else { Err("wanted 1 to 256 bytes without control characters") }
}

pub(super) fn label(given: &str) -> Result<(String, String), &'static str> {
    let (name, value) = given.split_once('=').ok_or("wanted NAME=TEXT such as rack=7")?;
    let is_name = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-/".contains(&b));
    if is_name { Ok((name.to_owned(), text(value)?)) } else { Err("wanted NAME=TEXT such as rack=7") }
}

pub(super) fn header_limit(text: &str) -> Result<usize, String> {
    let (least, most) = HEADER_LIMIT.into_inner();
    let limit = text.parse().ok().filter(|limit| HEADER_LIMIT.contains(limit));
    limit.ok_or_else(|| format!("must be {least} to {most} bytes"))
}

pub(super) fn duration(text: &str) -> Result<Duration, &'static str> {
    const LONGEST: Duration = Duration::from_secs(24 * 3600);
    let duration = humantime::parse_duration(text).ok().filter(|duration| *duration <= LONGEST);
    duration.ok_or("wanted a duration of at most 1day such as 500ms, 5s or 1m")
}

pub(super) fn ttl(text: &str) -> Result<Duration, &'static str> {
    let in_bounds = |ttl: &Duration| (SHORTEST_TTL..=LONGEST_TTL).contains(ttl) && ttl.subsec_nanos() == 0;
    duration(text).ok().filter(in_bounds).ok_or("wanted whole seconds, 2s to 1h")
}

pub(super) fn interval(text: &str) -> Result<Duration, &'static str> {
    duration(text).ok().filter(|interval| *interval >= SHORTEST_INTERVAL).ok_or("wanted at least 10ms, such as 2s")
}

pub(super) fn timeout(text: &str) -> Result<Duration, &'static str> {
    duration(text).ok().filter(|timeout| !timeout.is_zero()).ok_or("wanted more than 0s, such as 500ms")
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;
    use crate::config::LogFormat;
    use crate::fleet::{PurgeDialect, Role, SendProxy};

    fn are_named_as_in_the_configuration<T: ValueEnum + serde::Serialize>() {
        for value in T::value_variants() {
            let flag = value.to_possible_value().unwrap();
            assert_eq!(serde_json::to_value(value).unwrap(), flag.get_name());
        }
    }

    #[test]
    fn a_value_has_one_name_on_the_command_line_and_in_the_configuration() {
        are_named_as_in_the_configuration::<Role>();
        are_named_as_in_the_configuration::<PurgeDialect>();
        are_named_as_in_the_configuration::<SendProxy>();
        are_named_as_in_the_configuration::<LogFormat>();
    }

    #[test]
    fn a_lease_has_whole_seconds_and_bounds() {
        assert_eq!(ttl("30s"), Ok(Duration::from_secs(30)));
        for bad in ["1s", "2500ms", "2h", "30", ""] {
            assert!(ttl(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_label_has_a_name_and_a_text() {
        assert_eq!(label("rack=7=b"), Ok(("rack".to_owned(), "7=b".to_owned())));
        for bad in ["rack", "=7", "rack=", "a b=c", "rack=\n"] {
            assert!(label(bad).is_err(), "{bad:?}");
        }
    }
}
