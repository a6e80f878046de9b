//! An error as people need it: with everything behind it.
//!
//! `Display` of an error says what could not be done; why not (the path, "No space left on device (os error 28)") is in
//! its sources, which a log line of `%error` leaves out. Some errors print their source themselves, so a chain that is
//! simply joined says one thing twice; what the text so far says already is left out.

use std::error::Error;
use std::fmt::{self, Display, Formatter};

/// An error and its causes, for a log field: `error = %causes(&error)`.
pub fn causes<'e>(error: &'e (dyn Error + 'static)) -> impl Display + 'e {
    Causes(error)
}

struct Causes<'e>(&'e (dyn Error + 'static));

impl Display for Causes<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut text = self.0.to_string();
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let next = error.to_string();
            if !text.contains(&next) {
                text = format!("{text}: {next}");
            }
            cause = error.source();
        }
        f.write_str(&text)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum ChainError {
        #[error("purge refused")]
        Outer(#[source] Box<ChainError>),
        #[error("/j cannot be written: {0}")]
        PrintsItsSource(#[source] io::Error),
        #[error("the file /j")]
        Quiet(#[source] io::Error),
    }

    #[test]
    fn every_cause_is_named_once() {
        let full = || io::Error::from_raw_os_error(28);
        let prints = ChainError::Outer(Box::new(ChainError::PrintsItsSource(full())));
        assert_eq!(
            causes(&prints).to_string(),
            "purge refused: /j cannot be written: No space left on device (os error 28)"
        );
        let quiet = ChainError::Outer(Box::new(ChainError::Quiet(full())));
        assert_eq!(causes(&quiet).to_string(), "purge refused: the file /j: No space left on device (os error 28)");
        assert_eq!(causes(&full()).to_string(), "No space left on device (os error 28)");
    }
}
