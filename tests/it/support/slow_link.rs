//! A slow, lossy link: a network namespace behind a tunnel whose packets pass through this process.
//!
//! The kernel's own emulation (`tc netem`) is not in every kernel; TUN devices are. `socat` turns the packets of each
//! of two into datagrams, and a relay here delays them, drops some, or holds them. So both ends are real TCP, with real
//! retransmissions, and each knows what the other end has acknowledged: a relay of connections would acknowledge data
//! itself.
//!
//! It needs root. Leftovers of a killed test are removed by the next one.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::eventually;

/// The prefix of namespaces, before the id of the process that made them.
const PREFIX: &str = "clearcoat-test-";

/// The quality of a link.
#[derive(Clone, Copy, Debug)]
pub struct Quality {
    /// Latency in one direction.
    pub delay: Duration,
    /// One packet in this many is lost.
    pub one_lost_in: u32,
    pub seed: u64,
}

/// A link to a namespace, removed when this value is dropped.
pub struct SlowLink {
    /// The name of the namespace.
    pub namespace: String,
    /// Our end.
    pub near: Ipv4Addr,
    /// The end in the namespace.
    pub far: Ipv4Addr,
    /// Packets that were dropped.
    pub lost: Arc<AtomicU64>,
    /// The port whose packets to the namespace are held; 0 for none.
    held: Arc<AtomicU16>,
    /// The amount held, in bytes.
    held_bytes: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    relays: Vec<JoinHandle<()>>,
    ends: Vec<Child>,
    _folder: tempfile::TempDir,
}

/// Holds the packets of one port, until this value is dropped.
pub struct Held(Arc<AtomicU16>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.store(0, Ordering::SeqCst);
    }
}

/// Whether this process may make one. If not, it prints that, and the test is skipped.
pub fn is_possible() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        super::say("skipped: a slow link needs root");
    }
    is_root
}

impl SlowLink {
    pub fn start(quality: Quality) -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(0);
        remove_leftovers();
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let namespace = format!("{PREFIX}{}-{number}", std::process::id());
        ip(&["netns", "add", &namespace]);
        ip(&["-n", &namespace, "link", "set", "lo", "up"]);
        // A network of four addresses that no other test process uses.
        let [_, _, high, low] = (std::process::id() << 2).to_be_bytes();
        let [near, far] = [1, 2].map(|end| Ipv4Addr::new(10, 192 + number % 64, high, low + end));
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let sockets = [path("near"), path("far")].map(|path| UnixDatagram::bind(path).expect("a socket"));
        let device = format!("cc{}-{number}", std::process::id());
        let inside = ["ip", "netns", "exec", &namespace];
        let ends = [(near, "near", &[][..]), (far, "far", &inside[..])]
            .map(|(address, name, within)| end(within, &device, address, folder.path(), name));
        let mut this = SlowLink {
            namespace,
            near,
            far,
            lost: Arc::default(),
            held: Arc::default(),
            held_bytes: Arc::default(),
            stop: Arc::default(),
            relays: Vec::new(),
            ends: ends.into(),
            _folder: folder,
        };
        let folder = this._folder.path();
        eventually("both ends are there", || {
            ["near", "far"].iter().all(|name| folder.join(format!("{name}.tun")).exists()).then_some(())
        });
        let [near, far] = sockets;
        for (from, to, name, is_inbound) in [(&near, &far, "far", true), (&far, &near, "near", false)] {
            let seed = quality.seed.wrapping_add(u64::from(is_inbound));
            let relay = Relay {
                from: from.try_clone().expect("a socket"),
                to: to.try_clone().expect("a socket"),
                address: folder.join(format!("{name}.tun")),
                quality: Quality { seed, ..quality },
                lost: Arc::clone(&this.lost),
                held: is_inbound.then(|| (Arc::clone(&this.held), Arc::clone(&this.held_bytes))),
                queue: Mutex::default(),
                came: Condvar::new(),
                stop: Arc::clone(&this.stop),
            };
            let relay = Arc::new(relay);
            let sender = Arc::clone(&relay);
            this.relays.push(std::thread::spawn(move || relay.take()));
            this.relays.push(std::thread::spawn(move || sender.send()));
        }
        this
    }

    /// Holds this local port's packets until the returned value is dropped; all others pass.
    pub fn hold(&self, port: u16) -> Held {
        self.held.store(port, Ordering::SeqCst);
        Held(Arc::clone(&self.held))
    }

    /// The amount held, in bytes of packets.
    pub fn held_bytes(&self) -> u64 {
        self.held_bytes.load(Ordering::SeqCst)
    }

    /// The corresponding address at our end.
    pub fn near(&self, of: SocketAddr) -> SocketAddr {
        SocketAddr::from((self.near, of.port()))
    }
}

impl Drop for SlowLink {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for relay in self.relays.drain(..) {
            assert!(relay.join().is_ok() || std::thread::panicking(), "a relay panicked");
        }
        for end in &mut self.ends {
            // An error means that it has ended already.
            _ = end.kill();
            _ = end.wait();
        }
        remove(&self.namespace);
    }
}

/// One direction. One thread receives packets and another sends them, so that the tunnel's end never waits for us while
/// we wait for it.
struct Relay {
    from: UnixDatagram,
    to: UnixDatagram,
    address: std::path::PathBuf,
    quality: Quality,
    lost: Arc<AtomicU64>,
    /// The held port and the held bytes, for the direction in which packets can be held.
    held: Option<(Arc<AtomicU16>, Arc<AtomicU64>)>,
    queue: Mutex<Queue>,
    came: Condvar,
    stop: Arc<AtomicBool>,
}

/// The packets on their way.
#[derive(Default)]
struct Queue {
    waiting: VecDeque<(Instant, Vec<u8>)>,
    kept: Vec<Vec<u8>>,
}

impl Relay {
    /// The longest wait before it checks whether to continue.
    const TURN: Duration = Duration::from_millis(20);

    fn take(&self) {
        let mut random = Rng::with_seed(self.quality.seed);
        let mut packet = vec![0; 64 * 1024];
        self.from.set_read_timeout(Some(Self::TURN)).expect("a socket option");
        while !self.stop.load(Ordering::SeqCst) {
            let Ok(length) = self.from.recv(&mut packet) else { continue };
            let packet = &packet[..length];
            if self.quality.one_lost_in > 0 && random.u32(..self.quality.one_lost_in) == 0 {
                self.lost.fetch_add(1, Ordering::SeqCst);
                continue;
            }
            let mut queue = self.queue.lock().unwrap();
            let held = self.held_port();
            if held != 0 && source_port(packet) == Some(held) {
                queue.kept.push(packet.to_vec());
                self.count_held(&queue);
            } else {
                queue.waiting.push_back((Instant::now() + self.quality.delay, packet.to_vec()));
                self.came.notify_one();
            }
        }
    }

    fn send(&self) {
        self.to.set_write_timeout(Some(Self::TURN * 50)).expect("a socket option");
        let mut queue = self.queue.lock().unwrap();
        while !self.stop.load(Ordering::SeqCst) {
            if self.held_port() == 0 && !queue.kept.is_empty() {
                let due = Instant::now() + self.quality.delay;
                let kept = std::mem::take(&mut queue.kept);
                queue.waiting.extend(kept.into_iter().map(|packet| (due, packet)));
                self.count_held(&queue);
            }
            let pause =
                queue.waiting.front().map_or(Self::TURN, |(due, _)| due.saturating_duration_since(Instant::now()));
            if !pause.is_zero() {
                queue = self.came.wait_timeout(queue, pause.min(Self::TURN)).unwrap().0;
                continue;
            }
            if let Some((_, packet)) = queue.waiting.pop_front() {
                drop(queue);
                // The other end goes first when a test ends.
                _ = self.to.send_to(&packet, &self.address);
                queue = self.queue.lock().unwrap();
            }
        }
    }

    fn held_port(&self) -> u16 {
        self.held.as_ref().map_or(0, |(port, _)| port.load(Ordering::SeqCst))
    }

    fn count_held(&self, queue: &Queue) {
        if let Some((_, bytes)) = &self.held {
            bytes.store(queue.kept.iter().map(|packet| packet.len() as u64).sum(), Ordering::SeqCst);
        }
    }
}

/// The port of TCP over IPv4, the only traffic on the link.
fn source_port(packet: &[u8]) -> Option<u16> {
    let header = usize::from(packet.first()? & 0x0f) * 4;
    Some(u16::from_be_bytes([*packet.get(header)?, *packet.get(header + 1)?]))
}

/// Starts one end of the tunnel: packets from the device go to the socket `name`, and datagrams to `name.tun` go to the
/// device.
fn end(within: &[&str], device: &str, address: Ipv4Addr, folder: &Path, name: &str) -> Child {
    // It must not outlive the test, however that ends.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).args(within).arg("socat");
    command.arg(format!("TUN:{address}/30,tun-name={device},iff-no-pi,iff-up"));
    let path = |suffix| folder.join(format!("{name}{suffix}")).display().to_string();
    command.arg(format!("UNIX-SENDTO:{},bind={}", path(""), path(".tun")));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("socat is installed (make test installs it)")
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().expect("iproute2 is installed (make test installs it)");
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Kills the processes in a namespace, and removes it.
fn remove(namespace: &str) {
    let inside = Command::new("ip").args(["netns", "pids", namespace]).output().expect("ip");
    for pid in String::from_utf8_lossy(&inside.stdout).split_whitespace() {
        _ = Command::new("kill").args(["-KILL", pid]).status();
    }
    _ = Command::new("ip").args(["netns", "del", namespace]).status();
}

/// Removes those of test processes that have ended.
fn remove_leftovers() {
    static ONCE: Mutex<bool> = Mutex::new(false);
    let mut done = ONCE.lock().unwrap();
    if std::mem::replace(&mut done, true) {
        return;
    }
    let listed = Command::new("ip").args(["netns", "list"]).output().expect("ip");
    for namespace in String::from_utf8_lossy(&listed.stdout).lines().filter_map(|line| line.split_whitespace().next()) {
        let Some(pid) = namespace.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()) else { continue };
        if !Path::new("/proc").join(pid).exists() {
            remove(namespace);
        }
    }
}
