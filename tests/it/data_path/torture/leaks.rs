//! Checks for leaked resources of a process.

use std::collections::BTreeSet;

use crate::support::clearcoat::Clearcoat;
use crate::support::eventually;

/// The sockets of a process, by the kernel's inode numbers.
pub fn sockets(pid: u32) -> BTreeSet<String> {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("a running process");
    // A descriptor closed meanwhile has no target any more.
    let targets = descriptors.filter_map(|descriptor| std::fs::read_link(descriptor.ok()?.path()).ok());
    targets.map(|target| target.to_string_lossy().into_owned()).filter(|target| target.starts_with("socket:")).collect()
}

/// Waits until no request is in flight and no socket is open that was not in `before`: client sockets go at once,
/// pooled ones after their idle limit. Sockets of health checks come and go, so one moment without any is enough.
pub fn nothing_is_left(clearcoat: &Clearcoat, nodes: usize, before: &BTreeSet<String>) {
    let inflight = |role, number| {
        clearcoat.metric(&format!("clearcoat_upstream_inflight{{node=\"{role}-{number}\",role=\"{role}\"}}"))
    };
    eventually("no request is in flight", || {
        (1..=nodes).all(|number| inflight("web", number) == 0.0 && inflight("varnish", number) == 0.0).then_some(())
    });
    eventually("clearcoat has closed every socket that it opened for a request", || {
        sockets(clearcoat.pid()).is_subset(before).then_some(())
    });
}
