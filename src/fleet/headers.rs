//! Header fields that authorise us: purges to a Varnish whose VCL does not check addresses, and spans to a collector.
//!
//! They are secrets: no log, no dump of the configuration and no record in a registry shows a value. For the same
//! reason a record in a registry cannot refer to them: its writer could have any file of this machine sent to an
//! address of his choice.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Serialize, Serializer};

/// The source of a field's value.
#[derive(Clone, PartialEq, Eq)]
pub enum FieldValue {
    /// In the configuration itself.
    Text(Arc<str>),
    /// In a file, which may change.
    File(PathBuf),
}

/// Fields by name, whose values are secrets. [`super::VarnishSettings`] has those of every purge and health check to a Varnish.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SecretHeaders(Arc<BTreeMap<String, FieldValue>>);

impl SecretHeaders {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All fields, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &FieldValue)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// These fields, and those of `others` with other names.
    #[must_use]
    pub fn over(&self, others: &SecretHeaders) -> SecretHeaders {
        if self.is_empty() {
            return others.clone();
        }
        let is_new = |name: &str| !self.0.keys().any(|mine| mine.eq_ignore_ascii_case(name));
        let kept = others.0.iter().filter(|(name, _)| is_new(name));
        self.0.iter().chain(kept).map(|(name, value)| (name.clone(), value.clone())).collect()
    }
}

impl FromIterator<(String, FieldValue)> for SecretHeaders {
    fn from_iter<I: IntoIterator<Item = (String, FieldValue)>>(fields: I) -> Self {
        SecretHeaders(Arc::new(fields.into_iter().collect()))
    }
}

impl fmt::Debug for SecretHeaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl fmt::Debug for FieldValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FieldValue::Text(_) => f.write_str("Text(…)"),
            FieldValue::File(path) => f.debug_tuple("File").field(path).finish(),
        }
    }
}

impl Serialize for FieldValue {
    /// Writes the name of a file, or a placeholder for the value itself.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            FieldValue::Text(_) => serializer.serialize_str("(hidden)"),
            FieldValue::File(path) => serializer.collect_map([("file", path)]),
        }
    }
}

impl Serialize for SecretHeaders {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(of: &[(&str, &str)]) -> SecretHeaders {
        of.iter().map(|&(name, value)| (name.to_owned(), FieldValue::Text(value.into()))).collect()
    }

    #[test]
    fn the_fields_of_a_node_count_before_those_of_all() {
        let all = fields(&[("x-key", "all"), ("X-Other", "o")]);
        assert_eq!(fields(&[("X-Key", "own")]).over(&all), fields(&[("X-Key", "own"), ("X-Other", "o")]));
        assert_eq!(SecretHeaders::default().over(&all), all);
    }

    #[test]
    fn no_value_is_ever_shown() {
        let secret = fields(&[("X-Key", "s3cret")]);
        for shown in [format!("{secret:?}"), serde_json::to_string(&secret).unwrap()] {
            assert!(shown.contains("X-Key") && !shown.contains("s3cret"), "{shown}");
        }
    }
}
