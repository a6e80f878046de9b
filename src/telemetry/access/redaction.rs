//! Query parameters whose values are secret.
//!
//! A name is compared as an application would read it: percent-encoding is undone, case does not matter, and what PHP makes
//! of a name (`php_register_variable_ex` of its source) is undone as well. PHP drops blanks before a name, ends it at a NUL,
//! reads `.`, a blank and a `[` that nothing closes as `_`, and takes `login[password]` for a name within a name: each part is
//! compared, and so is the whole. So no spelling of a secret's name gets its value into a file that many people read. Where
//! PHP is stricter than this, a value is replaced that was none of a secret's: that harms nobody.

/// What stands in place of a value.
const INSTEAD: &[u8] = b"***";

/// Names of query parameters whose values are replaced.
#[derive(Clone, Debug, Default)]
pub struct Redaction {
    names: Vec<SecretName>,
    /// The first bytes of names, in either case, as bits: most parameters have none of these, and cost no comparison.
    first_bytes: [u64; 4],
}

#[derive(Clone, Debug)]
struct SecretName {
    /// As PHP writes it: [`as_php`].
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
            SecretName { text: as_php(prefix.unwrap_or(name).as_bytes()).into(), is_prefix: prefix.is_some() }
        };
        let names: Vec<SecretName> = names.into_iter().map(secret).collect();
        let mut first_bytes = [0; 4];
        for secret in &names {
            match secret.text.first() {
                Some(byte) => [byte.to_ascii_lowercase(), byte.to_ascii_uppercase()]
                    .iter()
                    .for_each(|byte| first_bytes[usize::from(byte >> 6)] |= 1 << (byte & 63)),
                // `*`: every name.
                None => first_bytes = [u64::MAX; 4],
            }
        }
        Redaction { names, first_bytes }
    }

    /// Whether a name may be that of a secret, by its first byte. What PHP drops or decodes there says nothing, nor what it takes for a
    /// name within a name.
    fn may_have(&self, name: &[u8]) -> bool {
        match name.first() {
            Some(byte) if byte.is_ascii_alphanumeric() => {
                self.first_bytes[usize::from(byte >> 6)] & 1 << (byte & 63) != 0
                    || memchr::memchr2(b'[', b'%', name).is_some()
            }
            _ => true,
        }
    }

    /// Appends a request target, with what is secret replaced.
    pub(super) fn push_target(&self, out: &mut Vec<u8>, target: &[u8]) {
        let Some(mark) = memchr::memchr(b'?', target) else { return out.extend_from_slice(target) };
        out.extend_from_slice(&target[..mark]);
        // What was copied so far; a query without secrets is copied at once.
        let (mut copied, mut at) = (mark, mark + 1);
        loop {
            let end = memchr::memchr(b'&', &target[at..]).map_or(target.len(), |length| at + length);
            let parameter = &target[at..end];
            if let Some(equals) = memchr::memchr(b'=', parameter)
                && self.may_have(&parameter[..equals])
                && self.has(&parameter[..equals])
            {
                out.extend_from_slice(&target[copied..=at + equals]);
                out.extend_from_slice(INSTEAD);
                copied = end;
            }
            if end == target.len() {
                break;
            }
            at = end + 1;
        }
        out.extend_from_slice(&target[copied..]);
    }

    fn has(&self, name: &[u8]) -> bool {
        let is_secret = |name: &[u8]| self.names.iter().any(|secret| secret.is(name));
        if name.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-')) {
            return is_secret(name);
        }
        let name = decoded(name);
        let whole = name.split(|&byte| byte == 0).next().unwrap_or_default();
        let mut parts = name.split(|byte| matches!(byte, b'[' | b']' | 0)).filter(|part| !part.is_empty());
        is_secret(&as_php(whole)) || parts.any(|part| is_secret(&as_php(part)))
    }
}

/// A name without the blanks around it, and with `_` where PHP has that.
fn as_php(name: &[u8]) -> Vec<u8> {
    name.trim_ascii().iter().map(|&byte| if matches!(byte, b'.' | b' ' | b'[') { b'_' } else { byte }).collect()
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
        Redaction::new(["token", "password", "oauth_*", "form_key", "api.key"])
            .push_target(&mut out, target.as_bytes());
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

    /// As PHP 8.2 reads them: `php -r 'parse_str($argv[1], $read); print_r($read);' NAME=1`.
    #[test]
    fn a_name_that_php_reads_as_a_secret_is_one() {
        for name in [
            "form.key",
            "form key",
            "form+key",
            "form%20key",
            "form%2Ekey",
            "form[key",
            "form%5Bkey",
            "FORM%5fKEY",
            "+form.key",
            "%20%20form_key",
            "form_key%00",
            "form_key%00[x]",
            "form.key%00x",
            "form_key[a][b]",
            "form.key[]",
            "a[form_key]",
            "a[b][form_key]",
            "a.b[form_key]",
            "a[%20form_key]",
            "a][form_key]",
            "oauth.nonce",
            "oauth[nonce",
            "oauth%5Bnonce",
            "api_key",
            "api.key",
            "api[key",
        ] {
            assert_eq!(shown(&format!("/p?x=1&{name}=secret&y=2")), format!("/p?x=1&{name}=***&y=2"));
        }
    }

    #[test]
    fn everything_else_stays_as_it_came() {
        for target in
            ["/p", "*", "/p?", "/p?&&", "/p?tokens=1", "/token=1", "/p?a=token", "/p?token", "/p?%zz=1&%", "/p?=1"]
                .into_iter()
                .chain(["/p?form=key", "/p?formkey=1", "/p?form-key=1", "/p?a[form][key]=1", "/p?x=form.key"])
        {
            assert_eq!(shown(target), target);
        }
    }
}
