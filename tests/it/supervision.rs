//! What the service manager is told: ready, reloading, ending, and that all goes on.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::clearcoat::Clearcoat;
use crate::support::client::get;
use crate::support::eventually;
use crate::support::service_manager::ServiceManager;

/// Two workers, so that one can stand still beside another.
const CONFIG: &str = "[edge]\nlisten = [\"127.0.0.1:0\"]\n[origin]\nlisten = [\"127.0.0.1:0\"]\n\
    [purge]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = [\"127.0.0.1:0\"]\n[runtime]\nworkers = 2\n";

/// A clearcoat under a service manager, in a folder of its own.
struct Service {
    clearcoat: Clearcoat,
    manager: ServiceManager,
    folder: tempfile::TempDir,
}

fn start(watchdog: Option<Duration>, more: &str) -> Service {
    let folder = tempfile::tempdir().expect("a folder");
    let manager = ServiceManager::start(folder.path());
    let journal = format!("[journal]\npath = {:?}\n", folder.path().join("journal"));
    let config = format!("{CONFIG}{journal}{more}");
    let clearcoat = Clearcoat::start_with(manager.command(watchdog), folder.path(), &config);
    Service { clearcoat, manager, folder }
}

#[test]
fn it_is_ready_when_the_edge_serves_and_says_when_it_ends() {
    let Service { mut clearcoat, manager, folder: _folder } = start(None, "");
    manager.says(0, "READY=1");
    assert_eq!(get(clearcoat.admin, "/readyz").expect("an answer").status, 200);
    let messages = manager.messages();
    assert!(messages[0].starts_with("STATUS=starting"), "{messages:?}");
    assert_eq!(manager.says(0, "STATUS=serves"), "STATUS=serves: 0 of 0 Varnish and 0 of 0 web nodes up");
    clearcoat.terminate();
    manager.says(0, "STOPPING=1");
    assert!(clearcoat.wait().success());
    manager.says(0, "STATUS=ending");
    assert_eq!((manager.count("READY=1"), manager.count("STOPPING=1"), manager.count("WATCHDOG=1")), (1, 1, 0));
}

#[test]
fn it_is_not_ready_while_it_waits_for_its_fleet() {
    // Nobody is there, and there is no snapshot of earlier.
    let more = "[registry]\nkind = \"etcd\"\n[registry.etcd]\nendpoints = [\"http://127.0.0.1:1\"]\n";
    let folder = tempfile::tempdir().expect("a folder");
    let manager = ServiceManager::start(folder.path());
    let journal = format!("[journal]\nkind = \"disk\"\npath = {:?}\n", folder.path().join("journal"));
    let config = format!("{CONFIG}{journal}{more}");
    let clearcoat = Clearcoat::start_with(manager.command(None), folder.path(), &config);
    manager.says(0, "STATUS=starting: waits for its nodes");
    eventually("the admin listener answers", || {
        get(clearcoat.admin, "/readyz").is_ok_and(|answer| answer.status == 503).then_some(())
    });
    // A signal meanwhile is no reload that somebody waits for.
    clearcoat.reload();
    clearcoat.log().waits_for("the configuration is as it was");
    assert_eq!((manager.count("READY=1"), manager.count("RELOADING=1")), (0, 0), "{:?}", manager.messages());
}

/// Microseconds since the machine was started, as systemd counts.
fn monotonic_now() -> u128 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u128 * 1_000_000 + now.tv_nsec as u128 / 1000
}

#[test]
fn a_reload_begins_and_ends_whether_it_is_taken_or_refused() {
    let Service { clearcoat, manager, folder: _folder } = start(None, "");
    manager.says(0, "READY=1");
    let good = clearcoat.config();
    for (text, said) in [
        (format!("[limits]\nmax_fields = 50\n{good}"), "the configuration was reloaded: limits.max_fields"),
        (format!("[limits]\nmax_fields = 1\n{good}"), "the new configuration is refused"),
        (good, "the configuration was reloaded: limits.max_fields"),
    ] {
        let (so_far, asked) = (manager.messages().len(), monotonic_now());
        let logged = clearcoat.log().count(said);
        clearcoat.configure(&text);
        clearcoat.reload();
        let began = manager.says(so_far, "MONOTONIC_USEC=");
        let began: u128 = began.trim_start_matches("MONOTONIC_USEC=").parse().expect("a number");
        assert!((asked..=monotonic_now()).contains(&began), "systemd takes an older one for an earlier reload");
        manager.says(so_far, "READY=1");
        clearcoat.log().waits_for_count(said, logged + 1);
        let messages = manager.messages();
        let of = |line: &str| messages[so_far..].iter().position(|message| message.lines().any(|of| of == line));
        assert!(of("RELOADING=1") < of("READY=1"), "{messages:?}");
        if said.contains("refused") {
            manager.says(
                so_far,
                "STATUS=serves: 0 of 0 Varnish and 0 of 0 web nodes up; the changed configuration is refused",
            );
        }
    }
}

/// Stops one thread of a process, as if it hung, until this value is dropped.
struct StoppedThread(Child);

impl StoppedThread {
    /// By ptrace(2): SIGSTOP would stop the whole process.
    fn of(pid: u32, name: &str) -> Self {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("a process");
        let is_it = |task: &std::fs::DirEntry| {
            std::fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
        };
        let task = tasks.filter_map(Result::ok).find(is_it).expect("the thread");
        let script = "import ctypes, sys\n\
                      libc = ctypes.CDLL(None, use_errno=True)\n\
                      libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]\n\
                      SEIZE, INTERRUPT = 0x4206, 0x4207\n\
                      for request in (SEIZE, INTERRUPT):\n\
                      \x20   if libc.ptrace(request, int(sys.argv[1]), None, None) != 0: sys.exit(ctypes.get_errno())\n\
                      print('stopped', flush=True)\n\
                      sys.stdin.read()\n";
        let mut tracer = Command::new("python3")
            .args(["-c", script])
            .arg(task.file_name())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3");
        let mut line = String::new();
        BufReader::new(tracer.stdout.take().expect("a pipe")).read_line(&mut line).expect("its output");
        assert_eq!(line.trim(), "stopped", "ptrace(2) is not permitted");
        StoppedThread(tracer)
    }
}

impl Drop for StoppedThread {
    fn drop(&mut self) {
        // Its end lets the thread go on.
        drop(self.0.stdin.take());
        _ = self.0.wait();
    }
}

#[test]
fn the_watchdog_is_fed_only_while_every_worker_goes_on() {
    const INTERVAL: Duration = Duration::from_secs(2);
    let Service { clearcoat, manager, folder: _folder } = start(Some(INTERVAL), "");
    manager.says(0, "READY=1");
    let fed = |times: usize| eventually("it is fed", || (manager.count("WATCHDOG=1") >= times).then_some(()));
    fed(3);
    let stopped = StoppedThread::of(clearcoat.pid(), "worker-1");
    clearcoat.log().waits_for("\"stalled\":\"worker-1\"");
    let before = manager.count("WATCHDOG=1");
    // The rest of the process lives: a timer of its own would feed on.
    let began = Instant::now();
    eventually("time passes", || (began.elapsed() > 2 * INTERVAL).then_some(()));
    assert_eq!(get(clearcoat.admin, "/readyz").expect("the control plane answers").status, 200);
    assert_eq!(manager.count("WATCHDOG=1"), before, "{:?}", manager.messages());
    drop(stopped);
    fed(before + 2);
    clearcoat.log().waits_for_count("a part stands still", 1);
}

#[test]
fn a_manager_that_is_gone_is_an_error_of_one_line_and_nothing_else() {
    let service = start(Some(Duration::from_secs(1)), "");
    service.manager.says(0, "READY=1");
    std::fs::remove_file(service.folder.path().join("notify")).expect("its socket");
    service.clearcoat.log().waits_for("cannot be told");
    let mut clearcoat = service.clearcoat;
    clearcoat.terminate();
    assert!(clearcoat.wait().success());
    assert_eq!(clearcoat.log().count("cannot be told"), 1);
}
