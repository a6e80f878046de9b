//! The configuration before it has types: a tree that remembers which values came from which variable.

use std::collections::BTreeMap;

use toml::Value;

/// What the names of all our variables begin with.
pub(super) const PREFIX: &str = "CLEARCOAT_";

/// Names the file when the command line does not. It is no key.
pub(super) const FILE_VARIABLE: &str = "CLEARCOAT_CONFIG";

const BETWEEN_LEVELS: &str = "__";

/// A variable of one level that is ours; its value is the whole list of nodes.
const NODES: &str = "NODE";

/// Longer values are cut off in messages.
const SHOWN_CHARS: usize = 80;

/// Whether a variable is one of the configuration.
pub(super) fn is_read(variable: &str) -> bool {
    let name = variable.strip_prefix(PREFIX);
    name.is_some_and(|name| name.contains(BETWEEN_LEVELS) || name.eq_ignore_ascii_case(NODES))
}

/// One value of the tree.
#[derive(Clone, Debug)]
pub(super) enum Raw {
    /// What a variable holds; its type is what the key wants.
    Text { variable: String, text: String },
    /// A string, number, boolean or date of the file.
    Scalar(Value),
    /// Each item with the place it had when it was read: those at fault are taken out.
    List { variable: Option<String>, items: Vec<(usize, Raw)> },
    /// The variable is the first that made the table, if the file has none.
    Table { variable: Option<String>, entries: BTreeMap<String, Raw> },
}

/// One step down the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PathStep {
    Key(String),
    Item(usize),
}

/// What stands at a path, for messages.
pub(super) struct Located {
    /// The path as it is written, with the places that list items had when they were read.
    pub(super) key: String,
    /// The value as it is written; `None` for a table.
    pub(super) value: Option<String>,
    /// The variable that set it; `None` for the file.
    pub(super) variable: Option<String>,
}

impl Raw {
    pub(super) fn empty() -> Self {
        Raw::Table { variable: None, entries: BTreeMap::new() }
    }

    pub(super) fn from_toml(text: &str) -> Result<Self, toml::de::Error> {
        Ok(Raw::from(Value::Table(text.parse::<toml::Table>()?)))
    }

    /// Puts the variables of the configuration into the tree, over what the file says. Those that have no place there are
    /// returned, each with the reason.
    pub(super) fn override_from(&mut self, env: Vec<(String, String)>) -> Vec<(String, String)> {
        let mut misplaced = Vec::new();
        for (variable, text) in env {
            if !is_read(&variable) {
                continue;
            }
            let name = variable[PREFIX.len()..].to_ascii_lowercase();
            let levels: Vec<&str> = name.split(BETWEEN_LEVELS).collect();
            if let Err(reason) = self.set(&levels, &variable, text) {
                misplaced.push((variable, reason));
            }
        }
        misplaced
    }

    fn set(&mut self, levels: &[&str], variable: &str, text: String) -> Result<(), String> {
        let Raw::Table { entries, .. } = self else {
            return Err("names a key inside a value that is not a table".to_owned());
        };
        match levels {
            [] => Ok(()),
            [key] => {
                let new = Raw::Text { variable: variable.to_owned(), text };
                match entries.insert((*key).to_owned(), new) {
                    Some(Raw::Text { variable: other, .. }) => Err(format!("sets the same key as {other}")),
                    _ => Ok(()),
                }
            }
            [key, deeper @ ..] => {
                let made = || Raw::Table { variable: Some(variable.to_owned()), entries: BTreeMap::new() };
                entries.entry((*key).to_owned()).or_insert_with(made).set(deeper, variable, text)
            }
        }
    }

    /// The items of a list that a variable holds: a TOML array, or values between commas.
    pub(super) fn items(text: &str, variable: &str) -> Vec<(usize, Raw)> {
        let as_array = Some(text.trim()).filter(|text| text.starts_with('[')).and_then(|text| text.parse().ok());
        if let Some(Value::Array(values)) = as_array {
            return values.into_iter().map(Raw::from).enumerate().collect();
        }
        let item = |text: &str| Raw::Text { variable: variable.to_owned(), text: text.to_owned() };
        // Tables that are not TOML are one mistake, however many commas are in them.
        if text.trim_start_matches(|c: char| c == '[' || c.is_whitespace()).starts_with('{') {
            return vec![(0, item(text))];
        }
        let parts = text.split(',').map(str::trim).filter(|_| !text.trim().is_empty());
        parts.map(item).enumerate().collect()
    }

    /// Takes out what stands at a path; false if nothing does.
    pub(super) fn remove(&mut self, path: &[PathStep]) -> bool {
        let Some((step, deeper)) = path.split_first() else { return false };
        if let (Raw::Text { variable, text }, PathStep::Item(_)) = (&*self, step) {
            *self = Raw::List { items: Raw::items(text, variable), variable: Some(variable.clone()) };
        }
        match (self, step) {
            (Raw::Table { entries, .. }, PathStep::Key(key)) if deeper.is_empty() => entries.remove(key).is_some(),
            (Raw::Table { entries, .. }, PathStep::Key(key)) => {
                entries.get_mut(key).is_some_and(|below| below.remove(deeper))
            }
            (Raw::List { items, .. }, &PathStep::Item(at)) if at < items.len() => {
                if deeper.is_empty() {
                    items.remove(at);
                    return true;
                }
                items[at].1.remove(deeper)
            }
            _ => false,
        }
    }

    /// Whether anybody has said something of this key.
    pub(super) fn has(&self, key: &[&str]) -> bool {
        let path: Vec<PathStep> = key.iter().map(|part| PathStep::Key((*part).to_owned())).collect();
        self.find(&path).is_some()
    }

    /// What stands at a path; `None` if nothing does.
    pub(super) fn find(&self, path: &[PathStep]) -> Option<Located> {
        let mut at = self.clone();
        let mut key = String::new();
        let mut variable = None;
        for step in path {
            if let (Raw::Text { variable, text }, PathStep::Item(_)) = (&at, step) {
                at = Raw::List { items: Raw::items(text, variable), variable: Some(variable.clone()) };
            }
            variable = at.variable().or(variable);
            match (at, step) {
                (Raw::Table { mut entries, .. }, PathStep::Key(name)) => {
                    at = entries.remove(name)?;
                    let dot = if key.is_empty() { "" } else { "." };
                    key.push_str(&format!("{dot}{name}"));
                }
                (Raw::List { mut items, .. }, &PathStep::Item(index)) if index < items.len() => {
                    let (place, item) = items.swap_remove(index);
                    at = item;
                    key.push_str(&format!("[{place}]"));
                }
                _ => return None,
            }
        }
        Some(Located { key, value: at.shown(), variable: at.variable().or(variable) })
    }

    fn variable(&self) -> Option<String> {
        match self {
            Raw::Text { variable, .. } => Some(variable.clone()),
            Raw::List { variable, .. } | Raw::Table { variable, .. } => variable.clone(),
            Raw::Scalar(_) => None,
        }
    }

    /// The value on one line.
    fn shown(&self) -> Option<String> {
        let shown = match self {
            Raw::Text { text, .. } | Raw::Scalar(Value::String(text)) => format!("{text:?}"),
            Raw::Scalar(value) => value.to_string(),
            Raw::List { items, .. } => {
                let items: Option<Vec<String>> = items.iter().map(|(_, item)| item.shown()).collect();
                format!("[{}]", items?.join(", "))
            }
            Raw::Table { .. } => return None,
        };
        match shown.char_indices().nth(SHOWN_CHARS) {
            Some((end, _)) => Some(format!("{}…", &shown[..end])),
            None => Some(shown),
        }
    }
}

impl From<Value> for Raw {
    fn from(value: Value) -> Self {
        match value {
            Value::Array(values) => {
                Raw::List { variable: None, items: values.into_iter().map(Raw::from).enumerate().collect() }
            }
            Value::Table(entries) => {
                let entries = entries.into_iter().map(|(key, value)| (key, Raw::from(value))).collect();
                Raw::Table { variable: None, entries }
            }
            scalar => Raw::Scalar(scalar),
        }
    }
}
