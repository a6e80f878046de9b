//! A real varnishd.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use socket2::Socket;

use super::client::{Answer, get};
use super::slow_link::SlowLink;
use super::{eventually, try_hold};

/// A running varnishd, killed when this value is dropped.
pub struct Varnish {
    pub id: String,
    pub address: SocketAddr,
    folder: PathBuf,
    vcl: PathBuf,
    listens: Listens,
    /// What it keeps pages in, as `-s` takes it.
    storage: &'static str,
    /// Its network namespace, if it is not ours.
    namespace: Option<String>,
    child: Child,
    /// Where it is managed, also after a restart.
    management: SocketAddr,
    /// Its ports, reserved while it is down.
    held: Vec<Socket>,
}

/// The preamble of connections to a varnishd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listens {
    Http,
    /// A PROXY header: [`Varnish::get`] sends none and gets no answer.
    Proxy,
}

impl Varnish {
    /// Starts one on a free port. Call [`Varnish::ready`] later, so that several start concurrently.
    pub fn spawn(folder: &Path, id: &str, vcl: &Path) -> Self {
        Varnish::spawn_for(Listens::Http, folder, id, vcl)
    }

    /// The same for connections with another preamble.
    pub fn spawn_for(listens: Listens, folder: &Path, id: &str, vcl: &Path) -> Self {
        Varnish::spawn_in(None, SocketAddr::from(([127, 0, 0, 1], 0)), listens, (folder, id, vcl))
    }

    /// Starts one behind this link.
    pub fn spawn_behind(link: &SlowLink, folder: &Path, id: &str, vcl: &Path) -> Self {
        let address = SocketAddr::from((link.far, 0));
        Varnish::spawn_in(Some(link.namespace.clone()), address, Listens::Http, (folder, id, vcl))
    }

    /// Starts one with this storage, such as `malloc,2m`.
    #[allow(dead_code, reason = "for benches")]
    pub fn spawn_small(storage: &'static str, folder: &Path, id: &str, vcl: &Path) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        Varnish::spawn_with(storage, None, address, Listens::Http, (folder, id, vcl))
    }

    fn spawn_in(namespace: Option<String>, address: SocketAddr, listens: Listens, place: (&Path, &str, &Path)) -> Self {
        Varnish::spawn_with("malloc,64m", namespace, address, listens, place)
    }

    fn spawn_with(
        storage: &'static str,
        namespace: Option<String>,
        address: SocketAddr,
        listens: Listens,
        (folder, id, vcl): (&Path, &str, &Path),
    ) -> Self {
        let folder = folder.join(id);
        let management = SocketAddr::from(([127, 0, 0, 1], 0));
        let child = spawn(namespace.as_deref(), &folder, vcl, (address, listens), (management, storage));
        let (id, vcl) = (id.to_owned(), vcl.to_owned());
        Varnish { id, address, folder, vcl, listens, storage, namespace, child, management, held: vec![] }
    }

    /// Waits until it serves.
    pub fn ready(&mut self) {
        self.address = eventually("varnishd serves", || {
            assert_eq!(self.child.try_wait().expect("our child"), None, "varnishd ended at once");
            listen_address(self.tool("varnishadm"))
        });
        self.management = self.management_argument();
    }

    /// Reads a page from this Varnish directly.
    pub fn get(&self, path: &str) -> Answer {
        get(self.address, path).expect("varnishd answers")
    }

    /// A counter of `varnishstat`, such as `MAIN.busy_sleep`.
    pub fn counter(&self, name: &str) -> u64 {
        let output = self.tool("varnishstat").args(["-1", "-f", name]).output().expect("varnishstat");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let value = text.split_whitespace().nth(1).unwrap_or_else(|| panic!("no counter {name}: {output:?}"));
        value.parse().expect("a number")
    }

    /// Runs a command of `varnishadm`, and returns its output.
    pub fn adm(&self, command: &[&str]) -> String {
        let output = self.tool("varnishadm").args(command).output().expect("varnishadm");
        assert!(output.status.success(), "{command:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A Varnish tool, for this instance.
    fn tool(&self, program: &str) -> Command {
        let mut command = within(self.namespace.as_deref(), program);
        command.arg("-n").arg(&self.folder);
        command
    }

    /// Where it is managed.
    pub fn management(&self) -> SocketAddr {
        self.management
    }

    /// The argument `-T` in its shared memory, as `varnishadm` finds it.
    fn management_argument(&self) -> SocketAddr {
        let shared = self.folder.join("_.vsm_mgt");
        let index = std::fs::read_to_string(shared.join("_.index")).expect("the index of varnishd's shared memory");
        let words = index.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let chunk =
            words.into_iter().find(|words| words.ends_with(&["Arg", "-T"])).expect("a management port")[1].to_owned();
        let text = std::fs::read_to_string(shared.join(chunk)).expect("an argument");
        let mut words = text.trim_end_matches('\0').split_whitespace();
        let mut word = || words.next().expect("an address and a port");
        SocketAddr::new(word().parse().expect("an address"), word().parse().expect("a port"))
    }

    /// The file with the secret of its management port.
    pub fn secret_file(&self) -> PathBuf {
        self.folder.join("_.secret")
    }

    /// Has it use another VCL, compiled from this text.
    pub fn load(&self, name: &str, vcl: &str) {
        let file = self.folder.join(format!("{name}.vcl"));
        std::fs::write(&file, vcl).expect("a file");
        self.adm(&["vcl.load", name, file.to_str().expect("a path")]);
        self.adm(&["vcl.use", name]);
    }

    /// The VCL with which it was started.
    pub fn started_with(&self) -> String {
        std::fs::read_to_string(&self.vcl).expect("a VCL")
    }

    /// The number of clearcoats that it considers up.
    pub fn origins_up(&self) -> usize {
        let backends = self.adm(&["backend.list"]);
        backends.lines().filter(|line| line.contains(".origin_") && line.contains("healthy")).count()
    }

    /// Stops the worker process (not its manager, which would notice).
    pub fn hang(&self) {
        signal("-STOP", &self.worker());
    }

    pub fn resume(&self) {
        signal("-CONT", &self.worker());
    }

    /// kill -9. Its ports stay reserved.
    pub fn kill(&mut self) {
        let worker = self.worker();
        // The manager first, or it would start another worker.
        self.child.kill().expect("our child");
        self.child.wait().expect("our child");
        signal("-KILL", &worker);
        if self.namespace.is_some() {
            // No other process can take its port.
            let is_there = |pid: &u32| Path::new("/proc").join(pid.to_string()).exists();
            return eventually("the worker is gone", || (!worker.iter().any(is_there)).then_some(()));
        }
        // The worker is not our child: its port shows that it is gone.
        self.held = vec![eventually("the worker is gone", || try_hold(self.address).ok())];
        // Of the manager, which is gone. One that never was ready had none.
        self.held.extend(Some(self.management).filter(|address| address.port() != 0).and_then(|at| try_hold(at).ok()));
    }

    /// Starts it again on the same ports, with an empty cache.
    pub fn restart(&mut self) {
        self.child = spawn(
            self.namespace.as_deref(),
            &self.folder,
            &self.vcl,
            (self.address, self.listens),
            (self.management, self.storage),
        );
        self.ready();
        self.held.clear();
    }

    /// The worker process: the child of the manager.
    pub fn worker(&self) -> Vec<u32> {
        let tasks = format!("/proc/{0}/task/{0}/children", self.child.id());
        let children = std::fs::read_to_string(tasks).unwrap_or_default();
        children.split_whitespace().map(|pid| pid.parse().expect("a pid")).collect()
    }
}

impl Drop for Varnish {
    fn drop(&mut self) {
        if self.child.try_wait().ok().flatten().is_none() {
            self.kill();
        }
    }
}

/// A program in a namespace, or in ours.
fn within(namespace: Option<&str>, program: &str) -> Command {
    match namespace {
        None => Command::new(program),
        Some(namespace) => {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", namespace, program]);
            command
        }
    }
}

fn spawn(
    namespace: Option<&str>,
    folder: &Path,
    vcl: &Path,
    (address, listens): (SocketAddr, Listens),
    (management, storage): (SocketAddr, &str),
) -> Child {
    let mut command = within(namespace, "varnishd");
    let protocol = if listens == Listens::Proxy { "PROXY" } else { "HTTP" };
    command.args(["-F", "-j", "none", "-T", &management.to_string(), "-s", storage]);
    command.arg("-a").arg(format!("{address},{protocol}"));
    command.args(["-p", "http_resp_hdr_len=64k", "-p", "http_resp_size=96k", "-p", "workspace_backend=256k"]);
    // Two threads of each pool are enough for a test, and start faster than a hundred.
    command.args(["-p", "thread_pool_min=10", "-p", "thread_pools=1"]);
    // A VCL that is compiled without optimisation starts in half the time and leaves the processors to the test.
    command.args(["-p", "cc_command=exec gcc -O0 -pthread -fpic -shared -Wl,-x -o %o %s"]);
    command.arg("-n").arg(folder).arg("-f").arg(vcl);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("varnishd is installed (make test installs it)")
}

fn listen_address(mut varnishadm: Command) -> Option<SocketAddr> {
    let output = varnishadm.args(["-t", "1", "debug.listen_address"]).output().expect("varnishadm");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut words = text.split_whitespace().skip(1);
    let address = SocketAddr::new(words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    (output.status.success() && address.port() != 0).then_some(address)
}

pub fn signal(signal: &str, pids: &[u32]) {
    for pid in pids {
        let status = Command::new("kill").args([signal, &pid.to_string()]).status().expect("kill");
        assert!(status.success() || signal == "-KILL", "kill {signal} {pid}");
    }
}
