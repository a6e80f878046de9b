//! Every key of the configuration, as a page tells of it: `docs/settings.md` and clearcoat.toml(5) are made of this.
//!
//! What a key is, may be, and is by default comes from `docs/clearcoat.schema.json`, which is itself made from the reader and from the
//! comments in `docs/clearcoat.toml` (`config/tests/schema.rs`). When to change it is said once, in `docs/when-to-change.toml`.

use std::collections::BTreeMap;

use serde_json::Value;

const SCHEMA: &str = include_str!("../../docs/clearcoat.schema.json");
const WHEN_TO_CHANGE: &str = include_str!("../../docs/when-to-change.toml");

/// A table of the configuration, with the keys that stand in it.
#[derive(Debug)]
pub struct Section {
    /// Such as `health.web`.
    pub name: String,
    /// Whether there may be several: `[[node]]`.
    pub is_list: bool,
    /// What it is about, without a full stop; or empty.
    pub about: String,
    /// Its own keys, by name; those of tables in it are in sections of their own.
    pub settings: Vec<Setting>,
}

/// A key.
#[derive(Debug)]
pub struct Setting {
    /// With its section: `edge.listen`.
    pub key: String,
    /// What stands for it if it is not there, as TOML; or `none`, or `required`.
    pub default: String,
    /// What it may be: words, a range with its unit, a form.
    pub allowed: String,
    /// What it is, without a full stop; empty where the name says it.
    pub meaning: String,
    /// When another value than the default is wanted, in sentences; empty where the default says all.
    pub when: String,
}

impl Section {
    /// As it stands in the file: `[edge]`, `[[node]]`.
    pub fn heading(&self) -> String {
        if self.is_list { format!("[[{}]]", self.name) } else { format!("[{}]", self.name) }
    }
}

/// Every section, by name.
///
/// # Panics
/// If the files that it is made of are broken, which the tests would have shown.
pub fn sections() -> Vec<Section> {
    let schema: Value = serde_json::from_str(SCHEMA).expect("the schema is JSON");
    let when: BTreeMap<String, String> = toml::from_str(WHEN_TO_CHANGE).expect("the advice is TOML");
    let mut sections = Vec::new();
    collect("", &schema, &when, &mut sections);
    sections
}

/// The section that this schema of a table describes, and those within it.
fn collect(name: &str, table: &Value, when: &BTreeMap<String, String>, sections: &mut Vec<Section>) {
    let items = &table["items"];
    let (is_list, fields) = if items.is_object() { (true, items) } else { (false, table) };
    let about = text(&table["description"]).to_owned();
    let mut section = Section { name: name.to_owned(), is_list, about, settings: Vec::new() };
    let mut below = Vec::new();
    for (key, schema) in fields["properties"].as_object().into_iter().flatten() {
        let place = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
        if schema["properties"].is_object() || schema["items"]["properties"].is_object() {
            collect(&place, schema, when, &mut below);
        } else {
            let is_required =
                fields["required"].as_array().is_some_and(|required| required.contains(&key.as_str().into()));
            let when = when.get(&place).cloned().unwrap_or_default();
            section.settings.push(setting(place, schema, is_required, when));
        }
    }
    if !section.settings.is_empty() {
        sections.push(section);
    }
    sections.append(&mut below);
}

fn setting(key: String, schema: &Value, is_required: bool, when: String) -> Setting {
    let allowed = text(&schema["$comment"]).to_owned();
    let default = match &schema["default"] {
        _ if is_required => "required".to_owned(),
        Value::Null => "none".to_owned(),
        // Of JSON and TOML, texts, numbers and lists of them are written alike.
        default => default.to_string().replace(",\"", ", \""),
    };
    // An editor shows the description alone, so that it ends in what is allowed.
    let meaning = text(&schema["description"]);
    let meaning = meaning.strip_suffix(&allowed).unwrap_or(meaning).trim_end_matches([' ', '.']);
    // Where a comment lists the words alone, they are what is allowed.
    let meaning = if meaning.replace(" | ", ", ") == allowed { String::new() } else { meaning.to_owned() };
    Setting { key, default, allowed, meaning, when }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_piece_of_advice_is_about_a_key_that_there_is() {
        let advice: BTreeMap<String, String> = toml::from_str(WHEN_TO_CHANGE).unwrap();
        let keys: BTreeSet<String> =
            sections().into_iter().flat_map(|section| section.settings).map(|setting| setting.key).collect();
        for (key, when) in advice {
            assert!(keys.contains(&key), "{key}");
            assert!(when.ends_with('.'), "{key}: {when}");
        }
    }

    #[test]
    fn a_key_is_told_with_its_default_and_range_and_without_saying_them_twice() {
        let sections = sections();
        let timeout =
            sections.iter().flat_map(|section| &section.settings).find(|setting| setting.key == "purge.ack_timeout");
        let timeout = timeout.unwrap();
        assert_eq!(timeout.default, "\"1s\"");
        assert_eq!(timeout.allowed, "a duration such as 500ms, 1s or 5m, above 0s and at most 60s");
        assert!(timeout.meaning.starts_with("a Varnish that needs longer is fenced"), "{}", timeout.meaning);
        assert!(!timeout.meaning.contains("such as 500ms"), "{}", timeout.meaning);
        let nodes = sections.iter().find(|section| section.name == "node").unwrap();
        assert_eq!(nodes.heading(), "[[node]]");
        assert!(nodes.settings.iter().any(|setting| setting.key == "node.id" && setting.default == "required"));
    }
}
