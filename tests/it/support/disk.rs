//! A disk that can be frozen: a file system in a file, mounted until its value is dropped.
//!
//! A frozen file system (`fsfreeze(8)`) blocks writes without an error: a process that writes or syncs waits, and
//! cannot even be killed. A volume whose storage is gone behaves the same. It needs root. Leftovers of a killed test
//! are thawed and removed by the next one.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// The prefix of mount points, before the id of the process that made them.
const PREFIX: &str = "clearcoat-disk-";

/// A mounted disk.
pub struct Disk {
    pub folder: PathBuf,
}

/// Whether this process may make one. If not, it prints that, and that part of a test is skipped.
pub fn is_possible() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        super::say("left out: a disk that is frozen needs root");
    }
    is_root
}

impl Disk {
    /// Mounts one in this folder.
    pub fn mount(within: &Path) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        remove_leftovers();
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let folder = within.join(format!("{PREFIX}{}-{number}", std::process::id()));
        let image = folder.with_extension("image");
        std::fs::create_dir(&folder).expect("a folder");
        std::fs::File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("a file");
        run("mkfs.ext4", &["-q", "-F", path(&image)]);
        run("mount", &["-o", "loop", path(&image), path(&folder)]);
        Disk { folder }
    }

    /// Leaves no room on it.
    pub fn fill(&self) {
        let mut file = std::fs::File::create(self.folder.join("fills-the-disk")).expect("a file");
        let block = [0_u8; 1 << 16];
        let written = std::iter::repeat_with(|| file.write_all(&block)).find_map(Result::err).expect("an end");
        assert_eq!(written.kind(), std::io::ErrorKind::StorageFull, "{written}");
    }

    pub fn freeze(&self) {
        run("fsfreeze", &["--freeze", path(&self.folder)]);
    }

    pub fn thaw(&self) {
        run("fsfreeze", &["--unfreeze", path(&self.folder)]);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        remove(&self.folder);
    }
}

/// Thaws it if it is frozen, and removes it: at the latest when the last process with a file on it ends.
fn remove(folder: &Path) {
    for (program, arguments) in [("fsfreeze", ["--unfreeze", path(folder)]), ("umount", ["--lazy", path(folder)])] {
        _ = Command::new(program).args(arguments).stderr(std::process::Stdio::null()).status();
    }
}

/// Removes those of test processes that have ended.
fn remove_leftovers() {
    let mounts = std::fs::read_to_string("/proc/mounts").expect("the mounts");
    for folder in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
        let Some((_, rest)) = folder.split_once(PREFIX) else { continue };
        let pid = rest.split('-').next().unwrap_or_default();
        if !Path::new("/proc").join(pid).exists() {
            remove(Path::new(folder));
        }
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a path that is text")
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
