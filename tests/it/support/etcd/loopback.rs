//! An address of this machine that is one test's own.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};

/// Where an address is claimed. It and all ports that are used on such an address lie below those that the kernel gives
/// away by itself, so that not even a socket that listens everywhere is there by chance.
const CLAIM: u16 = 23_789;

/// An address of 127.64.0.0/10, for as long as this value lives.
///
/// etcd cannot listen on port 0 and say where it is, nor share a port that somebody holds for it. On an address of its own
/// its ports are fixed, and stay free while it is down: others listen on 127.0.0.1, and whoever connects from this machine
/// to this machine comes from there too.
pub struct Loopback {
    ip: Ipv4Addr,
    /// Nobody connects to it. That it is bound tells every other claim, of this process or another, that the address is
    /// taken; and the kernel ends it with the process.
    _claim: TcpListener,
}

impl Loopback {
    /// Takes an address where nobody listens on one of these ports.
    pub fn claim(ports: &[u16]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // Where a process begins to look: rarely where another one has been.
        let first = std::process::id() << 7;
        for _ in 0..1_000 {
            let number = first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % (1 << 22);
            let ip = Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 64, 0, 0)) | number);
            let Some(claim) = try_listen(ip, CLAIM) else { continue };
            // An etcd whose test was killed outlives the claim.
            if ports.iter().all(|port| try_listen(ip, *port).is_some()) {
                return Loopback { ip, _claim: claim };
            }
        }
        panic!("no free address in 127.64.0.0/10");
    }

    pub fn ip(&self) -> Ipv4Addr {
        self.ip
    }
}

fn try_listen(ip: Ipv4Addr, port: u16) -> Option<TcpListener> {
    match TcpListener::bind((ip, port)) {
        Ok(listener) => Some(listener),
        Err(error) if error.kind() == ErrorKind::AddrInUse => None,
        Err(error) => panic!("cannot listen on {ip}:{port}: {error}"),
    }
}
