//! `log.level`: which lines are written.
//!
//! A level alone is about clearcoat. Lines of libraries are for those who debug one of them, and are enabled by its
//! name: `debug,h2=debug`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tracing_subscriber::filter::{LevelFilter, Targets};

use super::text::{self, FromText};

/// The target of our own lines, and the prefix of those of our modules.
const OWN: &str = "clearcoat";

/// Levels by target, as they were written.
#[derive(Clone, Debug, PartialEq)]
pub struct LogFilter {
    text: String,
    targets: Targets,
}

impl LogFilter {
    /// For the subscriber.
    pub fn targets(&self) -> &Targets {
        &self.targets
    }
}

impl Default for LogFilter {
    /// `info`.
    fn default() -> Self {
        LogFilter { text: "info".to_owned(), targets: Targets::new().with_target(OWN, LevelFilter::INFO) }
    }
}

impl FromText for LogFilter {
    const WANTED: &'static str =
        "error, warn, info, debug or trace, and off or one of these for libraries, such as debug,h2=debug";

    fn from_text(text: &str) -> Option<Self> {
        let mut targets = Targets::new();
        for part in text.split(',') {
            let (target, level) = part.split_once('=').unwrap_or((OWN, part));
            let is_target =
                !target.is_empty() && target.bytes().all(|b| b.is_ascii_alphanumeric() || b"_:".contains(&b));
            targets = targets.with_target(target, level_of(level).filter(|_| is_target)?);
        }
        Some(LogFilter { text: text.to_owned(), targets })
    }
}

/// The level of this name. `LevelFilter` would take numbers, too.
fn level_of(name: &str) -> Option<LevelFilter> {
    ["off", "error", "warn", "info", "debug", "trace"].contains(&name).then(|| name.parse().ok())?
}

impl FromStr for LogFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        LogFilter::from_text(text).ok_or_else(|| format!("wanted {}", LogFilter::WANTED))
    }
}

impl fmt::Display for LogFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for LogFilter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LogFilter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text::one(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn a_level_alone_is_about_clearcoat_and_a_library_is_named() {
        let written = |filter: &str, target: &str, level: Level| {
            filter.parse::<LogFilter>().unwrap().targets().would_enable(target, &level)
        };
        assert!(written("debug", "clearcoat::journal::disk", Level::DEBUG));
        assert!(!written("debug", "clearcoat", Level::TRACE));
        assert!(!written("debug", "h2", Level::ERROR));
        assert!(written("info,h2=debug", "h2::proto", Level::DEBUG));
        assert!(!written("info,h2=debug", "clearcoat", Level::DEBUG));
        assert!(written("warn,clearcoat::journal=trace", "clearcoat::journal::disk", Level::TRACE));
        assert!(!written("off", "clearcoat", Level::ERROR));
    }

    #[test]
    fn it_prints_as_it_was_written_and_what_is_no_filter_is_refused() {
        assert_eq!("debug,h2=off".parse::<LogFilter>().unwrap().to_string(), "debug,h2=off");
        assert_eq!("info".parse::<LogFilter>().unwrap(), LogFilter::default());
        for bad in ["", "loud", "3", "h2", "=debug", "h2=", "debug,", "debug, h2=debug", "h2[x]=debug"] {
            assert!(bad.parse::<LogFilter>().is_err(), "{bad}");
        }
    }
}
