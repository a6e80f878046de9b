//! A loopback address reserved for one test.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};

/// The port that marks an address as taken. It and all other ports used on such an address are below the kernel's
/// ephemeral range, so that not even a socket bound to all addresses collides by chance.
const CLAIM: u16 = 23_789;

/// An address of 127.64.0.0/10, reserved until this value is dropped.
///
/// etcd cannot listen on port 0 and report its port, nor share a reserved port. On its own address its ports are fixed,
/// and stay free while it is down: other servers listen on 127.0.0.1, and connections within this machine come from
/// there too.
pub struct Loopback {
    ip: Ipv4Addr,
    /// Not connected to. That it is bound shows every other claim, of this process or another, that the address is
    /// taken; and the kernel releases it with the process.
    _claim: TcpListener,
}

impl Loopback {
    /// Takes an address without a listener on these ports.
    pub fn claim(ports: &[u16]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // Where a process begins its search: rarely where another one has been.
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
