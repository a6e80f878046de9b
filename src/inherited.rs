//! Listening sockets that were opened before this process, and outlive it: socket activation as systemd does it
//! (`LISTEN_FDS`, sd_listen_fds(3)).
//!
//! # Why this, and no handover from process to process
//!
//! A restart must refuse nobody, and the journal has one writer: a new process can only open it when the old one has closed it, and
//! the old one needs it until its last request has ended, since what passes it must be judged by the purges of its time. So there
//! is a time in which neither accepts. What is needed then is somebody who keeps the sockets: the kernel completes handshakes
//! and holds connections with their first requests in the accept queue, and the next process finds them there.
//!
//! A service manager does exactly that, also if a process crashes or its successor cannot start. The other way, a signal
//! (SIGUSR2) on which a process starts its successor and passes the sockets on, would need the same wait, since it is the journal
//! that both wait for, and ends with nobody holding the sockets if the successor fails. Where no service manager is (containers),
//! there are several clearcoats, and one is restarted after another.
//!
//! # Rules
//!
//! A socket belongs to the listener that has its address in `listen`. One that no listener has is an error: its clients would wait
//! for ever. Addresses without a socket are bound as usual. Whoever drains with such a socket only ceases to accept: what waits in
//! the queue is for the next process.

use std::io;
use std::net::{SocketAddr, TcpListener};

use listenfd::ListenFd;

use crate::telemetry::causes;

/// The sockets that this process was given and that no listener has taken yet.
#[derive(Debug, Default)]
pub struct InheritedSockets(Vec<InheritedSocket>);

#[derive(Debug)]
struct InheritedSocket {
    address: SocketAddr,
    listener: TcpListener,
}

impl InheritedSockets {
    /// The sockets that `LISTEN_FDS` is about, if it is meant for this process. To be called once, before other files are opened.
    ///
    /// # Errors
    /// One that is no listening TCP socket.
    pub fn of_this_process() -> io::Result<Self> {
        let mut given = ListenFd::from_env();
        let sockets = (0..given.len()).map(|index| {
            let named = |error: io::Error| {
                let text = format!("LISTEN_FDS: file {} is no listening TCP socket: {}", 3 + index, causes(&error));
                io::Error::new(error.kind(), text)
            };
            let missing = || io::Error::from(io::ErrorKind::NotFound);
            let listener = given.take_tcp_listener(index).and_then(|found| found.ok_or_else(missing)).map_err(named)?;
            Ok(InheritedSocket { address: listener.local_addr().map_err(named)?, listener })
        });
        sockets.collect::<io::Result<_>>().map(InheritedSockets)
    }

    /// Takes the sockets at this address: several if they share its connections (`SO_REUSEPORT`).
    pub fn take(&mut self, address: SocketAddr) -> Vec<TcpListener> {
        let taken = self.0.extract_if(.., |socket| socket.address == address);
        taken.map(|socket| socket.listener).collect()
    }

    /// The addresses of those that nobody has taken.
    pub fn left(&self) -> Vec<SocketAddr> {
        self.0.iter().map(|socket| socket.address).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_taken_by_its_address_once() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let mut inherited = InheritedSockets(vec![InheritedSocket { address, listener: socket }]);
        assert!(inherited.take(([127, 0, 0, 1], 1).into()).is_empty());
        assert_eq!(inherited.left(), [address]);
        assert_eq!(inherited.take(address).len(), 1);
        assert!(inherited.take(address).is_empty() && inherited.left().is_empty());
    }
}
