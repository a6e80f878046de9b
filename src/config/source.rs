//! Where a configuration is read from, the first time and again.

use std::io;
use std::path::PathBuf;

use super::Config;
use super::error::{ConfigError, ConfigErrors};
use super::raw::FILE_VARIABLE;
use super::remarks::{missing_nodes, stray_variables, unguarded_pages, unreachable_redirect, variable_of};

/// The file that is read when none is named, if it exists in the working directory.
const DEFAULT_FILE: &str = "clearcoat.toml";

/// Where the files are that a configuration names: certificates, tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamedFiles {
    /// On this machine, so one that cannot be read is an error.
    Here,
    /// Elsewhere, perhaps: the configuration is of another machine, and nobody asks for them.
    Elsewhere,
}

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

    /// The same for a machine that need not be this one: without its tokens.
    ///
    /// # Errors
    /// As [`ConfigSource::load`].
    pub fn load_for_elsewhere(&self) -> Result<Config, ConfigErrors> {
        self.parse_with(self.read(), NamedFiles::Elsewhere)
    }

    /// What is no error and hardly meant: no file, variables that mean nothing, no nodes, a redirect to where no browser comes.
    pub fn remarks(&self, config: &Config) -> Vec<String> {
        let no_file = self.file().is_none().then(|| {
            let folder =
                std::env::current_dir().map_or_else(|_| "here".to_owned(), |at| format!("in {}", at.display()));
            format!("no {DEFAULT_FILE} {folder} and no {FILE_VARIABLE}: the defaults are used")
        });
        let known: Vec<String> = Config::keys().iter().map(|key| variable_of(key)).collect();
        let stray = stray_variables(&self.env, &known);
        let others = [missing_nodes(config), unguarded_pages(config)].into_iter().flatten().map(str::to_owned);
        no_file.into_iter().chain(stray).chain(others).chain(unreachable_redirect(config)).collect()
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
    pub fn parse(&self, text: ConfigText) -> Result<Config, ConfigErrors> {
        self.parse_with(text, NamedFiles::Here)
    }

    fn parse_with(&self, ConfigText(text): ConfigText, files: NamedFiles) -> Result<Config, ConfigErrors> {
        let Some((path, text)) = text else { return Config::assemble(None, self.env.clone(), files) };
        let file = path.display().to_string();
        match text {
            Ok(text) => Config::assemble(Some((file, &text)), self.env.clone(), files),
            Err(ReadFailure(kind, cause)) => {
                Err(ConfigErrors::from(ConfigError::Unreadable { file, cause: io::Error::new(kind, cause) }))
            }
        }
    }
}
