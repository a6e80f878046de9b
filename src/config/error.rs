//! The errors of a configuration: one line each, all of them at once.

use std::fmt;
use std::io;

use super::Config;
use super::check::Violation;
use super::nearest::nearest;
use super::places::{KeyPlaces, TextPlace};
use super::raw::{Located, PathStep, Raw};
use super::read::Reason;
use super::remarks::variable_of;

/// The most keys of other tables that are named for one that is unknown.
const MOST_MEANT: usize = 3;

/// Keys that have another place now, with the same meaning and range.
const MOVED: [(&str, &str); 1] = [("limits.header_timeout", "timeouts.client_header")];

/// One thing that is wrong.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{file}: {cause}")]
    Unreadable {
        /// The file, as it was named.
        file: String,
        /// Why not.
        cause: io::Error,
    },
    /// The file is not TOML.
    #[error("{file}:{line}:{column}: {message}")]
    Syntax {
        /// The file, as it was named.
        file: String,
        /// Counted from 1.
        line: usize,
        /// In characters, counted from 1.
        column: usize,
        /// What the parser expected.
        message: String,
    },
    /// A variable that cannot be put into place.
    #[error("{variable}: {reason}")]
    Variable {
        /// Its whole name.
        variable: String,
        /// Why not.
        reason: String,
    },
    /// A key or its value.
    #[error("{source_name}: {key}{}: {reason}", value.as_ref().map(|value| format!(" = {value}")).unwrap_or_default())]
    Key {
        /// `FILE:LINE:COLUMN`, or the variable; `default` for a default that does not go with what was set.
        source_name: String,
        /// Such as `edge.listen[0]`, counted from 0.
        key: String,
        /// As it was written; `None` if it is a table or missing.
        value: Option<String>,
        /// What is wrong and what is allowed.
        reason: String,
    },
}

impl ConfigError {
    pub(super) fn syntax(file: &str, text: &str, error: &toml::de::Error) -> Self {
        let TextPlace { line, column } = TextPlace::of(text, error.span().map_or(0, |span| span.start));
        ConfigError::Syntax { file: file.to_owned(), line, column, message: error.message().replace('\n', "; ") }
    }
}

/// Everything that is wrong, in the order in which it was found. Prints one line each.
#[derive(Debug)]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// The single errors; never none.
    pub fn iter(&self) -> impl Iterator<Item = &ConfigError> {
        self.0.iter()
    }
}

impl From<ConfigError> for ConfigErrors {
    fn from(error: ConfigError) -> Self {
        ConfigErrors(vec![error])
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Collects errors while a configuration is read.
pub(super) struct ErrorReport {
    /// The file, and where its keys stand.
    file: Option<(String, KeyPlaces)>,
    errors: Vec<ConfigError>,
}

impl ErrorReport {
    /// `file`: its name and its text.
    pub(super) fn new(file: Option<(String, &str)>) -> Self {
        ErrorReport { file: file.map(|(name, text)| (name, KeyPlaces::of(text))), errors: Vec::new() }
    }

    pub(super) fn push(&mut self, error: ConfigError) {
        self.errors.push(error);
    }

    /// A value that could not be read as what its key wants.
    pub(super) fn unread(&mut self, raw: &Raw, path: &[PathStep], reason: &Reason) {
        let found = raw.find(path);
        let mut found = found.unwrap_or(Located { key: "the file".to_owned(), value: None, variable: None });
        if let Reason::Missing(field) = reason {
            found.key = format!("{}.{field}", found.key);
            // It was there, but could not be read and was taken out.
            if self.blames(&found.key) {
                return;
            }
        }
        let source_name = self.source_of(&found);
        // What a key that does not exist was meant to hold, nobody knows: it may be a secret.
        let is_unknown = matches!(reason, Reason::UnknownKey(_));
        let reason = match moved(&found) {
            Some(now) if is_unknown => format!("is {now} now, with the same meaning and range"),
            _ => reason.suggesting(meant(reason, &found).as_deref()),
        };
        let value = shown(&found.key, found.value).filter(|_| !is_unknown);
        self.errors.push(ConfigError::Key { source_name, key: found.key, value, reason });
    }

    /// A readable value that is not allowed. Says nothing about a key that is blamed already.
    pub(super) fn violation(&mut self, raw: &Raw, config: &Config, violation: Violation) {
        let path = steps(&violation.key);
        let (source_name, found) = match raw.find(&path) {
            Some(found) => (self.source_of(&found), found),
            None => {
                let effective = toml::Value::try_from(config).ok().map(Raw::from);
                let found = effective.and_then(|effective| effective.find(&path));
                let unshown = Located { key: violation.key, value: None, variable: None };
                ("default".to_owned(), found.unwrap_or(unshown))
            }
        };
        if !self.blames(&found.key) {
            let value = shown(&found.key, found.value);
            self.errors.push(ConfigError::Key { source_name, key: found.key, value, reason: violation.reason });
        }
    }

    /// The configuration, if nothing is wrong with it.
    pub(super) fn finish(self, config: Config) -> Result<Config, ConfigErrors> {
        if self.errors.is_empty() { Ok(config) } else { Err(ConfigErrors(self.errors)) }
    }

    fn source_of(&self, found: &Located) -> String {
        let in_file = || match &self.file {
            Some((file, places)) => match places.find(&found.key) {
                Some(place) => format!("{file}:{place}"),
                None => file.clone(),
            },
            None => "default".to_owned(),
        };
        found.variable.clone().unwrap_or_else(in_file)
    }

    /// Whether an error names this key, or an item of it.
    fn blames(&self, about: &str) -> bool {
        self.errors.iter().any(|error| match error {
            ConfigError::Key { key, .. } => {
                key.strip_prefix(about).is_some_and(|item| item.is_empty() || item.starts_with('['))
            }
            _ => false,
        })
    }
}

/// What a key, or its variable, is called now that is written as it was.
fn moved(found: &Located) -> Option<String> {
    let (_, now) = MOVED.into_iter().find(|(before, _)| *before == found.key)?;
    Some(if found.variable.is_some() { variable_of(now) } else { now.to_owned() })
}

/// What may have been meant: a word that is nearly so, or the same key of another table.
fn meant(reason: &Reason, found: &Located) -> Option<String> {
    match reason {
        Reason::UnknownKey(allowed) => {
            let (table, written) = found.key.rsplit_once('.').unwrap_or(("", &found.key));
            if let Some(near) = nearest(written, allowed.iter().copied()) {
                let dot = if table.is_empty() { "" } else { "." };
                return Some(format!("{table}{dot}{near}"));
            }
            let keys = Config::keys();
            let same = keys.iter().filter(|key| key.rsplit('.').next() == Some(written));
            let same: Vec<&str> = same.map(String::as_str).collect();
            (1..=MOST_MEANT).contains(&same.len()).then(|| same.join(" or "))
        }
        Reason::UnknownValue(allowed) => {
            let written = found.value.as_deref()?.trim_matches('"');
            nearest(written, allowed.iter().copied()).map(str::to_owned)
        }
        Reason::Missing(_) | Reason::Other(_) => None,
    }
}

/// The value, if it may be shown: what stands below `headers` is a secret.
fn shown(key: &str, value: Option<String>) -> Option<String> {
    value.filter(|_| !key.split('.').any(|part| part == "headers"))
}

/// The steps of a path such as `node[2].address`.
fn steps(path: &str) -> Vec<PathStep> {
    let parts = path.split(['.', '[']).map(|part| part.trim_end_matches(']'));
    parts.map(|part| part.parse().map_or_else(|_| PathStep::Key(part.to_owned()), PathStep::Item)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_moved_is_gone_from_its_place_and_is_at_the_other() {
        let keys = Config::keys();
        for (before, now) in MOVED {
            assert!(keys.iter().all(|key| key != before), "{before}");
            assert!(keys.iter().any(|key| key == now), "{now}");
        }
    }
}
