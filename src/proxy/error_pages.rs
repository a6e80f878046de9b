//! Pages of the shop for answers that clearcoat makes itself.
//!
//! They are read when the process starts and with each reload of the configuration, all of them or none, and kept in memory: an
//! error is no time to look at a disk, and the same page is shown to everybody meanwhile. The status, `Retry-After` and the like
//! stay what they are; only the body and its type are the shop's. Answers of nodes are theirs, whatever their status.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use hyper::body::Bytes;

use crate::config;

/// The largest page, in bytes. A copy of it may be in memory for each client that is shown it.
const LARGEST: u64 = 64 * 1024;

/// What may be a page, by the ending of its file.
const TYPES: [(&str, &str); 4] = [
    ("html", "text/html; charset=utf-8"),
    ("htm", "text/html; charset=utf-8"),
    ("json", "application/json"),
    ("txt", "text/plain; charset=utf-8"),
];

/// The pages of a configuration.
#[derive(Debug, Default)]
pub struct ErrorPages {
    by_status: Vec<(u16, ErrorPage)>,
    maintenance: Option<ErrorPage>,
}

/// A page.
#[derive(Clone, Debug)]
pub(super) struct ErrorPage {
    pub(super) content_type: &'static str,
    pub(super) body: Bytes,
}

/// Why a page cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ErrorPageError {
    /// Its file cannot be read.
    #[error("{key}: {} cannot be read", file.display())]
    Read {
        /// The key that names the file.
        key: String,
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its file has too many bytes.
    #[error("{key}: {} has more than {LARGEST} bytes", file.display())]
    TooLarge {
        /// The key that names the file.
        key: String,
        /// The file.
        file: PathBuf,
    },
    /// The ending of its file tells no media type.
    #[error("{key}: {} must end in .html, .htm, .json or .txt", file.display())]
    UnknownType {
        /// The key that names the file.
        key: String,
        /// The file.
        file: PathBuf,
    },
}

impl ErrorPages {
    /// Reads the pages of this configuration. Blocks meanwhile.
    ///
    /// # Errors
    /// The first page that cannot be used, and why.
    pub fn read(edge: &config::Edge) -> Result<Self, ErrorPageError> {
        let each = edge.error_pages.files();
        let read =
            |(status, file): (u16, &Path)| Ok((status, ErrorPage::read(format!("edge.error_pages.{status}"), file)?));
        let page = edge.maintenance.page.as_deref();
        Ok(ErrorPages {
            by_status: each.map(read).collect::<Result<_, _>>()?,
            maintenance: page.map(|file| ErrorPage::read("edge.maintenance.page".to_owned(), file)).transpose()?,
        })
    }

    /// The page for this status, if the shop has one.
    pub(super) fn of_status(&self, status: u16) -> Option<&ErrorPage> {
        self.by_status.iter().find(|(of, _)| *of == status).map(|(_, page)| page)
    }

    /// The page of a shop that is closed.
    pub(super) fn of_maintenance(&self) -> Option<&ErrorPage> {
        self.maintenance.as_ref().or_else(|| self.of_status(503))
    }
}

impl ErrorPage {
    fn read(key: String, file: &Path) -> Result<Self, ErrorPageError> {
        let ending = file.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        let known = TYPES.iter().find(|(known, _)| known.eq_ignore_ascii_case(ending));
        let Some(&(_, content_type)) = known else {
            return Err(ErrorPageError::UnknownType { key, file: file.to_owned() });
        };
        let mut body = Vec::new();
        let read = File::open(file).and_then(|opened| opened.take(LARGEST + 1).read_to_end(&mut body));
        match read {
            Err(source) => Err(ErrorPageError::Read { key, file: file.to_owned(), source }),
            Ok(length) if length as u64 > LARGEST => Err(ErrorPageError::TooLarge { key, file: file.to_owned() }),
            Ok(_) => Ok(ErrorPage { content_type, body: body.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, bytes: usize) -> Result<ErrorPages, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(name);
        std::fs::write(&file, "x".repeat(bytes)).unwrap();
        let mut edge = config::Edge::default();
        edge.maintenance.page = Some(file);
        ErrorPages::read(&edge).map_err(|error| error.to_string().replace(folder.path().to_str().unwrap(), "D"))
    }

    #[test]
    fn a_page_has_a_size_and_a_type_that_can_be_sent() {
        let page = read("sorry.HTML", 65536).unwrap();
        let page = page.of_maintenance().unwrap();
        assert_eq!((page.content_type, page.body.len()), ("text/html; charset=utf-8", 65536));
        for (name, bytes, said) in [
            ("sorry.html", 65537, "edge.maintenance.page: D/sorry.html has more than 65536 bytes"),
            ("sorry.php", 1, "edge.maintenance.page: D/sorry.php must end in .html, .htm, .json or .txt"),
            ("sorry", 1, "edge.maintenance.page: D/sorry must end in .html, .htm, .json or .txt"),
        ] {
            assert_eq!(read(name, bytes).unwrap_err(), said);
        }
    }

    #[test]
    fn a_shop_without_a_page_for_maintenance_shows_that_of_503() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("503.txt");
        std::fs::write(&file, "soon").unwrap();
        let mut edge = config::Edge::default();
        edge.error_pages.service_unavailable = Some(file.clone());
        let pages = ErrorPages::read(&edge).unwrap();
        assert_eq!(pages.of_maintenance().unwrap().body, "soon");
        assert!(pages.of_status(503).is_some() && pages.of_status(502).is_none());
        std::fs::remove_file(&file).unwrap();
        let error = ErrorPages::read(&edge).unwrap_err().to_string();
        assert!(error.starts_with("edge.error_pages.503: ") && error.ends_with("cannot be read"), "{error}");
    }
}
