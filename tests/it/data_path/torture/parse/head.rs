//! Heads in clearcoat's form: one blank after the colon, none around the value, one framing.

use super::{canonical, shown};
use crate::data_path::torture::message::Framing;

/// A head in canonical form.
#[derive(Debug)]
pub struct Head {
    pub first_line: String,
    pub fields: Vec<(String, Vec<u8>)>,
}

impl Head {
    /// Parses the bytes before the blank line.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut lines = Vec::new();
        let mut rest = bytes;
        while let Some(at) = memchr::memmem::find(rest, b"\r\n") {
            lines.push(&rest[..at]);
            rest = &rest[at + 2..];
        }
        lines.push(rest);
        let first_line = lines.remove(0);
        if first_line.is_empty() || !first_line.iter().all(|byte| matches!(byte, b' '..=b'~' | b'\t')) {
            return Err("the first line is malformed".into());
        }
        let first_line = first_line.iter().copied().map(char::from).collect();
        let fields = lines.into_iter().map(field).collect::<Result<_, _>>()?;
        Ok(Head { first_line, fields })
    }

    /// The values of all fields with this name.
    pub fn values<'h>(&'h self, name: &'h str) -> impl Iterator<Item = &'h [u8]> {
        self.fields.iter().filter(move |(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_slice())
    }

    /// The single value of this field, if present.
    pub fn only<'h>(&'h self, name: &'h str) -> Result<Option<&'h [u8]>, String> {
        let mut values = self.values(name);
        let value = values.next();
        if values.next().is_some() { Err(format!("more than one {name}")) } else { Ok(value) }
    }

    /// The framing of the body according to the head; `None` if the head has none.
    pub fn framing(&self) -> Result<Option<Framing>, String> {
        match (self.only("content-length")?, self.only("transfer-encoding")?) {
            (None, None) => Ok(None),
            (Some(length), None) => canonical(length, 10).map(|length| Some(Framing::Length(length))),
            (None, Some(b"chunked")) => Ok(Some(Framing::Chunked)),
            (None, Some(other)) => Err(format!("Transfer-Encoding: {}", other.escape_ascii())),
            (Some(_), Some(_)) => Err("both Content-Length and Transfer-Encoding".into()),
        }
    }
}

fn field(line: &[u8]) -> Result<(String, Vec<u8>), String> {
    let bad = |what: &str| Err(format!("{what} in the line {}", shown(line)));
    let Some(colon) = line.iter().position(|&byte| byte == b':') else { return bad("no colon") };
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    if name.is_empty() || !name.iter().all(is_token) {
        return bad("a bad name");
    }
    let Some(value) = value.strip_prefix(b" ") else { return bad("no blank behind the colon") };
    if value.iter().any(|&byte| byte == 0x7f || (byte < b' ' && byte != b'\t')) {
        return bad("a control byte");
    }
    let is_blank = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    if is_blank(value.first()) || is_blank(value.last()) {
        return bad("a blank around the value");
    }
    Ok((name.iter().copied().map(char::from).collect(), value.to_vec()))
}
