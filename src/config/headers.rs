//! `purge.headers` and `node.headers`: fields by which a VCL knows who may purge; `traces.headers`: by which a collector knows
//! whose spans these are.
//!
//! A value is text, or `{ file = "…" }`: the file is read again for each batch and each health check, so that a key can be
//! changed in both places without a restart.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

use crate::fleet::{FieldValue, SecretHeaders};

/// The longest value, in bytes: Varnish takes 8 KiB with the name, and other fields stand beside it.
const LONGEST: u64 = 4096;

/// Fields that say where a request goes and how it is framed.
const FRAMING: [&str; 10] = [
    "connection",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "via",
];

/// What the fields are sent with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carrier {
    /// Purges and health checks to a Varnish.
    Purges,
    /// Spans to a collector.
    Spans,
}

impl Carrier {
    /// Why a field of this name cannot be sent with it; `None` if it can.
    fn objection(self, name: &str) -> Option<&'static str> {
        let lower = name.to_ascii_lowercase();
        let is_name = http::HeaderName::try_from(name).is_ok();
        let is_framing = FRAMING.contains(&&*lower) || lower.starts_with("proxy-");
        match self {
            Carrier::Purges => {
                let is_purged_by = lower.starts_with("xkey")
                    || lower.starts_with("x-clearcoat-")
                    || ["authorization", "x-magento-purge-soft", "x-magento-tags-pattern", "x-pool"].contains(&&*lower);
                let wanted = "wanted a header name of letters, digits and !#$%&'*+-.^_`|~ such as X-Purge-Key, and none \
                              that says what is purged, where it goes or how it is framed";
                (!is_name || is_framing || is_purged_by).then_some(wanted)
            }
            Carrier::Spans => {
                let is_content = lower.starts_with("content-");
                let wanted = "wanted a header name of letters, digits and !#$%&'*+-.^_`|~ such as Authorization, and none \
                              that says what is sent, where it goes or how it is framed";
                (!is_name || is_framing || is_content).then_some(wanted)
            }
        }
    }
}

/// Why a field cannot be sent. Never repeats its value.
#[derive(Clone, Debug, thiserror::Error)]
#[error("header {name}: {reason}")]
pub struct HeaderError {
    /// The field.
    pub name: String,
    /// What is wrong and what is allowed.
    pub reason: String,
    /// The number of the system's error if a file could not be read.
    pub os_error: Option<i32>,
}

/// Why a value cannot be had.
struct ValueFault {
    reason: String,
    os_error: Option<i32>,
}

impl From<String> for ValueFault {
    fn from(reason: String) -> Self {
        ValueFault { reason, os_error: None }
    }
}

/// The fields with their values, read now from the files that have them.
///
/// # Errors
/// A file that cannot be read, or that holds no value.
pub async fn reveal(headers: &SecretHeaders) -> Result<Vec<(String, String)>, HeaderError> {
    let has_files = headers.iter().any(|(_, value)| matches!(value, FieldValue::File(_)));
    if !has_files {
        return read(headers);
    }
    let headers = headers.clone();
    match tokio::task::spawn_blocking(move || read(&headers)).await {
        Ok(read) => read,
        Err(_) => {
            Err(HeaderError { name: "of a request".to_owned(), reason: "the runtime ends".to_owned(), os_error: None })
        }
    }
}

fn read(headers: &SecretHeaders) -> Result<Vec<(String, String)>, HeaderError> {
    let revealed = headers.iter().map(|(name, value)| match value_of(value) {
        Ok(value) => Ok((name.to_owned(), value)),
        Err(ValueFault { reason, os_error }) => Err(HeaderError { name: name.to_owned(), reason, os_error }),
    });
    revealed.collect()
}

/// What is wrong with fields that are sent so, by name.
pub(super) fn faults(headers: &SecretHeaders, carrier: Carrier) -> Vec<(String, String)> {
    let fault = |(name, value)| {
        let reason =
            carrier.objection(name).map(str::to_owned).or_else(|| value_of(value).err().map(|fault| fault.reason));
        reason.map(|reason| (name.to_owned(), reason))
    };
    headers.iter().filter_map(fault).collect()
}

fn value_of(value: &FieldValue) -> Result<String, ValueFault> {
    match value {
        FieldValue::Text(text) => Ok(checked(text, "the value")?),
        FieldValue::File(path) => from_file(path),
    }
}

/// White space around it (the newline that editors add) does not count.
fn from_file(path: &Path) -> Result<String, ValueFault> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(LONGEST + 1).read_to_string(&mut text));
    read.map_err(|error| ValueFault {
        reason: format!("cannot read {}: {error}", path.display()),
        os_error: error.raw_os_error(),
    })?;
    Ok(checked(text.trim_ascii(), &path.display().to_string())?)
}

fn checked(value: &str, what: &str) -> Result<String, String> {
    let is_text = value.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
    let is_value = is_text && !value.is_empty() && value.len() as u64 <= LONGEST && value.trim_ascii() == value;
    is_value.then(|| value.to_owned()).ok_or_else(|| {
        format!("{what} must be one line of 1 to {LONGEST} printable ASCII characters, without blanks around it")
    })
}

struct HeadersVisitor;

impl<'de> Visitor<'de> for HeadersVisitor {
    type Value = SecretHeaders;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of header names such as { X-Purge-Key = { file = \"/run/secrets/purge-key\" } }")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<SecretHeaders, A::Error> {
        let mut fields = Vec::new();
        while let Some((name, HeaderText(value))) = map.next_entry()? {
            fields.push((name, value));
        }
        Ok(fields.into_iter().collect())
    }
}

/// Reads the table.
pub(super) fn table<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SecretHeaders, D::Error> {
    deserializer.deserialize_map(HeadersVisitor)
}

/// One value of it.
struct HeaderText(FieldValue);

impl<'de> Deserialize<'de> for HeaderText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderTextVisitor;
        impl<'de> Visitor<'de> for HeaderTextVisitor {
            type Value = HeaderText;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, or { file = \"/run/secrets/purge-key\" }")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<HeaderText, E> {
                Ok(HeaderText(FieldValue::Text(text.into())))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<HeaderText, A::Error> {
                let file = match map.next_entry::<String, PathBuf>()? {
                    Some((key, file)) if key == "file" => file,
                    _ => return Err(A::Error::custom("wanted a string, or a table with the one key file")),
                };
                match map.next_key::<String>()? {
                    None => Ok(HeaderText(FieldValue::File(file))),
                    Some(_) => Err(A::Error::custom("wanted a string, or a table with the one key file")),
                }
            }
        }
        deserializer.deserialize_any(HeaderTextVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_one_line_and_a_name_is_free() {
        for good in ["s3cret", "Bearer a b", "~!"] {
            assert!(checked(good, "it").is_ok(), "{good}");
        }
        for bad in ["", " a", "a ", "a\r\nX: y", "schlüssel", &"x".repeat(4097)] {
            let reason = checked(bad, "it").unwrap_err();
            assert!(bad.len() < 3 || !reason.contains(bad), "{reason}");
        }
        let is_free = |carrier: Carrier, name: &str| carrier.objection(name).is_none();
        for free in ["X-Purge-Key", "X_Key"] {
            assert!(is_free(Carrier::Purges, free) && is_free(Carrier::Spans, free), "{free}");
        }
        for taken in ["", "a b", "Host", "Transfer-Encoding", "Proxy-Authorization", "a:"] {
            assert!(!is_free(Carrier::Purges, taken) && !is_free(Carrier::Spans, taken), "{taken}");
        }
        for of_purges in ["X-POOL", "xkey-purge", "X-Clearcoat-Flush", "Authorization"] {
            assert!(!is_free(Carrier::Purges, of_purges) && is_free(Carrier::Spans, of_purges), "{of_purges}");
        }
        assert!(!is_free(Carrier::Spans, "Content-Type"));
    }

    #[tokio::test]
    async fn a_file_is_read_each_time_and_its_content_never_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let headers: SecretHeaders =
            [("X-Key".to_owned(), FieldValue::File(file.path().to_owned()))].into_iter().collect();
        for key in ["one\n", "two"] {
            std::fs::write(file.path(), key).unwrap();
            assert_eq!(reveal(&headers).await.unwrap(), [("X-Key".to_owned(), key.trim().to_owned())]);
        }
        for bad in ["", "two\nlines"] {
            std::fs::write(file.path(), bad).unwrap();
            let error = reveal(&headers).await.unwrap_err().to_string();
            assert!(error.contains("X-Key") && error.contains(file.path().to_str().unwrap()), "{error}");
            assert!(!error.contains("lines"), "{error}");
        }
    }
}
