//! A secret that no log line and no dump of the configuration can show.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use subtle::ConstantTimeEq;

/// Longer tokens are refused: the file is likely not a token.
const MAX_BYTES: u64 = 4096;

/// A bearer token. Has no `Display` and no `Serialize`, and its `Debug` shows nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(Box<str>);

/// Why a file holds no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It cannot be read.
    #[error("cannot read the token: {0}")]
    Unreadable(io::Error),
    /// Nothing in it.
    #[error("the file is empty; it must hold a token")]
    Empty,
    /// Its content cannot stand in an `Authorization` header.
    #[error("the file must hold one token: at most 4096 printable ASCII characters without blanks")]
    NotAToken,
}

impl Token {
    /// Reads a token from a file; white space around it (the newline that editors add) does not count.
    ///
    /// # Errors
    /// [`TokenError`] never repeats what is in the file.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes));
        read.map_err(TokenError::Unreadable)?;
        let too_long = bytes.len() as u64 > MAX_BYTES;
        let token = bytes.trim_ascii();
        if token.is_empty() {
            return Err(TokenError::Empty);
        }
        match std::str::from_utf8(token) {
            Ok(text) if !too_long && token.iter().all(u8::is_ascii_graphic) => Ok(Token(text.into())),
            _ => Err(TokenError::NotAToken),
        }
    }

    /// Whether the presented token is this one. Takes the same time wherever the first wrong byte is; only a wrong
    /// length shows.
    pub fn matches(&self, presented: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(presented).into()
    }

    /// The token itself, for the header that presents it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read(content: &[u8]) -> Result<Token, TokenError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        Token::read(file.path())
    }

    #[test]
    fn only_the_whole_token_matches() {
        let token = read(b"s3cret\n").unwrap();
        assert!(token.matches(b"s3cret"));
        for wrong in ["", "s3cre", "s3cret1", "S3cret", "s3cret\n"] {
            assert!(!token.matches(wrong.as_bytes()), "{wrong}");
        }
    }

    #[test]
    fn a_token_is_never_shown() {
        assert_eq!(format!("{:?}", read(b"s3cret").unwrap()), "Token(…)");
    }

    #[test]
    fn what_is_no_token_is_refused() {
        assert!(matches!(read(b" \n"), Err(TokenError::Empty)));
        for bad in [&b"two words"[..], "tökén".as_bytes(), &[0xff], &[b'x'; 4097]] {
            assert!(matches!(read(bad), Err(TokenError::NotAToken)));
        }
        assert!(matches!(Token::read(Path::new("/nonexistent/token")), Err(TokenError::Unreadable(_))));
    }
}
