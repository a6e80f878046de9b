//! A fleet on free ports, and tools to observe it: gates, raw clients, faults.
//!
//! Everything here ends with its value, even if a test fails: processes are killed, folders removed.

pub mod agent;
pub mod browser;
pub mod clearcoat;
pub mod client;
pub mod clock;
pub mod collector;
pub mod disk;
pub mod dnsmasq;
pub mod etcd;
pub mod fake_kubernetes;
pub mod faults;
pub mod fleet;
pub mod frames;
pub mod http2;
pub mod prometheus;
pub mod reader;
pub mod service_manager;
pub mod simulated;
pub mod slow_link;
pub mod tls;
pub mod upstream;
pub mod varnish;
pub mod web;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

/// How long a gate waits before the test fails. Far longer than anything takes on a busy machine with two cores.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` returns a value.
pub fn eventually<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    eventually_within(PATIENCE, what, condition)
}

/// The same for slow conditions.
pub fn eventually_within<T>(patience: Duration, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(began.elapsed() < patience, "gave up waiting until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Prints a line even if the test passes. (libtest captures only the output of the print macros.)
pub fn say(line: &str) {
    use std::io::Write;
    writeln!(std::io::stderr(), "{line}").expect("stderr");
}

/// A loopback address unused by any other test or process that runs these tests: all its ports are free.
pub fn own_loopback() -> Ipv4Addr {
    static NEXT: AtomicU8 = AtomicU8::new(64);
    let [.., high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, NEXT.fetch_add(1, Ordering::SeqCst), high, low)
}

/// Reserves a port while this socket is open: it is not given out as a free port or as a connection's own, but a
/// listener that reuses addresses can take it. It does not listen itself, so it takes no connections.
pub fn hold(address: SocketAddr) -> Socket {
    try_hold(address).expect("a free port")
}

/// The same if there may still be a listener.
pub fn try_hold(address: SocketAddr) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_port(true)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}
