//! Values that are written as text: addresses, networks, durations.
//!
//! Their parsers say what went wrong in their own words ("invalid IP address syntax"); an operator needs to know what
//! to write instead. So each type states that once, and every key of the type answers with it.

use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serializer};

/// Longer than anything sensible, and far too short to overflow a clock that it is added to.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// A value that a key holds as text.
pub(super) trait FromText: Sized {
    /// What to write, with an example.
    const WANTED: &'static str;

    fn from_text(text: &str) -> Option<Self>;
}

impl FromText for SocketAddr {
    const WANTED: &'static str = "ADDRESS:PORT such as 0.0.0.0:8080 or [::]:8080";

    fn from_text(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl FromText for IpNet {
    const WANTED: &'static str = "a network such as 192.0.2.0/24, or one address";

    fn from_text(text: &str) -> Option<Self> {
        let network = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        network.ok().map(|network| network.trunc())
    }
}

impl FromText for Duration {
    const WANTED: &'static str = "a duration of at most 365days such as 500ms, 1s or 5m";

    fn from_text(text: &str) -> Option<Self> {
        humantime::parse_duration(text).ok().filter(|&duration| duration <= LONGEST)
    }
}

struct TextValue<T>(T);

impl<'de, T: FromText> Deserialize<'de> for TextValue<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        T::from_text(&text).map(TextValue).ok_or_else(|| D::Error::custom(format_args!("wanted {}", T::WANTED)))
    }
}

/// Reads one value.
pub(super) fn one<'de, D: Deserializer<'de>, T: FromText>(deserializer: D) -> Result<T, D::Error> {
    TextValue::deserialize(deserializer).map(|TextValue(value)| value)
}

/// Reads a list of them.
pub(super) fn list<'de, D: Deserializer<'de>, T: FromText>(deserializer: D) -> Result<Vec<T>, D::Error> {
    let values = Vec::<TextValue<T>>::deserialize(deserializer)?;
    Ok(values.into_iter().map(|TextValue(value)| value).collect())
}

/// Serialises a list whose items' `Display` can be parsed back.
pub(super) fn write_list<S: Serializer, T: Display>(values: &[T], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(values.iter().map(ToString::to_string))
}

/// Serialises a duration in the form that is parsed.
pub(super) fn write_duration<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_duration(*duration))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_address_is_one_host_and_host_bits_fall_away() {
        let shown = |text| IpNet::from_text(text).map(|network| network.to_string());
        assert_eq!(shown("10.1.2.3").unwrap(), "10.1.2.3/32");
        assert_eq!(shown("::1").unwrap(), "::1/128");
        assert_eq!(shown("10.1.2.3/8").unwrap(), "10.0.0.0/8");
        assert_eq!(shown("10.0.0.0/33"), None);
    }

    #[test]
    fn a_duration_has_a_unit_and_an_end() {
        assert_eq!(Duration::from_text("1500ms"), Some(Duration::from_millis(1500)));
        for bad in ["", "5", "-1s", "1 fortnight", "2years"] {
            assert_eq!(Duration::from_text(bad), None, "{bad}");
        }
    }
}
