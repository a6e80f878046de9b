//! Query parameters whose values are secret.
//!
//! A name is compared as an application would read it: percent-encoding is undone, case does not matter, and in PHP's
//! `login[password]` each part is a name. So no spelling of a secret's name gets its value into a file that many people
//! read.

/// What stands in place of a value.
const INSTEAD: &[u8] = b"***";

/// Names of query parameters whose values are replaced.
#[derive(Clone, Debug, Default)]
pub struct Redaction {
    /// In lower case.
    names: Vec<SecretName>,
}

#[derive(Clone, Debug)]
struct SecretName {
    text: Box<[u8]>,
    /// Whether it is the start of names, and not one name.
    is_prefix: bool,
}

impl SecretName {
    fn is(&self, name: &[u8]) -> bool {
        let Some((start, rest)) = name.split_at_checked(self.text.len()) else { return false };
        start.eq_ignore_ascii_case(&self.text) && (rest.is_empty() || self.is_prefix)
    }
}

impl Redaction {
    /// From names; a `*` at the end is a wildcard.
    pub fn new<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let secret = |name: &str| {
            let prefix = name.strip_suffix('*');
            SecretName { text: prefix.unwrap_or(name).as_bytes().into(), is_prefix: prefix.is_some() }
        };
        Redaction { names: names.into_iter().map(secret).collect() }
    }

    /// Appends a request target, with what is secret replaced.
    pub(super) fn push_target(&self, out: &mut Vec<u8>, target: &[u8]) {
        let Some(mark) = memchr::memchr(b'?', target) else { return out.extend_from_slice(target) };
        out.extend_from_slice(&target[..mark]);
        let mut separator = b'?';
        for parameter in target[mark + 1..].split(|&byte| byte == b'&') {
            out.push(separator);
            separator = b'&';
            match memchr::memchr(b'=', parameter) {
                Some(equals) if self.has(&parameter[..equals]) => {
                    out.extend_from_slice(&parameter[..=equals]);
                    out.extend_from_slice(INSTEAD);
                }
                _ => out.extend_from_slice(parameter),
            }
        }
    }

    fn has(&self, name: &[u8]) -> bool {
        let has = |name: &[u8]| {
            let mut parts = name.split(|byte| matches!(byte, b'[' | b']'));
            parts.any(|part| !part.is_empty() && self.names.iter().any(|secret| secret.is(part)))
        };
        if memchr::memchr2(b'%', b'+', name).is_none() { has(name) } else { has(decoded(name).trim_ascii()) }
    }
}

/// Undoes percent-encoding, and `+` for a space.
fn decoded(text: &[u8]) -> Vec<u8> {
    let digit = |byte: Option<&u8>| byte.and_then(|&byte| char::from(byte).to_digit(16));
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let (byte, length) = match (text[at], digit(text.get(at + 1)), digit(text.get(at + 2))) {
            (b'%', Some(high), Some(low)) => ((high * 16 + low) as u8, 3),
            (b'+', ..) => (b' ', 1),
            (byte, ..) => (byte, 1),
        };
        out.push(byte);
        at += length;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(target: &str) -> String {
        let mut out = Vec::new();
        Redaction::new(["token", "password", "oauth_*"]).push_target(&mut out, target.as_bytes());
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn values_of_secrets_are_replaced_however_their_names_are_spelled() {
        for (target, expected) in [
            ("/p?a=1&token=abc&b=2", "/p?a=1&token=***&b=2"),
            ("/p?TOKEN=abc=d", "/p?TOKEN=***"),
            ("/p?%74oken=abc", "/p?%74oken=***"),
            ("/p?%54%6Fken=abc", "/p?%54%6Fken=***"),
            ("/p?+token=abc", "/p?+token=***"),
            ("/p?login[password]=abc", "/p?login[password]=***"),
            ("/p?login%5Bpassword%5D=abc", "/p?login%5Bpassword%5D=***"),
            ("/p?token[]=abc", "/p?token[]=***"),
            ("/p?oauth_nonce=abc&oauth=1", "/p?oauth_nonce=***&oauth=1"),
            ("/p?token=", "/p?token=***"),
        ] {
            assert_eq!(shown(target), expected);
        }
    }

    #[test]
    fn everything_else_stays_as_it_came() {
        for target in
            ["/p", "*", "/p?", "/p?&&", "/p?tokens=1", "/token=1", "/p?a=token", "/p?token", "/p?%zz=1&%", "/p?=1"]
        {
            assert_eq!(shown(target), target);
        }
    }
}
