//! Clock skew: a program whose wall clock is ahead of all others, by `libfaketime`.

use std::path::PathBuf;
use std::process::Command;

/// Sets the wall clock of a program ahead by this much, for example `+3s`. Its monotonic clock is not changed, as on a
/// machine whose clock was set.
pub fn put_ahead(command: &mut Command, by: &str) {
    let library = ["x86_64-linux-gnu", "aarch64-linux-gnu"]
        .map(|machine| PathBuf::from(format!("/usr/lib/{machine}/faketime/libfaketimeMT.so.1")))
        .into_iter()
        .find(|library| library.exists())
        .expect("libfaketime is installed (make test installs it)");
    command.env("LD_PRELOAD", library).env("FAKETIME", by).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    command.env("DONT_FAKE_MONOTONIC", "1");
}
