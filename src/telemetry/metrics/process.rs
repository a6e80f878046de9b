//! What the process uses, under the names that every Prometheus client library gives them: `process_…`, without our prefix,
//! so that dashboards made for any process show this one.
//!
//! Read from `/proc` when somebody asks. Linux counts open files for us where it can (`stat` of `/proc/self/fd`, since 6.2);
//! to list them takes milliseconds with tens of thousands.

use std::fs;
use std::io;

use parking_lot::Mutex;
use prometheus::{Counter, Gauge, IntGauge, Opts, Registry};
use rustix::process::{Resource, getrlimit};

use super::register;

/// The fields of `/proc/self/stat` behind the name of the process, counted from its state (proc(5)).
const USER_TICKS: usize = 11;
const SYSTEM_TICKS: usize = 12;
const THREADS: usize = 17;
const START_TICKS: usize = 19;
const VIRTUAL_BYTES: usize = 20;

/// Ticks in a second, as the kernel counts for programs (`USER_HZ`): 100 on every architecture that Rust's standard library is
/// built for. To ask the system costs a look at the auxiliary vector, which valgrind does not show.
const TICKS: f64 = 100.0;

/// The series of the process, in a registry of their own.
#[derive(Debug)]
pub(super) struct ProcessMetrics {
    pub(super) families: Registry,
    cpu: Counter,
    resident: IntGauge,
    virtual_memory: IntGauge,
    open_files: IntGauge,
    threads: IntGauge,
    /// One reads them at a time.
    update: Mutex<()>,
}

impl ProcessMetrics {
    /// # Errors
    /// Only where two families share a name: a fault in this file.
    pub(super) fn new() -> prometheus::Result<Self> {
        let families = Registry::new();
        let r = &families;
        let gauge = |name: &str, help: &str| register(r, IntGauge::with_opts(Opts::new(name, help))?);
        let start: Gauge = register(
            r,
            Gauge::new("process_start_time_seconds", "Start time of the process since unix epoch in seconds")?,
        )?;
        let max_files = gauge("process_max_fds", "Maximum number of open file descriptors")?;
        let limit = getrlimit(Resource::Nofile).current;
        max_files.set(limit.map_or(-1, |limit| i64::try_from(limit).unwrap_or(i64::MAX)));
        if let Some(seconds) = Usage::read().ok().and_then(|usage| usage.started()) {
            start.set(seconds);
        }
        Ok(ProcessMetrics {
            cpu: register(
                r,
                Counter::new("process_cpu_seconds_total", "Total user and system CPU time spent in seconds")?,
            )?,
            resident: gauge("process_resident_memory_bytes", "Resident memory size in bytes")?,
            virtual_memory: gauge("process_virtual_memory_bytes", "Virtual memory size in bytes")?,
            open_files: gauge("process_open_fds", "Number of open file descriptors")?,
            threads: gauge("process_threads", "Number of OS threads in the process")?,
            update: Mutex::default(),
            families,
        })
    }

    /// Reads them again. What cannot be read stays as it was.
    pub(super) fn update(&self) {
        // A counter can only be raised, by what is missing: two at once would both raise it by that.
        let _alone = self.update.lock();
        if let Ok(usage) = Usage::read() {
            self.cpu.inc_by((usage.cpu_seconds - self.cpu.get()).max(0.0));
            self.resident.set(usage.resident);
            self.virtual_memory.set(usage.virtual_memory);
            self.threads.set(usage.threads);
        }
        if let Ok(files) = open_files() {
            self.open_files.set(files);
        }
    }
}

fn open_files() -> io::Result<i64> {
    let folder = "/proc/self/fd";
    let counted = i64::try_from(fs::metadata(folder)?.len()).unwrap_or(0);
    if counted > 0 {
        return Ok(counted);
    }
    // Without the one that lists them.
    Ok(fs::read_dir(folder)?.count() as i64 - 1)
}

/// What `/proc/self/stat` and `/proc/self/status` say.
#[derive(Debug)]
struct Usage {
    cpu_seconds: f64,
    resident: i64,
    virtual_memory: i64,
    threads: i64,
    /// Since the machine was started.
    start_seconds: f64,
}

impl Usage {
    fn read() -> io::Result<Self> {
        let (stat, status) = (fs::read_to_string("/proc/self/stat")?, fs::read_to_string("/proc/self/status")?);
        Usage::parse(&stat, &status).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn parse(stat: &str, status: &str) -> Option<Self> {
        // The name may have spaces and parentheses, and is followed by the last one.
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split_ascii_whitespace().collect();
        let number = |field: usize| fields.get(field)?.parse::<i64>().ok();
        let seconds = |ticks: i64| ticks as f64 / TICKS;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim().strip_suffix(" kB")?;
        Some(Usage {
            cpu_seconds: seconds(number(USER_TICKS)? + number(SYSTEM_TICKS)?),
            resident: resident.parse::<i64>().ok()? * 1024,
            virtual_memory: number(VIRTUAL_BYTES)?,
            threads: number(THREADS)?,
            start_seconds: seconds(number(START_TICKS)?),
        })
    }

    /// When the process began, in Unix seconds.
    fn started(&self) -> Option<f64> {
        let text = fs::read_to_string("/proc/stat").ok()?;
        let booted: f64 = text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
        Some(booted + self.start_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_parentheses_moves_no_field() {
        let plain: Vec<String> = (0..40).map(|field| field.to_string()).collect();
        let stat = format!("12 (a) b (c)) S {}", plain[1..].join(" "));
        let usage = Usage::parse(&stat, "VmRSS:\t     12 kB\n").unwrap();
        assert_eq!((usage.threads, usage.virtual_memory, usage.resident), (17, 20, 12 * 1024));
    }

    #[test]
    fn the_values_of_this_process_are_sensible_and_its_cpu_time_never_falls() {
        let process = ProcessMetrics::new().unwrap();
        process.update();
        let before = process.cpu.get();
        assert!(process.resident.get() > 1 << 20 && process.virtual_memory.get() > process.resident.get());
        assert!(process.open_files.get() >= 3 && process.threads.get() >= 1);
        process.update();
        assert!(process.cpu.get() >= before);
    }

    #[test]
    fn whoever_asks_at_once_counts_no_time_twice() {
        let process = ProcessMetrics::new().unwrap();
        for _ in 0..50 {
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| process.update());
                }
            });
            let counted = process.cpu.get();
            let used = Usage::read().unwrap().cpu_seconds;
            assert!(counted <= used + 1e-6, "{counted} of {used} s");
        }
    }
}
