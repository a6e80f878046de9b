//! Version 2: a block of 16 bytes that says how many follow (section 2.2).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{BadHeader, ConnectionSource, MAX_HEADER, ParsedHeader};

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family, length.
const FIXED: usize = 16;

const VERSION: u8 = 2;
const LOCAL: u8 = 0;
const PROXY: u8 = 1;

const UNSPEC: u8 = 0x00;
const TCP_IPV4: u8 = 0x11;
const TCP_IPV6: u8 = 0x21;
const UNIX_STREAM: u8 = 0x31;

/// Two addresses and two ports, in bytes.
const IPV4_LEN: usize = 12;
const IPV6_LEN: usize = 36;
/// Two paths, in bytes.
const UNIX_LEN: usize = 216;

pub(super) fn parse(bytes: &[u8]) -> Result<ParsedHeader, BadHeader> {
    let come = bytes.len().min(SIGNATURE.len());
    if bytes[..come] != SIGNATURE[..come] {
        return Err(BadHeader::Signature);
    }
    let Some(&command) = bytes.get(12) else { return Ok(ParsedHeader::Incomplete) };
    let local = match (command >> 4, command & 0xf) {
        (VERSION, LOCAL) => true,
        (VERSION, PROXY) => false,
        (VERSION, _) => return Err(BadHeader::Command),
        _ => return Err(BadHeader::Version),
    };
    let Some(&family) = bytes.get(13) else { return Ok(ParsedHeader::Incomplete) };
    let addresses = match family {
        // "Discard the protocol block including the family which is ignored."
        _ if local => 0,
        UNSPEC => 0,
        TCP_IPV4 => IPV4_LEN,
        TCP_IPV6 => IPV6_LEN,
        UNIX_STREAM => UNIX_LEN,
        _ => return Err(BadHeader::Family),
    };
    let Some(&high) = bytes.get(14) else { return Ok(ParsedHeader::Incomplete) };
    // The high byte alone can be too much, and is then refused alone.
    let low = bytes.get(15);
    let announced = usize::from(u16::from_be_bytes([high, low.copied().unwrap_or(0)]));
    let len = FIXED + announced;
    if len > MAX_HEADER {
        return Err(BadHeader::TooLong);
    }
    if low.is_none() {
        return Ok(ParsedHeader::Incomplete);
    }
    if announced < addresses {
        return Err(BadHeader::AddressesCut);
    }
    let Some(block) = bytes.get(FIXED..len) else { return Ok(ParsedHeader::Incomplete) };
    let source = if local { ConnectionSource::Local } else { source(family, block)? };
    Ok(ParsedHeader::Complete { len, source })
}

/// The client in an address block.
fn source(family: u8, block: &[u8]) -> Result<ConnectionSource, BadHeader> {
    let client = match family {
        TCP_IPV4 => address::<4>(block).map(|(ip, port)| (Ipv4Addr::from(ip), port).into()),
        TCP_IPV6 => address::<16>(block).map(|(ip, port)| (Ipv6Addr::from(ip), port).into()),
        _ => return Ok(ConnectionSource::Local),
    };
    client.map(ConnectionSource::Proxied).ok_or(BadHeader::AddressesCut)
}

/// The first of two addresses of `N` bytes, and the first of the two ports behind them.
fn address<const N: usize>(block: &[u8]) -> Option<([u8; N], u16)> {
    let ip = block.first_chunk()?;
    let port = block.get(2 * N..)?.first_chunk()?;
    Some((*ip, u16::from_be_bytes(*port)))
}

/// Appends the header of a connection that is made for `client`, who had connected to `server`.
///
/// An IPv4 client of a socket for both families has a mapped address there (RFC 4291 section 2.5.5.2). It is written as
/// IPv4: an ACL of Varnish compares families first, and would not know it. The format has one family for both addresses.
/// Where they differ, both are written as IPv6, the IPv4 one mapped. Scopes and flow labels of IPv6 have no place in it.
pub fn write_v2(out: &mut Vec<u8>, client: SocketAddr, server: SocketAddr) {
    match (client.ip().to_canonical(), server.ip().to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            start(out, PROXY, TCP_IPV4, IPV4_LEN as u8);
            out.extend(from.octets());
            out.extend(to.octets());
        }
        (from, to) => {
            start(out, PROXY, TCP_IPV6, IPV6_LEN as u8);
            out.extend(as_ipv6(from).octets());
            out.extend(as_ipv6(to).octets());
        }
    }
    out.extend(client.port().to_be_bytes());
    out.extend(server.port().to_be_bytes());
}

/// Appends the header of a connection that is our own, such as a health check: the receiver uses the addresses of the
/// socket.
pub fn write_v2_local(out: &mut Vec<u8>) {
    start(out, LOCAL, UNSPEC, 0);
}

fn start(out: &mut Vec<u8>, command: u8, family: u8, len: u8) {
    out.extend(SIGNATURE);
    out.extend([VERSION << 4 | command, family, 0, len]);
}

fn as_ipv6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}
