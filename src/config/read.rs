//! The tree becomes typed values: a serde data format of our own.
//!
//! The TOML crate could do that too, but its errors are finished sentences ("unknown variant `fastest`, expected one
//! of …"). Here they keep their parts, so that each can say what is allowed in the words of the configuration, and
//! text from the environment is parsed as what the key asks for.

use std::fmt;

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{self, Deserializer, Expected, IntoDeserializer, Unexpected, Visitor};
use serde_path_to_error::Segment;
use toml::Value;

use super::Config;
use super::raw::{PathStep, Raw};

/// Reads the tree up to the first value that is not what its key wants, which is returned by its path.
pub(super) fn read(raw: &Raw) -> Result<Config, (Vec<PathStep>, Reason)> {
    serde_path_to_error::deserialize(RawReader(raw.clone())).map_err(|error| {
        let path = error.path().iter().filter_map(step).collect();
        (path, error.into_inner())
    })
}

/// A segment that stands in the tree. The name of an enum's variant is a value, not a step.
fn step(segment: &Segment) -> Option<PathStep> {
    match segment {
        Segment::Seq { index } => Some(PathStep::Item(*index)),
        Segment::Map { key } => Some(PathStep::Key(key.clone())),
        Segment::Enum { .. } | Segment::Unknown => None,
    }
}

/// Why a value was not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// No such key in this table.
    UnknownKey(&'static [&'static str]),
    /// Not one of the values that the key can have.
    UnknownValue(&'static [&'static str]),
    /// The table lacks a key that has no default.
    Missing(&'static str),
    /// Whatever else, in words.
    Other(String),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::UnknownKey(allowed) => write!(f, "unknown key; {}", choices(None, allowed)),
            Reason::UnknownValue(allowed) => write!(f, "unknown value; {}", choices(None, allowed)),
            Reason::Missing(_) => f.write_str("wanted, but missing"),
            Reason::Other(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for Reason {}

impl Reason {
    /// The reason, with what may have been meant by the key or the value that it is about.
    pub(super) fn suggesting(&self, meant: Option<&str>) -> String {
        match self {
            Reason::UnknownKey(allowed) => format!("unknown key; {}", choices(meant, allowed)),
            Reason::UnknownValue(allowed) => format!("unknown value; {}", choices(meant, allowed)),
            other => other.to_string(),
        }
    }
}

fn choices(meant: Option<&str>, allowed: &[&str]) -> String {
    let meant = meant.map(|meant| format!("did you mean {meant}? ")).unwrap_or_default();
    format!("{meant}allowed: {}", allowed.join(", "))
}

impl de::Error for Reason {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Reason::Other(text.to_string())
    }

    fn invalid_type(_: Unexpected<'_>, wanted: &dyn Expected) -> Self {
        Reason::Other(format!("wanted {wanted}"))
    }

    fn unknown_variant(_: &str, allowed: &'static [&'static str]) -> Self {
        Reason::UnknownValue(allowed)
    }

    fn unknown_field(_: &str, allowed: &'static [&'static str]) -> Self {
        Reason::UnknownKey(allowed)
    }

    fn missing_field(field: &'static str) -> Self {
        Reason::Missing(field)
    }
}

struct RawReader(Raw);

impl RawReader {
    fn string(self) -> Result<String, Reason> {
        match self.0 {
            Raw::Text { text, .. } | Raw::Scalar(Value::String(text)) => Ok(text),
            _ => Err(wanted("a string")),
        }
    }

    fn whole_number(self, max: u64) -> Result<u64, Reason> {
        let number = match self.0 {
            Raw::Text { text, .. } => text.trim().parse().ok(),
            Raw::Scalar(Value::Integer(number)) => u64::try_from(number).ok(),
            _ => None,
        };
        number
            .filter(|&number| number <= max)
            .ok_or_else(|| Reason::Other(format!("wanted a whole number from 0 to {max}")))
    }

    fn boolean(self) -> Result<bool, Reason> {
        let truth = match self.0 {
            Raw::Text { text, .. } => text.trim().parse().ok(),
            Raw::Scalar(Value::Boolean(truth)) => Some(truth),
            _ => None,
        };
        truth.ok_or_else(|| wanted("true or false"))
    }

    fn number(self) -> Result<f64, Reason> {
        let number = match self.0 {
            Raw::Text { text, .. } => text.trim().parse().ok(),
            Raw::Scalar(Value::Float(number)) => Some(number),
            Raw::Scalar(Value::Integer(number)) => i32::try_from(number).ok().map(f64::from),
            _ => None,
        };
        number.filter(|number| number.is_finite()).ok_or_else(|| wanted("a number"))
    }
}

type Entries = std::collections::BTreeMap<String, Raw>;

fn fields(entries: Entries) -> MapDeserializer<'static, impl Iterator<Item = (String, RawReader)>, Reason> {
    MapDeserializer::new(entries.into_iter().map(|(key, value)| (key, RawReader(value))))
}

fn wanted(what: &str) -> Reason {
    Reason::Other(format!("wanted {what}"))
}

impl<'de> IntoDeserializer<'de, Reason> for RawReader {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for RawReader {
    type Error = Reason;

    /// A string, or a table for a key that takes either.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Reason> {
        match self.0 {
            Raw::Table { entries, .. } => visitor.visit_map(fields(entries)),
            _ => visitor.visit_string(self.string()?),
        }
    }

    /// A table whose keys are not ours. A variable has it as an inline table.
    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Reason> {
        let raw = match self.0 {
            Raw::Text { text, variable } => match format!("it = {text}").parse::<toml::Table>() {
                Ok(mut table) => table.remove("it").map_or(Raw::Text { text, variable }, Raw::from),
                Err(_) => Raw::Text { text, variable },
            },
            raw => raw,
        };
        match raw {
            Raw::Table { entries, .. } => visitor.visit_map(fields(entries)),
            _ => Err(de::Error::invalid_type(Unexpected::Other("no table"), &visitor)),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Reason> {
        visitor.visit_bool(self.boolean()?)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Reason> {
        visitor.visit_u64(self.whole_number(u16::MAX.into())?)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Reason> {
        visitor.visit_u64(self.whole_number(u32::MAX.into())?)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Reason> {
        visitor.visit_u64(self.whole_number(i64::MAX as u64)?)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Reason> {
        visitor.visit_f64(self.number()?)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Reason> {
        visitor.visit_some(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Reason> {
        let items = match self.0 {
            Raw::List { items, .. } => items,
            Raw::Text { variable, text } => Raw::items(&text, &variable),
            _ => return Err(wanted("a list")),
        };
        visitor.visit_seq(SeqDeserializer::new(items.into_iter().map(|(_, item)| RawReader(item))))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Reason> {
        match self.0 {
            Raw::Table { entries, .. } => visitor.visit_map(fields(entries)),
            Raw::Text { .. } => Err(wanted(match name {
                "StaticNode" => "a TOML array of inline tables such as [{role = \"web\", …}]",
                "TlsListener" => "a TOML array of inline tables such as [{listen = [\"0.0.0.0:8443\"], …}]",
                _ => "a table; set each of its keys by a variable of its own",
            })),
            _ => Err(wanted("a table")),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Reason> {
        let variant = self.string().map_err(|_| Reason::UnknownValue(variants))?;
        visitor.visit_enum(IntoDeserializer::<Reason>::into_deserializer(variant))
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i64 u8 i128 u128 f32 char str string bytes byte_buf unit unit_struct newtype_struct tuple
        tuple_struct identifier ignored_any
    }
}
