//! Replacing a whole file.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// Replaces the content of a file durably. After a crash the file has either the old or the new content.
///
/// # Errors
/// The system's; the old content is still there.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let mut file = File::create(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

/// Moves a file aside that cannot be read, for later inspection. Returns its new path.
///
/// # Errors
/// The system's.
pub fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let aside = path.with_extension("json.unreadable");
    fs::rename(path, &aside)?;
    Ok(aside)
}
