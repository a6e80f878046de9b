//! The PROXY protocol: who the client is, told by the proxy in front of us, and by us to the Varnish behind us.
//!
//! The format is HAProxy's (`doc/proxy-protocol.txt` in its sources; the section numbers here are those of that text).
//! Version 1 is a line of text, version 2 is binary. Both are read; only version 2 is written, because Varnish, nginx
//! and HAProxy all take it and it needs no formatting.
//!
//! Whoever may write this header chooses its client address, and with it what an ACL allows. So the reading is strict:
//! a header is complete, or it can still become complete, or it is refused at the first byte that no valid header has
//! there. Nothing is guessed, and a connection without a header is refused too (section 2: "MUST not try to guess").
//! That the sender is trusted is for the caller to check, before it reads.
//!
//! TLVs of version 2 are stepped over without a look: nothing here depends on them. That goes for the CRC32C as well;
//! TCP has its own checksum, and the trust is in the sender, not in the bytes.

mod binary;
mod text;

use std::net::SocketAddr;

pub use binary::{write_v2, write_v2_local};

/// The longest header that is read, in bytes, of either version.
///
/// A header without TLVs takes at most 232 bytes, one with the TLVs of a cloud balancer or of a TLS terminator a few
/// hundred. Version 2 could announce 65,551, and until they have all come a connection costs a buffer. nginx stops at
/// the same 4,096 (`NGX_PROXY_PROTOCOL_MAX_HEADER`).
pub const MAX_HEADER: usize = 4096;

/// What stands at the beginning of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParsedHeader {
    /// The bytes so far begin a valid header, and more are needed.
    Incomplete,
    /// The header is there.
    Complete {
        /// Its bytes. What follows them is the connection's own.
        len: usize,
        /// Whom the connection is from.
        source: ConnectionSource,
    },
}

/// Whom a connection is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionSource {
    /// The sender itself (its health check), or somebody without an address that it could tell. The addresses of the
    /// socket hold.
    Local,
    /// This client. The address is as it was written: an IPv4 client may be an IPv4-mapped IPv6 address, as it may be
    /// on a socket.
    Proxied(SocketAddr),
}

/// Why a header is refused. The connection is to be closed without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// The bytes begin neither version.
    #[error("the connection does not begin with a PROXY protocol header")]
    Signature,
    /// Version 1: not one of the three words.
    #[error("the protocol is not TCP4, TCP6 or UNKNOWN")]
    Protocol,
    /// Version 1: not an address, or one of the other family.
    #[error("an address is malformed or not of the family that is named")]
    Address,
    /// Version 1: not a decimal number up to 65535 without leading zeros.
    #[error("a port is malformed")]
    Port,
    /// Version 1: more fields than there should be, a line feed alone or a carriage return alone.
    #[error("the line does not end with CR LF behind its last field")]
    LineEnd,
    /// Version 1: no end within 107 bytes (section 2.1).
    #[error("the line is longer than 107 bytes")]
    LineTooLong,
    /// The binary signature, but not version 2.
    #[error("the version is not 2")]
    Version,
    /// Version 2: neither LOCAL nor PROXY.
    #[error("the command is neither LOCAL nor PROXY")]
    Command,
    /// Version 2: datagrams cannot come through a TCP connection, and other values are reserved (section 2.2).
    #[error("the address family and transport are not TCP over IPv4 or IPv6, a Unix stream or unspecified")]
    Family,
    /// Version 2: the announced length is less than the addresses of the family take.
    #[error("the addresses are cut short")]
    AddressesCut,
    /// Version 2: longer than [`MAX_HEADER`].
    #[error("the header is longer than 4096 bytes")]
    TooLong,
}

/// Reads the header at the beginning of a connection. To be called with all bytes since the beginning whenever some
/// came, until it is complete or refused; it never asks for more than [`MAX_HEADER`].
///
/// # Errors
/// [`BadHeader`], as soon as the bytes can no longer become a valid header.
pub fn parse(bytes: &[u8]) -> Result<ParsedHeader, BadHeader> {
    match bytes.first() {
        None => Ok(ParsedHeader::Incomplete),
        Some(b'P') => text::parse(bytes),
        Some(b'\r') => binary::parse(bytes),
        Some(_) => Err(BadHeader::Signature),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

    fn complete(bytes: &[u8]) -> (usize, ConnectionSource) {
        match parse(bytes) {
            Ok(ParsedHeader::Complete { len, source }) => (len, source),
            other => panic!("{}: {other:?}", bytes.escape_ascii()),
        }
    }

    /// A version 2 header with this command, family and announced length, and as many bytes.
    fn v2(command: u8, family: u8, announced: u16) -> Vec<u8> {
        let mut bytes = [V2, &[command, family], &announced.to_be_bytes()].concat();
        bytes.resize(16 + usize::from(announced), b'x');
        bytes
    }

    fn proxied(text: &str) -> ConnectionSource {
        ConnectionSource::Proxied(text.parse().unwrap())
    }

    #[test]
    fn the_lines_of_the_specification_are_read() {
        let longest = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
        let line = format!("PROXY UNKNOWN {longest} {longest} 65535 65535\r\n");
        assert_eq!(complete(line.as_bytes()), (107, ConnectionSource::Local));
        let line = format!("PROXY TCP6 {longest} {longest} 65535 65535\r\n");
        assert_eq!(complete(line.as_bytes()), (104, proxied(&format!("[{longest}]:65535"))));
        let line = b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n";
        assert_eq!(complete(line), (56, proxied("255.255.255.255:65535")));
        assert_eq!(complete(b"PROXY UNKNOWN\r\n"), (15, ConnectionSource::Local));
        let request = b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\nGET / HTTP/1.1\r\nHost: 192.168.0.11\r\n\r\n";
        assert_eq!(complete(request), (47, proxied("192.168.0.1:56324")));
    }

    #[test]
    fn ipv6_is_read_in_every_form_that_senders_write() {
        for (address, canonical) in [
            ("::", "::"),
            ("::1", "::1"),
            ("2001:DB8::aB", "2001:db8::ab"),
            ("1:2:3:4:5:6:7::", "1:2:3:4:5:6:7:0"),
            ("::ffff:192.0.2.1", "::ffff:192.0.2.1"),
            ("1:2:3:4:5:6:192.0.2.1", "1:2:3:4:5:6:c000:201"),
        ] {
            let line = format!("PROXY TCP6 {address} ::1 0 443\r\n");
            assert_eq!(complete(line.as_bytes()).1, proxied(&format!("[{canonical}]:0")), "{address}");
        }
    }

    #[test]
    fn the_blocks_of_the_specification_are_read() {
        let ipv4 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\xc0\xa8\x00\x01\xc0\xa8\x00\x0b\xdc\x04\x01\xbbGET /";
        assert_eq!(complete(ipv4), (28, proxied("192.168.0.1:56324")));
        let mut ipv6 = b"\r\n\r\n\0\r\nQUIT\n\x21\x21\x00\x24".to_vec();
        ipv6.extend([0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        ipv6.extend([0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        ipv6.extend([0xdc, 0x04, 0x01, 0xbb]);
        assert_eq!(complete(&ipv6), (52, proxied("[2001:db8::1]:56324")));
    }

    #[test]
    fn what_names_no_tcp_client_is_local() {
        // LOCAL: the family is ignored, whatever it is, and so are the bytes.
        for (family, announced) in [(0x00, 0), (0x00, 5), (0x11, 12), (0x11, 0), (0x12, 3), (0xff, 9)] {
            let header = v2(0x20, family, announced);
            assert_eq!(
                complete(&header),
                (16 + usize::from(announced), ConnectionSource::Local),
                "{family:#x} {announced}"
            );
        }
        assert_eq!(complete(&v2(0x21, 0x00, 7)), (23, ConnectionSource::Local));
        assert_eq!(complete(&v2(0x21, 0x31, 216)), (232, ConnectionSource::Local));
    }

    #[test]
    fn tlvs_are_stepped_over() {
        let mut header = v2(0x21, 0x11, 12 + 7);
        header[16..28].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2, 0x1f, 0x90, 0, 80]);
        header[28..].copy_from_slice(b"\x03\x00\x04\x00\x00\x00\x00");
        header.extend(b"GET /");
        assert_eq!(complete(&header), (35, proxied("10.0.0.1:8080")));
        let longest = v2(0x21, 0x00, 4080);
        assert_eq!(complete(&longest), (MAX_HEADER, ConnectionSource::Local));
    }

    #[test]
    fn what_is_malformed_is_refused() {
        let too_long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(92));
        let dotted = format!("PROXY TCP6 {0} {0} 65535 65535\r\n", "ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255");
        for (line, verdict) in [
            ("GET / HTTP/1.1\r\n", BadHeader::Signature),
            ("proxy TCP4 1.1.1.1 2.2.2.2 1 2\r\n", BadHeader::Signature),
            ("PROXY\r\n", BadHeader::Signature),
            ("PROXY  TCP4 1.1.1.1 2.2.2.2 1 2\r\n", BadHeader::Protocol),
            ("PROXY \r\n", BadHeader::Protocol),
            ("PROXY TCP\r\n", BadHeader::Protocol),
            ("PROXY UDP4 1.1.1.1 2.2.2.2 1 2\r\n", BadHeader::Protocol),
            ("PROXY UNKNOWNS\r\n", BadHeader::Protocol),
            ("PROXY tcp4 1.1.1.1 2.2.2.2 1 2\r\n", BadHeader::Protocol),
            ("PROXY TCP4\r\n", BadHeader::Address),
            ("PROXY TCP4 \r\n", BadHeader::Address),
            ("PROXY TCP4 1.1.1.1\r\n", BadHeader::Address),
            ("PROXY TCP4  1.1.1.1 2.2.2.2 1 2\r\n", BadHeader::Address),
            ("PROXY TCP4 1.1.1 2.2.2.2 1 2\r\n", BadHeader::Address),
            ("PROXY TCP4 1.1.1.256 2.2.2.2 1 2\r\n", BadHeader::Address),
            ("PROXY TCP4 1.1.1.01 2.2.2.2 1 2\r\n", BadHeader::Address),
            ("PROXY TCP4 1.1.1.1 ::1 1 2\r\n", BadHeader::Address),
            ("PROXY TCP4 ::1 ::1 1 2\r\n", BadHeader::Address),
            ("PROXY TCP6 1.1.1.1 2.2.2.2 1 2\r\n", BadHeader::Address),
            ("PROXY TCP6 1::2::3 ::1 1 2\r\n", BadHeader::Address),
            ("PROXY TCP6 1:2:3:4:5:6:7:8:9 ::1 1 2\r\n", BadHeader::Address),
            ("PROXY TCP6 12345:: ::1 1 2\r\n", BadHeader::Address),
            ("PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n", BadHeader::Address),
            ("PROXY TCP6 [::1] ::1 1 2\r\n", BadHeader::Address),
            ("PROXY TCP4 1.1.1.1 2.2.2.2\r\n", BadHeader::Port),
            ("PROXY TCP4 1.1.1.1 2.2.2.2 1\r\n", BadHeader::Port),
            ("PROXY TCP4 1.1.1.1 2.2.2.2 1 \r\n", BadHeader::Port),
            ("PROXY TCP4 1.1.1.1 2.2.2.2  1 2\r\n", BadHeader::Port),
            ("PROXY TCP4 1.1.1.1 2.2.2.2 01 2\r\n", BadHeader::Port),
            ("PROXY TCP4 1.1.1.1 2.2.2.2 00 2\r\n", BadHeader::Port),
            ("PROXY TCP4 1.1.1.1 2.2.2.2 +1 2\r\n", BadHeader::Port),
            ("PROXY TCP4 1.1.1.1 2.2.2.2 -1 2\r\n", BadHeader::Port),
            ("PROXY TCP4 1.1.1.1 2.2.2.2 65536 2\r\n", BadHeader::Port),
            ("PROXY TCP4 1.1.1.1 2.2.2.2 1 99999\r\n", BadHeader::Port),
            ("PROXY TCP4 1.1.1.1 2.2.2.2 1 0x2\r\n", BadHeader::Port),
            ("PROXY TCP4 1.1.1.1 2.2.2.2 1\t2\r\n", BadHeader::Port),
            ("PROXY TCP4 1.1.1.1 2.2.2.2 1 2 \r\n", BadHeader::LineEnd),
            ("PROXY TCP4 1.1.1.1 2.2.2.2 1 2 3\r\n", BadHeader::LineEnd),
            ("PROXY TCP4 1.1.1.1 2.2.2.2 1 2\n", BadHeader::LineEnd),
            ("PROXY TCP4 1.1.1.1 2.2.2.2 1 2\rGET", BadHeader::LineEnd),
            ("PROXY UNKNOWN\n", BadHeader::LineEnd),
            ("PROXY UNKNOWN a\rb\r\n", BadHeader::LineEnd),
            (&too_long, BadHeader::LineTooLong),
            (&dotted, BadHeader::LineTooLong),
        ] {
            assert_eq!(parse(line.as_bytes()), Err(verdict), "{line:?}");
        }
        for (header, verdict) in [
            (b"\r\n\r\n\0\r\nQUIT\r".to_vec(), BadHeader::Signature),
            (b"\r\nGET / HTTP/1.1".to_vec(), BadHeader::Signature),
            (v2(0x11, 0x11, 12), BadHeader::Version),
            (v2(0x31, 0x11, 12), BadHeader::Version),
            (v2(0x22, 0x11, 12), BadHeader::Command),
            (v2(0x2f, 0x11, 12), BadHeader::Command),
            (v2(0x21, 0x12, 12), BadHeader::Family),
            (v2(0x21, 0x22, 36), BadHeader::Family),
            (v2(0x21, 0x32, 216), BadHeader::Family),
            (v2(0x21, 0x10, 12), BadHeader::Family),
            (v2(0x21, 0x01, 12), BadHeader::Family),
            (v2(0x21, 0x41, 12), BadHeader::Family),
            (v2(0x21, 0x13, 12), BadHeader::Family),
            (v2(0x21, 0x11, 11), BadHeader::AddressesCut),
            (v2(0x21, 0x21, 35), BadHeader::AddressesCut),
            (v2(0x21, 0x31, 215), BadHeader::AddressesCut),
            (v2(0x21, 0x11, 4081), BadHeader::TooLong),
            (v2(0x20, 0x00, u16::MAX), BadHeader::TooLong),
        ] {
            assert_eq!(parse(&header), Err(verdict), "{}", header[..header.len().min(16)].escape_ascii());
        }
    }

    #[test]
    fn the_first_byte_that_cannot_be_is_an_error() {
        for (good, bad) in [
            ("P", "G"),
            ("PROXY ", "PROXY\t"),
            ("PROXY TCP", "PROXY TCP5"),
            ("PROXY TCP4 25", "PROXY TCP4 256"),
            ("PROXY TCP4 0", "PROXY TCP4 00"),
            ("PROXY TCP4 1.2.3.4", "PROXY TCP4 1.2.3.4."),
            ("PROXY TCP4 1.2.3.4", "PROXY TCP4 1.2.3\r"),
            ("PROXY TCP6 ::ffff:1", "PROXY TCP6 ::ffff:1.2.3.256"),
            ("PROXY TCP6 1:2:3:4:5:6:7:", "PROXY TCP6 1:2:3:4:5:6:7:8:"),
            ("PROXY TCP6 ::1", "PROXY TCP6 :1"),
            ("PROXY TCP4 1.1.1.1 2.2.2.2 6553", "PROXY TCP4 1.1.1.1 2.2.2.2 65536"),
            ("PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r", "PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\r"),
        ] {
            assert_eq!(parse(good.as_bytes()), Ok(ParsedHeader::Incomplete), "{good:?}");
            assert!(parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
        // Two of the longest addresses leave no room for the ports.
        let dotted = "ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255";
        let full = format!("PROXY TCP6 {dotted} {dotted}");
        assert_eq!(parse(&full.as_bytes()[..full.len() - 1]), Ok(ParsedHeader::Incomplete));
        assert_eq!(parse(full.as_bytes()), Err(BadHeader::LineTooLong));
        let fits = format!("PROXY UNKNOWN {}", "x".repeat(91));
        assert_eq!(parse(fits.as_bytes()), Ok(ParsedHeader::Incomplete));
        assert_eq!(parse(format!("{fits}x").as_bytes()), Err(BadHeader::LineTooLong));
        let header = v2(0x21, 0x11, 4096);
        assert_eq!(parse(&header[..14]), Ok(ParsedHeader::Incomplete));
        assert_eq!(parse(&header[..15]), Err(BadHeader::TooLong));
    }

    #[test]
    fn a_health_check_is_written_as_local() {
        let mut header = Vec::new();
        write_v2_local(&mut header);
        assert_eq!(header, b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00");
        assert_eq!(complete(&header), (16, ConnectionSource::Local));
    }

    #[test]
    fn addresses_are_written_in_the_order_of_the_specification() {
        let mut header = b"before".to_vec();
        write_v2(&mut header, "192.168.0.1:56324".parse().unwrap(), "192.168.0.11:443".parse().unwrap());
        let ipv4 = b"before\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\xc0\xa8\x00\x01\xc0\xa8\x00\x0b\xdc\x04\x01\xbb";
        assert_eq!(header, ipv4);
        // An IPv4 client of a socket for both families is one all the same.
        header.truncate(6);
        write_v2(&mut header, "[::ffff:192.168.0.1]:56324".parse().unwrap(), "192.168.0.11:443".parse().unwrap());
        assert_eq!(header, ipv4);
        header.clear();
        write_v2(&mut header, "192.0.2.1:256".parse().unwrap(), "[2001:db8::2]:443".parse().unwrap());
        let mut mixed = b"\r\n\r\n\0\r\nQUIT\n\x21\x21\x00\x24".to_vec();
        mixed.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1]);
        mixed.extend([0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        mixed.extend([1, 0, 1, 0xbb]);
        assert_eq!(header, mixed);
    }

    /// Adds bytes, one at a time, that the parser takes, until it says that the header is complete. The bytes that end
    /// a header soonest come first, and every other value after them.
    fn carry_on(bytes: &mut Vec<u8>) -> ConnectionSource {
        loop {
            match parse(bytes).unwrap() {
                ParsedHeader::Complete { len, source } => {
                    assert_eq!(len, bytes.len());
                    return source;
                }
                ParsedHeader::Incomplete => {}
            }
            let candidates = b"\r\n 0:.".iter().copied().chain(0..=255);
            let takes = |candidate: u8| {
                bytes.push(candidate);
                let taken = parse(bytes).is_ok();
                bytes.pop();
                taken.then_some(candidate)
            };
            let next = { candidates }.find_map(takes);
            let stuck = || panic!("incomplete, but no byte may follow: {}", bytes.escape_ascii());
            bytes.push(next.unwrap_or_else(stuck));
        }
    }

    fn any_ipv6() -> impl Strategy<Value = Ipv6Addr> {
        // Runs of zeros and mapped addresses are what the text form treats in its own way.
        let group = prop_oneof![Just(0_u16), any::<u16>()];
        let mapped = any::<Ipv4Addr>().prop_map(|address| address.to_ipv6_mapped());
        prop_oneof![prop::array::uniform8(group).prop_map(Ipv6Addr::from), mapped]
    }

    fn any_address() -> impl Strategy<Value = SocketAddr> {
        let ip = prop_oneof![any::<Ipv4Addr>().prop_map(IpAddr::V4), any_ipv6().prop_map(IpAddr::V6)];
        (ip, any::<u16>()).prop_map(SocketAddr::from)
    }

    fn any_line() -> impl Strategy<Value = (Vec<u8>, ConnectionSource)> {
        let v4 = (any::<[Ipv4Addr; 2]>(), any::<[u16; 2]>()).prop_map(|([client, server], [from, to])| {
            (format!("PROXY TCP4 {client} {server} {from} {to}\r\n"), ConnectionSource::Proxied((client, from).into()))
        });
        let v6 = (any_ipv6(), any_ipv6(), any::<[u16; 2]>()).prop_map(|(client, server, [from, to])| {
            let full = server.segments().map(|group| format!("{group:04X}")).join(":");
            (format!("PROXY TCP6 {client} {full} {from} {to}\r\n"), ConnectionSource::Proxied((client, from).into()))
        });
        let unknown = "( [ -~]{0,91})?".prop_map(|rest| (format!("PROXY UNKNOWN{rest}\r\n"), ConnectionSource::Local));
        prop_oneof![v4, v6, unknown].prop_map(|(line, source)| (line.into_bytes(), source))
    }

    fn any_block() -> impl Strategy<Value = (Vec<u8>, ConnectionSource)> {
        let tlvs = prop::collection::vec(any::<u8>(), 0..80);
        (any_address(), any_address(), any::<bool>(), tlvs).prop_map(|(client, server, local, tlvs)| {
            let mut header = Vec::new();
            if local {
                write_v2_local(&mut header);
            } else {
                write_v2(&mut header, client, server);
            }
            header.extend(&tlvs);
            let announced = u16::try_from(header.len() - 16).unwrap();
            header[14..16].copy_from_slice(&announced.to_be_bytes());
            // IPv4 where both are, however they were written; mapped where the server is not.
            let client = match (client.ip().to_canonical(), server.ip().to_canonical()) {
                (IpAddr::V4(ip), IpAddr::V6(_)) => (ip.to_ipv6_mapped(), client.port()).into(),
                (ip, _) => (ip, client.port()).into(),
            };
            (header, if local { ConnectionSource::Local } else { ConnectionSource::Proxied(client) })
        })
    }

    proptest! {
        #[test]
        fn a_header_is_read_whole_and_every_cut_of_it_is_incomplete(
            (header, source) in prop_oneof![any_line(), any_block()],
            behind in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            for cut in 0..header.len() {
                prop_assert_eq!(parse(&header[..cut]), Ok(ParsedHeader::Incomplete), "{}", header[..cut].escape_ascii());
            }
            let len = header.len();
            let connection = [header, behind].concat();
            prop_assert_eq!(parse(&connection), Ok(ParsedHeader::Complete { len, source }));
        }

        #[test]
        fn what_is_incomplete_can_become_complete(
            (mut header, _) in prop_oneof![any_line(), any_block()],
            place in any::<prop::sample::Index>(),
            byte in prop_oneof![any::<u8>(), prop::sample::select(b"\r\n 0129:.fF".to_vec())],
            cut in any::<prop::sample::Index>(),
        ) {
            let place = place.index(header.len());
            header[place] = byte;
            header.truncate(cut.index(header.len()) + 1);
            if parse(&header) == Ok(ParsedHeader::Incomplete) {
                carry_on(&mut header);
            }
        }

        #[test]
        fn a_verdict_does_not_change_with_what_follows(
            (mut header, _) in prop_oneof![any_line(), any_block()],
            place in any::<prop::sample::Index>(),
            byte in any::<u8>(),
        ) {
            let place = place.index(header.len());
            header[place] = byte;
            let whole = parse(&header);
            for cut in 0..header.len() {
                match parse(&header[..cut]) {
                    Ok(ParsedHeader::Incomplete) => {}
                    verdict => prop_assert_eq!(verdict.is_ok(), whole.is_ok()),
                }
            }
        }

        #[test]
        fn random_bytes_never_panic(
            start in prop::sample::select(vec![&b""[..], b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ", V2]),
            bytes in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let bytes = [start, &bytes].concat();
            if let Ok(ParsedHeader::Complete { len, .. }) = parse(&bytes) {
                prop_assert!(len <= bytes.len() && len <= MAX_HEADER);
            }
        }
    }
}
