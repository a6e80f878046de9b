//! Where each key stands in the file, for messages: editors and terminals jump to `FILE:LINE:COLUMN`.
//!
//! The tree that the configuration is read from has no places, as half of it may come from the environment. So the text is
//! looked at a second time, and keys are found by their paths.

use std::collections::BTreeMap;
use std::fmt;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// A line and a column, both counted from 1; a column is a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TextPlace {
    pub(super) line: usize,
    pub(super) column: usize,
}

impl TextPlace {
    /// That of this byte of the text.
    pub(super) fn of(text: &str, start: usize) -> Self {
        let before = text.get(..start).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        TextPlace { line: before.matches('\n').count() + 1, column: before[line_start..].chars().count() + 1 }
    }
}

impl fmt::Display for TextPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// The places of all keys and items of a file, by their paths such as `edge.listen[0]`.
#[derive(Debug, Default)]
pub(super) struct KeyPlaces(BTreeMap<String, TextPlace>);

impl KeyPlaces {
    /// Of a file that can be parsed; otherwise there are none.
    pub(super) fn of(text: &str) -> Self {
        let mut places = KeyPlaces::default();
        if let Ok(document) = DeTable::parse(text) {
            places.note_table(text, document.get_ref(), "");
        }
        places
    }

    /// The place of a key, or of the nearest table or list around it: that is where one that is missing should be.
    pub(super) fn find(&self, key: &str) -> Option<TextPlace> {
        let mut key = key;
        loop {
            if let Some(place) = self.0.get(key) {
                return Some(*place);
            }
            key = &key[..key.rfind(['.', '['])?];
        }
    }

    fn note_table(&mut self, text: &str, table: &DeTable<'_>, path: &str) {
        for (name, value) in table.iter() {
            let dot = if path.is_empty() { "" } else { "." };
            let path = format!("{path}{dot}{}", name.get_ref());
            self.0.insert(path.clone(), TextPlace::of(text, name.span().start));
            self.note_value(text, value, &path);
        }
    }

    fn note_value(&mut self, text: &str, value: &Spanned<DeValue<'_>>, path: &str) {
        match value.get_ref() {
            DeValue::Table(table) => self.note_table(text, table, path),
            DeValue::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    let path = format!("{path}[{index}]");
                    self.0.insert(path.clone(), TextPlace::of(text, item.span().start));
                    self.note_value(text, item, &path);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_however_written_and_a_missing_one_where_it_should_be() {
        let text = "# ü\nlog.level = 'x'\n[edge]\n  listen = ['a',\n    'b']\n[[node]]\nid = 'a'\n[[node]]\nheaders = { \"é\" = 1, X-Key = 2 }\n";
        let places = KeyPlaces::of(text);
        let find = |key: &str| places.find(key).map(|place| place.to_string());
        for (key, place) in [
            ("log.level", "2:5"),
            ("edge.listen", "4:3"),
            ("edge.listen[1]", "5:5"),
            ("node[0].id", "7:1"),
            ("node[1].headers.X-Key", "9:22"),
            ("node[0].address", "6:1"),
            ("edge.policy", "3:2"),
        ] {
            assert_eq!(find(key).as_deref(), Some(place), "{key}");
        }
        assert_eq!((find("purge.allow"), KeyPlaces::of("[").find("edge")), (None, None));
    }
}
