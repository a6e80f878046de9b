//! The state of the bytes sent to a Varnish: the kernel knows what the other end has acknowledged.
//!
//! It is queried through `sock_diag(7)`, as `ss` does, one socket at a time: some microseconds, no privilege, and it
//! also covers sockets that we have closed. `ioctl(SIOCOUTQ)` and `getsockopt(TCP_INFO)` give the same for an open
//! socket; neither can be called here without unsafe code.
//!
//! A relay between us and the Varnish acknowledges for itself: bytes in the relay are under way without our knowledge.

use std::io::{self, Read};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};

use crate::purge::{SentBytes, SocketPair, Wire};
use crate::telemetry::causes;

/// `linux/netlink.h`, `linux/sock_diag.h`.
const AF_NETLINK: i32 = 16;
const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const HEADER: usize = 16;

/// `linux/inet_diag.h`: the lengths of `inet_diag_req_v2` and `inet_diag_msg`, and the attribute with `tcp_info`.
const REQUEST: usize = 56;
const MESSAGE: usize = 72;
const INET_DIAG_INFO: u16 = 2;
const EVERY_COOKIE: u32 = u32::MAX;

/// `netinet/in.h`, `sys/socket.h`.
const IPPROTO_TCP: u8 = 6;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// The states in which a socket may still hold bytes, as numbered in `net/tcp_states.h`: ESTABLISHED, FIN_WAIT1,
/// CLOSE_WAIT, LAST_ACK, CLOSING. In all others the last byte was acknowledged, or will never arrive.
const HOLDING: [u8; 5] = [1, 4, 8, 9, 11];

/// `errno.h`: no such socket.
const ENOENT: i32 = 2;

/// The timeout of a query. The kernel answers before the request returns.
const PATIENCE: Duration = Duration::from_secs(1);

/// Queries the kernel about sockets.
#[derive(Debug)]
pub struct SocketDiagnosis {
    socket: Mutex<Option<Socket>>,
    sequence: AtomicU32,
    failed: AtomicBool,
}

impl Default for SocketDiagnosis {
    fn default() -> Self {
        SocketDiagnosis::new()
    }
}

impl Wire for SocketDiagnosis {
    fn sent(&self, ends: SocketPair) -> SentBytes {
        let mut socket = self.socket.lock();
        self.ask(&mut socket, ends).unwrap_or_else(|error| {
            if !self.failed.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    error = %causes(&error),
                    "the system does not tell when pages have arrived at a Varnish (sock_diag): \
                     a purge that overtakes a page on a slow link may miss it"
                );
            }
            SentBytes::Unknown
        })
    }
}

impl SocketDiagnosis {
    /// Opens its own socket, if the system allows it: at start, while files are available.
    pub fn new() -> Self {
        let socket = Mutex::new(open().ok());
        SocketDiagnosis { socket, sequence: AtomicU32::new(0), failed: AtomicBool::new(false) }
    }

    /// Queries through the kept socket. It is kept again unless the query fails.
    fn ask(&self, kept: &mut Option<Socket>, ends: SocketPair) -> io::Result<SentBytes> {
        let mut socket = kept.take().map_or_else(open, Ok)?;
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        socket.send(&request(ends, sequence))?;
        let mut bytes = [0; 2048];
        let read = socket.read(&mut bytes)?;
        let sent = parse(&bytes[..read], sequence)?;
        *kept = Some(socket);
        Ok(sent)
    }
}

fn open() -> io::Result<Socket> {
    let socket = Socket::new(Domain::from(AF_NETLINK), Type::DGRAM, Some(Protocol::from(NETLINK_SOCK_DIAG)))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// The request for one socket, in the byte order of this machine except for ports and addresses.
fn request(SocketPair { ours, theirs }: SocketPair, sequence: u32) -> Vec<u8> {
    let family = if ours.is_ipv4() { AF_INET } else { AF_INET6 };
    let mut out = Vec::with_capacity(HEADER + REQUEST);
    out.extend(((HEADER + REQUEST) as u32).to_ne_bytes());
    out.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    out.extend(NLM_F_REQUEST.to_ne_bytes());
    out.extend(sequence.to_ne_bytes());
    out.extend(0_u32.to_ne_bytes()); // the sender, filled in by the kernel
    out.extend([family, IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0]);
    out.extend(u32::MAX.to_ne_bytes()); // in any state
    out.extend(ours.port().to_be_bytes());
    out.extend(theirs.port().to_be_bytes());
    out.extend(address(ours));
    out.extend(address(theirs));
    out.extend(scope(theirs).to_ne_bytes());
    out.extend([EVERY_COOKIE.to_ne_bytes(); 2].concat());
    out
}

/// Sixteen bytes; an IPv4 address uses the first four.
fn address(end: SocketAddr) -> [u8; 16] {
    match end.ip() {
        IpAddr::V4(ip) => {
            let mut bytes = Ipv6Addr::UNSPECIFIED.octets();
            bytes[..4].copy_from_slice(&ip.octets());
            bytes
        }
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// The interface, for link-local addresses.
fn scope(end: SocketAddr) -> u32 {
    match end {
        SocketAddr::V4(_) => 0,
        SocketAddr::V6(end) => end.scope_id(),
    }
}

fn parse(message: &[u8], sequence: u32) -> io::Result<SentBytes> {
    if number::<4>(message, 8).map(u32::from_ne_bytes)? != sequence {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer of sock_diag to another question"));
    }
    if number::<2>(message, 4).map(u16::from_ne_bytes)? == NLMSG_ERROR {
        let errno = number::<4>(message, HEADER).map(i32::from_ne_bytes)?.wrapping_neg();
        return if errno == ENOENT { Ok(SentBytes::Closed) } else { Err(io::Error::from_raw_os_error(errno)) };
    }
    let [state] = number::<1>(message, HEADER + 1)?;
    // `idiag_wqueue`: bytes written but not acknowledged.
    let queued = number::<4>(message, HEADER + 60).map(u32::from_ne_bytes)?;
    if !HOLDING.contains(&state) {
        return Ok(SentBytes::Closed);
    }
    if queued > 0 {
        return Ok(SentBytes::Waiting);
    }
    // `tcpi_last_ack_recv`, in ms. If the kernel leaves it out, 0 is the latest possible time, which is safe.
    let ago = attribute(message, INET_DIAG_INFO).map_or(Ok(0), |info| number::<4>(info, 56).map(u32::from_ne_bytes))?;
    Ok(SentBytes::Arrived(Duration::from_millis(ago.into())))
}

/// The content of the attribute of this kind (`linux/rtnetlink.h`): each attribute begins at a multiple of 4 with its
/// length and kind.
fn attribute(message: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut rest = message.get(HEADER + MESSAGE..)?;
    loop {
        let length = usize::from(number::<2>(rest, 0).map(u16::from_ne_bytes).ok()?);
        let kind = number::<2>(rest, 2).map(u16::from_ne_bytes).ok()?;
        if kind == wanted {
            return rest.get(4..length);
        }
        rest = rest.get(length.next_multiple_of(4).max(4)..)?;
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> io::Result<[u8; N]> {
    let found = bytes.get(at..at + N).and_then(|bytes| bytes.try_into().ok());
    found.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "an answer of sock_diag is too short"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::time::Instant;

    use super::*;

    /// A connection: our end as accepted by its listener, and the other end.
    fn connection(address: &str) -> (TcpStream, TcpStream, SocketPair) {
        let listener = TcpListener::bind(address).unwrap();
        let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (ours, peer) = listener.accept().unwrap();
        let ends = SocketPair { ours: ours.local_addr().unwrap(), theirs: peer };
        (ours, theirs, ends)
    }

    /// Writes more than the other end's kernel buffers, and returns the data.
    fn fill(ours: &mut TcpStream) -> usize {
        ours.set_nonblocking(true).unwrap();
        let mut written = 0;
        while let Ok(more) = ours.write(&[b'x'; 64 * 1024]) {
            written += more;
        }
        written
    }

    fn read(theirs: &mut TcpStream, length: usize) {
        let mut rest = vec![0; length];
        theirs.read_exact(&mut rest).unwrap();
    }

    /// The first answer that is not [`SentBytes::Waiting`].
    fn finally(wire: &SocketDiagnosis, ends: SocketPair) -> SentBytes {
        let began = Instant::now();
        loop {
            match wire.sent(ends) {
                SentBytes::Waiting => assert!(began.elapsed() < Duration::from_secs(20), "it never arrives"),
                other => return other,
            }
        }
    }

    #[test]
    fn bytes_have_arrived_when_the_other_end_has_acknowledged_them() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (wire, (mut ours, mut theirs, ends)) = (SocketDiagnosis::new(), connection(address));
            let written = fill(&mut ours);
            assert_eq!(wire.sent(ends), SentBytes::Waiting);
            read(&mut theirs, written);
            let before = Instant::now();
            let SentBytes::Arrived(ago) = finally(&wire, ends) else { panic!("it is open") };
            assert!(ago <= before.elapsed() + Duration::from_secs(5), "{ago:?}");
        }
    }

    #[test]
    fn an_ipv4_client_of_a_listener_for_both_is_found() {
        let listener = TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut theirs = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (mut ours, peer) = listener.accept().unwrap();
        let ends = SocketPair { ours: ours.local_addr().unwrap(), theirs: peer };
        assert!(ends.ours.is_ipv6());
        let written = fill(&mut ours);
        let wire = SocketDiagnosis::new();
        assert_eq!(wire.sent(ends), SentBytes::Waiting);
        read(&mut theirs, written);
        assert!(matches!(finally(&wire, ends), SentBytes::Arrived(_)));
    }

    #[test]
    fn bytes_of_a_connection_that_we_have_closed_are_still_seen_to_wait() {
        let (wire, (mut ours, mut theirs, ends)) = (SocketDiagnosis::new(), connection("127.0.0.1:0"));
        let written = fill(&mut ours);
        drop(ours);
        assert_eq!(wire.sent(ends), SentBytes::Waiting);
        read(&mut theirs, written);
        assert_eq!(finally(&wire, ends), SentBytes::Closed);
    }

    #[test]
    fn a_connection_that_is_not_there_is_closed_though_its_listener_is() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let nobody = "127.0.0.1:1".parse().unwrap();
        let ends = SocketPair { ours: listener.local_addr().unwrap(), theirs: nobody };
        assert_eq!(SocketDiagnosis::new().sent(ends), SentBytes::Closed);
        drop(listener);
        assert_eq!(SocketDiagnosis::new().sent(ends), SentBytes::Closed);
    }

    #[test]
    fn what_cannot_be_read_is_no_answer() {
        assert!(parse(&[], 0).is_err());
        assert!(parse(&[0; 15], 0).is_err());
        assert!(parse(&[0; 100], 1).is_err(), "to another question");
        let mut denied = vec![0; 36];
        denied[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        denied[HEADER..HEADER + 4].copy_from_slice(&(-13_i32).to_ne_bytes());
        assert_eq!(parse(&denied, 0).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
}
