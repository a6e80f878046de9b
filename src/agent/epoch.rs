//! The epoch: the name of one life of a cache.
//!
//! Varnish keeps its cache in the memory of its worker process. When that dies, the manager starts another one, with an
//! empty cache, and neither the agent nor the address notices. So the epoch of a Varnish is its worker: the process id, the
//! time at which it started, and the boot of the machine, since both repeat after one.
//!
//! A mistake is not the same in both directions. A new cache under an old name costs a few bans that find nothing. An old
//! cache under a new name is believed to be empty, and keeps pages that should have been dropped. So a process counts as a
//! worker only when it says that it is one: the manager's other children (it compiles VCL in them) are passed over. And
//! if this system does not let us look, no epoch is written: that counts as the same cache.
//!
//! A storage that outlives the worker (`-s` with `deprecated_persistent`, `fellow`, `mse` and whatever else is not known to
//! die with it) is such an old cache. The manager's command line tells, and then no epoch is written either.

use std::fs;
use std::path::PathBuf;

/// The name that varnishd gives its worker. Its manager has the name of the program.
const WORKER: &str = "cache-main";
const MANAGER: &str = "varnishd";

/// The storages that a new worker finds empty. (`file` maps a file that the next worker does not read.)
const EMPTIED: [&str; 4] = ["default", "malloc", "umem", "file"];

/// How the epoch of a node is found.
#[derive(Clone, Debug)]
pub enum Epoch {
    /// It has none: only a cache has.
    None,
    /// As it was given. For a cache that outlives its process, in a file.
    Fixed(String),
    /// From the child: a varnishd, or something else that has its cache in its own memory.
    OfChild,
    /// From a varnishd whose manager's process id is in a file.
    OfPidFile(PathBuf),
}

/// The result of a look at the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum CacheLife {
    /// Its name cannot be known.
    Unnamed,
    /// No cache exists now.
    Absent(&'static str),
    /// The cache, by name.
    Named(String),
}

/// A process, as described in /proc.
#[derive(Debug, PartialEq, Eq)]
struct Process {
    name: String,
    /// In ticks since the machine has booted.
    started: u64,
}

impl Epoch {
    /// Looks at the cache. `child` is our own.
    pub(super) fn look(&self, child: Option<u32>) -> CacheLife {
        match (self, child) {
            (Epoch::None, _) | (Epoch::OfChild, None) => CacheLife::Unnamed,
            (Epoch::Fixed(name), _) => CacheLife::Named(name.clone()),
            (Epoch::OfChild, Some(child)) => match process(child) {
                // It may be a script still that becomes a varnishd.
                Some(process) if is_manager(&process) => worker_of(child),
                Some(process) => CacheLife::Named(name(child, &process)),
                None => CacheLife::Absent("the process has ended"),
            },
            (Epoch::OfPidFile(file), _) => {
                let pid = fs::read_to_string(file).ok().and_then(|text| text.trim().parse::<u32>().ok());
                match pid.and_then(|pid| Some((pid, process(pid)?))) {
                    Some((pid, process)) if is_manager(&process) => worker_of(pid),
                    // What a varnishd has left behind that was killed, or of another namespace of processes.
                    _ => CacheLife::Absent("the pid file names no varnishd that can be seen from here"),
                }
            }
        }
    }
}

fn is_manager(process: &Process) -> bool {
    process.name.starts_with(MANAGER)
}

fn worker_of(manager: u32) -> CacheLife {
    let Ok(children) = fs::read_to_string(format!("/proc/{manager}/task/{manager}/children")) else {
        // It has ended just now, or this kernel has no such file.
        return if process(manager).is_some() { CacheLife::Unnamed } else { CacheLife::Absent("varnishd has ended") };
    };
    let children = children.split_ascii_whitespace().filter_map(|pid| pid.parse().ok());
    let mut workers = children.filter_map(|pid: u32| Some((pid, process(pid)?)));
    match workers.find(|(_, process)| process.name == WORKER) {
        Some(_) if outlives_worker(&fs::read(format!("/proc/{manager}/cmdline")).unwrap_or_default()) => {
            CacheLife::Unnamed
        }
        Some((pid, process)) => CacheLife::Named(name(pid, &process)),
        None => CacheLife::Absent("varnishd has no worker process"),
    }
}

/// Whether a varnishd with this command line, each argument with a NUL behind it, has a storage that a new worker may find
/// full. A value is `[name=]kind[,options]` (varnishd(1)).
fn outlives_worker(command_line: &[u8]) -> bool {
    let mut arguments = command_line.split(|&byte| byte == 0).map(String::from_utf8_lossy);
    let mut outlives = false;
    while let Some(argument) = arguments.next() {
        let Some(rest) = argument.strip_prefix("-s") else { continue };
        let storage = if rest.is_empty() { arguments.next().unwrap_or_default() } else { rest.to_owned().into() };
        let kind = storage.split(',').next().unwrap_or_default();
        let kind = kind.rsplit('=').next().unwrap_or_default();
        outlives |= !EMPTIED.contains(&kind);
    }
    outlives
}

fn name(pid: u32, process: &Process) -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let boot: String = boot.trim().chars().take(8).collect();
    format!("{boot}-{pid}-{}", process.started)
}

/// A process that runs. One that has ended and waits for its parent to notice does not.
fn process(pid: u32) -> Option<Process> {
    parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name may hold anything, also blanks and brackets; it ends with the last bracket (proc(5)).
fn parse(stat: &str) -> Option<Process> {
    let (front, rest) = stat.rsplit_once(')')?;
    let (_, name) = front.split_once('(')?;
    let mut fields = rest.split_ascii_whitespace();
    // Field 3 is the state.
    let ended = matches!(fields.next()?, "Z" | "X");
    // Field 22 is the start.
    let started = fields.nth(18)?.parse().ok()?;
    (!ended).then(|| Process { name: name.to_owned(), started })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "28367 (cache-main) S 28338 28338 25958 0 -1 4194624 3 0 0 0 5 6 0 0 20 0 217 0 160977 1 2 3";

    #[test]
    fn a_process_is_read_by_name_and_start() {
        assert_eq!(parse(STAT), Some(Process { name: "cache-main".into(), started: 160_977 }));
        let odd = STAT.replace("cache-main", "a) (b c)");
        assert_eq!(parse(&odd).unwrap().name, "a) (b c)");
    }

    #[test]
    fn one_that_has_ended_is_none() {
        assert_eq!(parse(&STAT.replace(" S ", " Z ")), None);
        assert_eq!(parse("1 (x) S"), None);
    }

    #[test]
    fn a_storage_that_outlives_the_worker_is_told_from_one_that_dies_with_it() {
        let line =
            |arguments: &[&str]| arguments.iter().flat_map(|one| [one.as_bytes(), b"\0"].concat()).collect::<Vec<_>>();
        for dies in [
            &["varnishd", "-F"][..],
            &["varnishd", "-s", "malloc,2G"],
            &["varnishd", "-smalloc,2G", "-s", "Transient=malloc,64m"],
            &["varnishd", "-s", "main=file,/var/lib/varnish/storage,10G", "-s", "default,1G"],
        ] {
            assert!(!outlives_worker(&line(dies)), "{dies:?}");
        }
        for outlives in [
            &["varnishd", "-s", "deprecated_persistent,/var/p,1G"][..],
            &["varnishd", "-s", "malloc,1G", "-s", "disk=fellow,/dev/sda,1T,1G,1M"],
            &["varnishd", "-smse,/etc/varnish/mse.conf"],
            &["varnishd", "-s", "persistent,/var/p,1G"],
        ] {
            assert!(outlives_worker(&line(outlives)), "{outlives:?}");
        }
    }

    #[test]
    fn a_process_keeps_its_name() {
        let child = Some(std::process::id());
        let CacheLife::Named(first) = Epoch::OfChild.look(child) else { panic!("no name") };
        assert_eq!(Epoch::OfChild.look(child), CacheLife::Named(first));
    }

    #[test]
    fn what_is_given_wins_and_what_is_no_cache_has_no_name() {
        assert_eq!(Epoch::Fixed("mse-1".into()).look(Some(1)), CacheLife::Named("mse-1".into()));
        assert_eq!(Epoch::None.look(Some(1)), CacheLife::Unnamed);
    }

    #[test]
    fn a_pid_file_that_names_no_varnishd_is_no_cache() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("varnishd.pid");
        let epoch = Epoch::OfPidFile(file.clone());
        assert!(matches!(epoch.look(None), CacheLife::Absent(_)));
        std::fs::write(&file, format!("{}\n", std::process::id())).unwrap();
        assert!(matches!(epoch.look(None), CacheLife::Absent(_)));
    }
}
