//! What is to be seen without asking anybody: the configuration, and this machine.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use ipnet::IpNet;

use super::finding::Finding;
use crate::config::{Config, JournalKind};

/// File systems that are gone with the power.
const IN_MEMORY: [&str; 2] = ["tmpfs", "ramfs"];

/// All that is wrong here.
pub(super) fn examine(config: &Config, remarks: Vec<String>) -> Vec<Finding> {
    let mut findings: Vec<Finding> =
        remarks.into_iter().map(|remark| Finding::warning("configuration", remark)).collect();
    let has_token = config.purge.token_file.is_some();
    findings.extend(config.purge.allow.iter().filter_map(|network| wide_network(network, has_token)));
    findings.extend(config.admin.listen.iter().filter_map(|address| public_admin(address.ip())));
    if config.journal.kind == JournalKind::Memory {
        let memory = Finding::warning("journal-in-memory", "journal.kind is memory")
            .why("A restart forgets what every Varnish has, and drops all pages.")
            .change("journal.kind = \"disk\", with a journal.path that survives a restart");
        findings.push(memory);
    } else {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        findings.extend(examine_folder(&config.journal.path, &mounts));
    }
    findings
}

/// A network from which everybody may purge, or nearly.
fn wide_network(network: &IpNet, has_token: bool) -> Option<Finding> {
    let is_private = match network {
        IpNet::V4(v4) => v4.network().is_private() || v4.network().is_loopback(),
        IpNet::V6(v6) => v6.network().is_unique_local() || v6.network().is_loopback(),
    };
    let widest = if network.addr().is_ipv4() { 8 } else { 16 };
    if has_token || is_private || network.prefix_len() >= widest {
        return None;
    }
    let finding =
        Finding::error("purge-allow-too-wide", format!("purge.allow has {network}, and there is no purge.token_file"));
    let why = "Whoever reaches the purge listener from there can empty every cache, as often as he likes.";
    Some(finding.why(why).change(format!(
        "take \"{network}\" out of purge.allow, and name the machines that run Magento; or set purge.token_file"
    )))
}

/// An admin listener that strangers may reach.
fn public_admin(address: IpAddr) -> Option<Finding> {
    let why = "It asks nobody who they are: metrics, addresses of nodes and what is purged are there to be read.";
    let is_inner = match address {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_private() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unique_local() || v6.is_unicast_link_local(),
    };
    if address.is_unspecified() {
        let what = format!("admin.listen is {address}: every address of this machine");
        return Some(
            Finding::info("admin-everywhere", what).why(why).change("a firewall before it, or an inner address"),
        );
    }
    let finding = || {
        Finding::warning("admin-public", format!("admin.listen is {address}, an address of the internet"))
            .why(why)
            .change("admin.listen = [\"127.0.0.1:9180\"], or an address that only Prometheus and operators reach")
    };
    (!is_inner).then(finding)
}

/// The folder of the journal.
fn examine_folder(path: &Path, mounts: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let Some(there) = nearest(path) else { return findings };
    if let Some(kind) = file_system_of(&there, mounts).filter(|kind| IN_MEMORY.contains(&kind.as_str())) {
        let what = format!("journal.path = {} is on a {kind}", path.display());
        let why = "With the power, or the container, accepted purges and the positions of all caches are gone, and every \
                   page is dropped.";
        let change = "journal.path = \"/var/lib/clearcoat\", or another folder on a disk or a volume";
        findings.push(Finding::warning("journal-on-tmpfs", what).why(why).change(change));
    }
    if there != path {
        let what = format!("journal.path = {} is not there yet", path.display());
        findings.push(Finding::info("journal-missing", what).change("clearcoat serve makes it, if it may"));
        return findings;
    }
    match fs::metadata(path) {
        Ok(metadata) if metadata.permissions().mode() & 0o002 != 0 => {
            let what = format!("anybody on this machine may write to journal.path = {}", path.display());
            let why = "Who can replace the journal decides which purges are forgotten.";
            let change = format!("`chmod o-w {}`", path.display());
            findings.push(Finding::warning("journal-writable-by-all", what).why(why).change(change));
        }
        Ok(_) => {}
        Err(error) => {
            let what = format!("journal.path = {} cannot be looked at: {error}", path.display());
            findings.push(Finding::info("journal-not-looked-at", what).change("run doctor as the user of clearcoat"));
        }
    }
    findings
}

/// The path itself if it is there, else the folder above it that is.
fn nearest(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    path.ancestors().find(|folder| folder.symlink_metadata().is_ok()).map(Path::to_owned)
}

/// The kind of the file system on which a path is, by `/proc/self/mountinfo` (proc_pid_mountinfo(5)): the longest mount point above
/// it counts, and of equal ones the last.
fn file_system_of(path: &Path, mounts: &str) -> Option<String> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let parse = |line: &str| {
        let (mount, source) = line.split_once(" - ")?;
        let point = PathBuf::from(mount.split(' ').nth(4)?.replace("\\040", " "));
        let kind = source.split(' ').next()?.to_owned();
        path.starts_with(&point).then(|| (point.components().count(), kind))
    };
    mounts.lines().filter_map(parse).max_by_key(|(depth, _)| *depth).map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn a_network_of_the_whole_internet_is_too_wide_without_a_token() {
        for wide in ["0.0.0.0/0", "::/0", "192.0.0.0/4", "2000::/3"] {
            assert_eq!(wide_network(&network(wide), false).unwrap().name(), "purge-allow-too-wide", "{wide}");
            assert_eq!(wide_network(&network(wide), true), None, "{wide}");
        }
        for narrow in ["10.0.0.0/8", "fc00::/7", "127.0.0.0/8", "192.0.2.0/24", "2001:db8::/32"] {
            assert_eq!(wide_network(&network(narrow), false), None, "{narrow}");
        }
    }

    #[test]
    fn an_admin_listener_on_the_internet_is_named() {
        let name = |address: &str| public_admin(address.parse().unwrap()).map(|finding| finding.name());
        assert_eq!(name("192.0.2.7"), Some("admin-public"));
        assert_eq!(name("2001:db8::7"), Some("admin-public"));
        assert_eq!(name("::"), Some("admin-everywhere"));
        for inner in ["127.0.0.1", "10.0.0.7", "::1", "fd00::7"] {
            assert_eq!(name(inner), None, "{inner}");
        }
    }

    #[test]
    fn the_file_system_is_that_of_the_nearest_mount_point() {
        let mounts = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
                      25 22 0:23 / /no/such/shm rw,nosuid - tmpfs tmpfs rw\n\
                      26 25 8:2 / /no/such/shm/a\\040b rw - xfs /dev/sdb rw\n";
        let kind = |path: &str| file_system_of(Path::new(path), mounts).unwrap();
        assert_eq!(kind("/no/such"), "ext4");
        assert_eq!(kind("/no/such/shm/journal"), "tmpfs");
        assert_eq!(kind("/no/such/shm2"), "ext4");
        assert_eq!(kind("/no/such/shm/a b/c"), "xfs");
        assert_eq!(file_system_of(Path::new("/x"), "garbage\n"), None);
    }

    #[test]
    fn a_folder_that_anybody_may_write_to_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let names = |path: &Path| examine_folder(path, "").iter().map(Finding::name).collect::<Vec<_>>();
        assert!(names(folder.path()).is_empty());
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(names(folder.path()), ["journal-writable-by-all"]);
        assert_eq!(names(&folder.path().join("a/b")), ["journal-missing"]);
    }
}
