//! A span that has ended, ready to be exported.

use std::borrow::Cow;
use std::time::SystemTime;

use super::OpenSpan;
use crate::purge::{Purge, Target};

/// A span that has ended. Names and keys are those of OpenTelemetry's semantic conventions for HTTP, and `clearcoat.*`.
#[derive(Clone, Debug)]
pub struct FinishedSpan {
    /// Its ids.
    pub ids: OpenSpan,
    /// What it is, of a bounded number of words.
    pub name: &'static str,
    /// On which side of a request it is.
    pub kind: SpanKind,
    /// When it began.
    pub began: SystemTime,
    /// When it ended.
    pub ended: SystemTime,
    /// Whether it failed.
    pub is_error: bool,
    /// What else there is to say: a key, and its value.
    pub attributes: Vec<(&'static str, Attribute)>,
}

/// On which side of a request a span is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// Who is asked.
    Server,
    /// Who asks.
    Client,
}

/// The value of an attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attribute {
    /// Words.
    Text(Cow<'static, str>),
    /// A number.
    Number(i64),
    /// Yes or no.
    Flag(bool),
}

impl From<&'static str> for Attribute {
    fn from(text: &'static str) -> Self {
        Attribute::Text(text.into())
    }
}

impl From<String> for Attribute {
    fn from(text: String) -> Self {
        Attribute::Text(text.into())
    }
}

impl From<bool> for Attribute {
    fn from(flag: bool) -> Self {
        Attribute::Flag(flag)
    }
}

impl From<u16> for Attribute {
    fn from(number: u16) -> Self {
        Attribute::Number(number.into())
    }
}

impl From<u64> for Attribute {
    fn from(number: u64) -> Self {
        Attribute::Number(number.cast_signed())
    }
}

impl From<usize> for Attribute {
    fn from(number: usize) -> Self {
        Attribute::from(number as u64)
    }
}

/// What a span says of a purge. What its tags are is not said: they are many, and in the journal.
pub fn purge_attributes(purge: &Purge) -> [(&'static str, Attribute); 3] {
    let tags = |target: &Target| if let Target::Tags(tags) = target { tags.iter().count() } else { 0 };
    [
        ("clearcoat.purge.kind", purge.kind().into()),
        ("clearcoat.purge.targets", purge.targets.len().into()),
        ("clearcoat.purge.tags", purge.targets.iter().map(tags).sum::<usize>().into()),
    ]
}

#[cfg(test)]
impl FinishedSpan {
    /// Some span.
    pub(crate) fn test(ids: OpenSpan) -> Self {
        let (began, ended) = (SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH);
        FinishedSpan { ids, name: "GET", kind: SpanKind::Server, began, ended, is_error: false, attributes: Vec::new() }
    }
}
