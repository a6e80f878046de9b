//! Where a configuration is read from, the first time and again.

use std::io;
use std::path::PathBuf;

use super::Config;
use super::error::{ConfigError, ConfigErrors};

/// The file that is read when none is named, if it exists in the working directory.
const DEFAULT_FILE: &str = "clearcoat.toml";

/// Names the file when the command line does not.
pub(super) const FILE_VARIABLE: &str = "CLEARCOAT_CONFIG";

/// A file, and the variables that override it: see [`Config::load`]. The variables of a process do not change.
#[derive(Clone, Debug)]
pub struct ConfigSource {
    named: Option<PathBuf>,
    env: Vec<(String, String)>,
}

/// What was in the file; `None` if there is none and none was named. Two of them are equal if the same configuration
/// comes of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigText(Option<(PathBuf, Result<String, ReadFailure>)>);

/// Why a file cannot be read. An [`io::Error`] that can be compared.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ReadFailure(io::ErrorKind, String);

impl ConfigSource {
    /// The file that the command line names, and the environment.
    pub fn new(path: Option<PathBuf>, env: impl Iterator<Item = (String, String)>) -> Self {
        let mut env: Vec<(String, String)> = env.collect();
        env.sort();
        let by_variable = || {
            let (_, file) = env.iter().find(|(name, file)| name == FILE_VARIABLE && !file.is_empty())?;
            Some(PathBuf::from(file))
        };
        let named = path.or_else(by_variable);
        ConfigSource { named, env }
    }

    /// Reads the file and the environment.
    ///
    /// # Errors
    /// [`ConfigErrors`] holds everything that is wrong, not only the first thing.
    pub fn load(&self) -> Result<Config, ConfigErrors> {
        self.parse(self.read())
    }

    /// The file that is read; `None` if none is named, and there is none in the working directory.
    pub fn file(&self) -> Option<PathBuf> {
        let by_default = || Some(PathBuf::from(DEFAULT_FILE)).filter(|path| path.exists());
        self.named.clone().or_else(by_default)
    }

    /// Reads the file.
    pub fn read(&self) -> ConfigText {
        let Some(path) = self.file() else { return ConfigText(None) };
        let text = std::fs::read_to_string(&path).map_err(|cause| ReadFailure(cause.kind(), cause.to_string()));
        ConfigText(Some((path, text)))
    }

    /// Parses the text of the file together with the environment.
    ///
    /// # Errors
    /// As [`ConfigSource::load`].
    pub fn parse(&self, ConfigText(text): ConfigText) -> Result<Config, ConfigErrors> {
        let Some((path, text)) = text else { return Config::assemble(None, self.env.clone()) };
        let file = path.display().to_string();
        match text {
            Ok(text) => Config::assemble(Some((file, &text)), self.env.clone()),
            Err(ReadFailure(kind, cause)) => {
                Err(ConfigErrors::from(ConfigError::Unreadable { file, cause: io::Error::new(kind, cause) }))
            }
        }
    }
}
