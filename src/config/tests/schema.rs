//! `docs/clearcoat.schema.json`: what an editor (taplo, and what is built on it) completes and marks in a `clearcoat.toml`.
//!
//! It is not derived from the types, as schemars would: for four keys of ten the type is not what is written (durations,
//! networks, headers, 0 or "" for none), so attributes would say once more what the reader wants, and nothing would hold them to
//! it. The reader itself is asked instead: each key is given a date, which no key takes, and the error says what is wanted.
//! Words come from the comments in `docs/clearcoat.toml`, defaults from the configuration of an empty file.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json, json};
use toml::{Table, Value};

use super::*;

/// Every key, with its comment.
const EXAMPLE: &str = include_str!("../../../docs/clearcoat.toml");

/// What no key takes: a date, and a text that is no word of any kind.
const NO_VALUE: &str = "2000-01-01";
const NO_WORD: &str = "\u{7f}";

/// Where something stands: names of keys, and `0` for the first item of a list.
type Place<'a> = &'a [String];

fn example() -> Value {
    Value::Table(EXAMPLE.parse().unwrap())
}

/// What is wrong at this place or below it, as the key and the reason, when it has this value in the example.
fn faults(place: Place, value: Value) -> Vec<(String, String)> {
    let mut file = example();
    *slot(&mut file, place) = value;
    let text = toml::to_string(&file).unwrap();
    let Err(errors) = Config::assemble(Some(("-".to_owned(), &text)), Vec::new(), NamedFiles::Elsewhere) else {
        return Vec::new();
    };
    let faults = errors.iter().filter_map(|error| match error {
        ConfigError::Key { key, reason, .. } => Some((key.clone(), reason.clone())),
        _ => None,
    });
    faults.filter(|(key, _)| key.starts_with(&written(place))).collect()
}

/// What stands at a place, made if nothing does.
fn slot<'f>(file: &'f mut Value, place: Place) -> &'f mut Value {
    place.iter().fold(file, |at, step| match at {
        Value::Array(items) => {
            if items.is_empty() {
                items.push(Value::Boolean(true));
            }
            &mut items[0]
        }
        Value::Table(entries) => entries.entry(step.clone()).or_insert(Value::Boolean(true)),
        _ => panic!("nothing can be below {at}"),
    })
}

fn written(place: Place) -> String {
    place.join(".").replace(".0", "[0]")
}

fn below(place: Place, step: &str) -> Vec<String> {
    place.iter().cloned().chain([step.to_owned()]).collect()
}

/// What may stand at a place, and what there is to know of it: its meaning, its default, and in `$comment` what it may be, in words.
fn schema(place: Place, known: &Known) -> Json {
    let mut schema = kind(place, known);
    let is_item = place.last().is_some_and(|last| last == "0");
    let comment = known.comments.get(&place.join(".").replace(".0", "")).filter(|_| !is_item);
    let allowed = allowed(place, &schema);
    // What a text must look like no other word of the schema tells an editor.
    let form = allowed.clone().filter(|_| schema["type"] == "string" && form(place).is_some());
    let description: Vec<String> = comment.cloned().into_iter().chain(form).collect();
    if !description.is_empty() {
        schema["description"] = description.join(". ").into();
    }
    if let Some(allowed) = allowed {
        schema["$comment"] = allowed.into();
    }
    let default = at(&known.defaults, place).filter(|default| !default.is_table() && !is_item);
    if let Some(default) = default {
        schema["default"] = serde_json::to_value(default).unwrap();
    }
    schema
}

/// What a key may be, in words for people; of a table its keys say that.
fn allowed(place: Place, schema: &Json) -> Option<String> {
    if let Some(words) = schema["enum"].as_array() {
        let words: Vec<&str> = words.iter().filter_map(Json::as_str).collect();
        return Some(words.join(", "));
    }
    let allowed = match schema["type"].as_str()? {
        "boolean" => "true, false".to_owned(),
        "integer" => match bounds(place, &[0.into(), Value::Integer(schema["maximum"].as_i64()?)]) {
            Some(bounds) => bounds,
            None if schema["maximum"].as_i64()? > i64::from(u32::MAX) => "a whole number".to_owned(),
            None => format!("0 to {}", schema["maximum"]),
        },
        "number" => bounds(place, &[Value::Float(-1.0), Value::Float(1e9)]).unwrap_or_else(|| "a number".to_owned()),
        "string" => match form(place) {
            Some(form) if form.starts_with("a duration ") => {
                let bounds = bounds(place, &["0s".into(), "365days".into()]);
                bounds.map_or(form, |bounds| format!("a duration such as 500ms, 1s or 5m, {bounds}"))
            }
            Some(form) => form,
            None => "text".to_owned(),
        },
        "array" => format!("a list; each {}", schema["items"]["$comment"].as_str()?),
        "object" if schema["properties"].is_object() => return None,
        _ => "a table of header names; each a text, or { file = \"…\" }".to_owned(),
    };
    Some(allowed)
}

/// What the reader says of values that are as small and as large as a type lets them be.
fn bounds(place: Place, extremes: &[Value]) -> Option<String> {
    let here = written(place);
    let mut bounds: Vec<String> = Vec::new();
    for value in extremes {
        for (_, reason) in faults(place, value.clone()).iter().filter(|(key, _)| *key == here) {
            let bound = reason.strip_prefix("must be ").unwrap_or_else(|| panic!("{here} = {value}: {reason}"));
            if !bounds.iter().any(|known| known == bound) {
                bounds.push(bound.to_owned());
            }
        }
    }
    (!bounds.is_empty()).then(|| bounds.join(", "))
}

/// What may stand at a place, by what the reader says of a date there.
fn kind(place: Place, known: &Known) -> Json {
    let said = faults(place, Value::Datetime(NO_VALUE.parse().unwrap()));
    let (_, reason) = said.first().unwrap_or_else(|| panic!("{} takes a date", written(place)));
    if let Some((_, words)) = reason.strip_prefix("unknown value; ").and_then(|rest| rest.split_once("allowed: ")) {
        return json!({ "enum": words.split(", ").collect::<Vec<_>>() });
    }
    if let Some(most) = reason.strip_prefix("wanted a whole number from 0 to ") {
        return json!({ "type": "integer", "minimum": 0, "maximum": most.parse::<u64>().unwrap() });
    }
    if reason.starts_with("wanted a table of header names") {
        let file = json!({ "file": { "type": "string" } });
        let file = json!({ "type": "object", "properties": file, "required": ["file"], "additionalProperties": false });
        return json!({ "type": "object", "additionalProperties": { "anyOf": [{ "type": "string" }, file] } });
    }
    match reason.as_str() {
        "wanted a string" => json!({ "type": "string" }),
        "wanted true or false" => json!({ "type": "boolean" }),
        "wanted a number" => json!({ "type": "number" }),
        "wanted a list" => json!({ "type": "array", "items": schema(&below(place, "0"), known) }),
        "wanted a table" => table(place, known),
        other => panic!("{}: {other}", written(place)),
    }
}

/// What a text must look like, if the reader wants a certain one.
fn form(place: Place) -> Option<String> {
    let here = written(place);
    let said = faults(place, NO_WORD.into()).into_iter().find(|(key, _)| *key == here);
    said.and_then(|(_, reason)| reason.strip_prefix("wanted ").map(str::to_owned))
}

/// The keys that a table may have, and must have.
fn table(place: Place, known: &Known) -> Json {
    let unknown = below(place, "?");
    let said = faults(&unknown, true.into());
    let (_, keys) = said[0].1.split_once("allowed: ").unwrap();
    let properties: Map<String, Json> =
        keys.split(", ").map(|key| (key.to_owned(), schema(&below(place, key), known))).collect();
    let is_required = |key: &&String| {
        let mut without = example();
        slot(&mut without, place).as_table_mut().unwrap().remove(*key);
        faults(place, slot(&mut without, place).clone()).iter().any(|(_, reason)| reason == "wanted, but missing")
    };
    let required: Vec<&String> = properties.keys().filter(is_required).collect();
    let mut schema = json!({ "type": "object", "additionalProperties": false });
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema["properties"] = properties.into();
    schema
}

fn at<'v>(value: &'v Value, place: Place) -> Option<&'v Value> {
    place.iter().try_fold(value, |value, step| value.get(step.as_str()))
}

/// What is known of keys without asking the reader.
struct Known {
    comments: BTreeMap<String, String>,
    defaults: Value,
}

/// The comments of the example by what they are about: a key, or a table.
fn comments() -> BTreeMap<String, String> {
    let mut comments: BTreeMap<String, String> = BTreeMap::new();
    let (mut section, mut about) = (String::new(), String::new());
    for line in EXAMPLE.lines() {
        let (said, comment) = line.split_once("  # ").map_or((line, ""), |(said, comment)| (said.trim(), comment));
        let commented_out = line.strip_prefix("# ").unwrap_or(said);
        let (comment, is_more) = match line.trim_start().strip_prefix("# ") {
            Some(more) if line.starts_with(' ') => (more, true),
            _ => (comment, false),
        };
        if let Some(name) = said.strip_prefix('[').filter(|_| !is_more) {
            section = name.trim_matches(['[', ']']).to_owned();
            about.clone_from(&section);
        } else if let Some((key, _)) = commented_out.split_once(" = ").filter(|(key, _)| !is_more && !key.contains(' '))
        {
            about = format!("{section}.{key}");
            if comments.contains_key(&about) {
                // Of two tables in a list, the first has the comments.
                about.clear();
            }
        }
        let so_far = comments.entry(about.clone()).or_default();
        *so_far = format!("{so_far} {comment}").trim().to_owned();
    }
    comments.retain(|about, comment| !about.is_empty() && !comment.is_empty());
    comments
}

/// The configuration that comes of a file, with every key.
fn effective(file: &str) -> Value {
    Value::Table(of_elsewhere(file, &[]).unwrap().to_toml().unwrap().parse::<Table>().unwrap())
}

#[test]
fn the_schema_for_editors_is_what_the_reader_wants() {
    let known = Known { comments: comments(), defaults: effective("") };
    let mut schema = table(&[], &known);
    schema["$schema"] = "http://json-schema.org/draft-07/schema#".into();
    schema["title"] = "The configuration of clearcoat".into();
    let generated = serde_json::to_string_pretty(&schema).unwrap() + "\n";
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/clearcoat.schema.json");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(path, &generated).unwrap();
    }
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(kept == generated, "docs/clearcoat.schema.json is another: UPDATE=1 cargo test --lib schema writes it");
}

#[test]
fn the_documented_example_has_the_defaults_unless_a_comment_names_them() {
    fn walk(place: Place, defaults: &Value, example: &Value, comments: &BTreeMap<String, String>) {
        match at(defaults, place) {
            Some(Value::Table(entries)) => {
                entries.keys().for_each(|key| walk(&below(place, key), defaults, example, comments));
            }
            default => {
                let key = written(place);
                // Of nodes there is no default, as the head of the example says.
                let named = key == "node" || comments.get(&key).is_some_and(|comment| comment.contains("default"));
                assert!(named || at(example, place) == default, "{key}: the default is {default:?}");
            }
        }
    }
    walk(&[], &effective(""), &effective(EXAMPLE), &comments());
}
