//! Who sent a request, and how: what the rules of the edge go by.
//!
//! Behind a balancer the peer is the balancer, for everybody: a rule that went by its address would refuse all or none, and a
//! redirect by the scheme of its connection would never end. So what it says of the client counts, if it is trusted, and only
//! then: `X-Forwarded-For` is what anybody may write.
//!
//! # The address
//!
//! Each proxy appends whom it got the request from. Read from the end, the first address that is no trusted proxy's is the
//! client: everything before it was written by the client itself. (nginx does so with `real_ip_recursive`.) A trusted proxy
//! that names nobody speaks for itself, such as a health check: it has no client, and the rules about clients' addresses do
//! not hold for it.
//!
//! # The scheme
//!
//! A trusted proxy that does not say by which scheme its client came may have ended TLS. A redirect that is wrong never ends,
//! and one that is missing can be seen and mended: so that scheme is unknown, and is not redirected.

use std::net::{IpAddr, SocketAddr};

use crate::http1::RequestHead;

/// The scheme that a client used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proxy) enum ClientScheme {
    /// Plain HTTP.
    Http,
    /// TLS.
    Https,
    /// A proxy does not say.
    Unknown,
}

/// Who sent a request, and how.
#[derive(Clone, Copy, Debug)]
pub(in crate::proxy) struct Arrival {
    /// The client; `None` if a trusted proxy sent the request by itself, or does not know for whom.
    pub(in crate::proxy) client: Option<IpAddr>,
    /// The other end of the connection, or who a PROXY header says that it is.
    pub(in crate::proxy) peer: IpAddr,
    /// The scheme of the client.
    pub(in crate::proxy) scheme: ClientScheme,
}

/// The other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(in crate::proxy) struct SendingPeer<'p> {
    /// Its address, or that of a PROXY header.
    pub(in crate::proxy) address: IpAddr,
    /// The address is that of a proxy which did not say whom it forwards.
    pub(in crate::proxy) is_unknown: bool,
    /// What it says of its client is believed.
    pub(in crate::proxy) is_trusted: bool,
    /// It connected with TLS.
    pub(in crate::proxy) is_tls: bool,
    /// A field that says `https`, beside `X-Forwarded-Proto`.
    pub(in crate::proxy) offload_header: Option<&'p str>,
}

impl Arrival {
    /// Of a request from this peer; `is_proxy` knows the addresses of trusted proxies.
    pub(in crate::proxy) fn of(head: &RequestHead, peer: SendingPeer<'_>, is_proxy: impl Fn(IpAddr) -> bool) -> Self {
        let client = match peer {
            SendingPeer { is_unknown: true, .. } => None,
            SendingPeer { is_trusted: true, .. } => forwarded_client(head, is_proxy),
            SendingPeer { address, .. } => Some(address),
        };
        Arrival { client, peer: peer.address, scheme: ClientScheme::of(head, peer) }
    }

    /// The client, or the proxy that has none.
    pub(super) fn address(&self) -> IpAddr {
        self.client.unwrap_or(self.peer)
    }
}

impl ClientScheme {
    /// Of a request from this peer.
    pub(in crate::proxy) fn of(head: &RequestHead, peer: SendingPeer<'_>) -> Self {
        let of_connection = match peer {
            SendingPeer { is_tls: true, .. } => ClientScheme::Https,
            SendingPeer { is_trusted: true, .. } | SendingPeer { is_unknown: true, .. } => ClientScheme::Unknown,
            SendingPeer { .. } => ClientScheme::Http,
        };
        if !peer.is_trusted {
            return of_connection;
        }
        if let Some(said) = head.forwarded_proto() {
            // Of several proxies, the first one saw the client.
            let first = said.split(|&byte| byte == b',').next().unwrap_or_default().trim_ascii();
            let is = |scheme: &str| first.eq_ignore_ascii_case(scheme.as_bytes());
            return if is("https") || is("wss") {
                ClientScheme::Https
            } else if is("http") || is("ws") {
                ClientScheme::Http
            } else {
                ClientScheme::Unknown
            };
        }
        let says_https = |name| head.field(name).is_some_and(|value| value.eq_ignore_ascii_case(b"https"));
        if peer.offload_header.is_some_and(says_https) { ClientScheme::Https } else { of_connection }
    }
}

/// The last address in `X-Forwarded-For` that is no trusted proxy's.
fn forwarded_client(head: &RequestHead, is_proxy: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
    let entries = head.forwarded_for().rev().flat_map(|value| value.rsplit(|&byte| byte == b','));
    for entry in entries {
        // What cannot be read was not written by a proxy of ours; nobody before it is believed either.
        let address = address_in(entry)?;
        if !is_proxy(address) {
            return Some(address);
        }
    }
    None
}

/// An address as proxies write it: some with a port, some in brackets.
fn address_in(entry: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(entry.trim_ascii()).ok()?;
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let address = bare.parse().or_else(|_| text.parse::<SocketAddr>().map(|with_port| with_port.ip()));
    address.ok().map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROXY: [u8; 4] = [10, 0, 0, 1];

    fn head(fields: &str) -> RequestHead {
        let mut head = RequestHead::default();
        head.parse(format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n").as_bytes(), 100).unwrap();
        head
    }

    fn peer(address: [u8; 4], is_trusted: bool, is_tls: bool) -> SendingPeer<'static> {
        SendingPeer {
            address: address.into(),
            is_unknown: false,
            is_trusted,
            is_tls,
            offload_header: Some("SSL-Offloaded"),
        }
    }

    fn client(fields: &str, is_trusted: bool) -> Option<String> {
        let is_proxy = |address: IpAddr| matches!(address, IpAddr::V4(v4) if v4.octets()[0] == 10);
        let arrival = Arrival::of(&head(fields), peer(PROXY, is_trusted, false), is_proxy);
        arrival.client.map(|client| client.to_string())
    }

    #[test]
    fn the_client_is_the_last_address_that_no_trusted_proxy_has() {
        let client = |fields: &str| client(fields, true);
        for (fields, expected) in [
            ("", None),
            ("X-Forwarded-For: 192.0.2.1\r\n", Some("192.0.2.1")),
            // What the client wrote itself comes first.
            ("X-Forwarded-For: 203.0.113.9, 192.0.2.1\r\n", Some("192.0.2.1")),
            ("X-Forwarded-For: 203.0.113.9, 192.0.2.1,10.0.0.2\r\n", Some("192.0.2.1")),
            ("X-Forwarded-For: 203.0.113.9\r\nX-Forwarded-For: 192.0.2.1\r\n", Some("192.0.2.1")),
            ("X-Forwarded-For: 192.0.2.1:4711\r\n", Some("192.0.2.1")),
            ("X-Forwarded-For: [2001:db8::1]:4711\r\n", Some("2001:db8::1")),
            ("X-Forwarded-For: [2001:db8::1]\r\n", Some("2001:db8::1")),
            ("X-Forwarded-For: ::ffff:192.0.2.1\r\n", Some("192.0.2.1")),
            ("X-Forwarded-For: 203.0.113.9, unknown\r\n", None),
            ("X-Forwarded-For: 10.0.0.7\r\n", None),
            ("X-Forwarded-For:\r\n", None),
        ] {
            assert_eq!(client(fields).as_deref(), expected, "{fields}");
        }
    }

    #[test]
    fn a_stranger_is_who_connected_whatever_it_says() {
        assert_eq!(client("X-Forwarded-For: 192.0.2.1\r\n", false).as_deref(), Some("10.0.0.1"));
    }

    #[test]
    fn the_scheme_is_that_of_the_client_as_far_as_a_trusted_proxy_says_it() {
        use ClientScheme::{Http, Https, Unknown};
        let scheme =
            |fields: &str, is_trusted, is_tls| ClientScheme::of(&head(fields), peer(PROXY, is_trusted, is_tls));
        for (fields, is_trusted, is_tls, expected) in [
            ("", false, false, Http),
            ("", false, true, Https),
            ("X-Forwarded-Proto: https\r\n", false, false, Http),
            ("X-Forwarded-Proto: http\r\n", false, true, Https),
            ("X-Forwarded-Proto: HTTPS\r\n", true, false, Https),
            ("X-Forwarded-Proto: https, http\r\n", true, false, Https),
            ("X-Forwarded-Proto: http\r\n", true, false, Http),
            ("X-Forwarded-Proto: http\r\n", true, true, Http),
            ("X-Forwarded-Proto: what\r\n", true, false, Unknown),
            ("ssl-offloaded: https\r\n", true, false, Https),
            ("ssl-offloaded: https\r\n", false, false, Http),
            ("", true, false, Unknown),
            ("", true, true, Https),
        ] {
            assert_eq!(scheme(fields, is_trusted, is_tls), expected, "{fields:?} {is_trusted} {is_tls}");
        }
        let silent = SendingPeer { is_unknown: true, ..peer(PROXY, false, false) };
        assert_eq!(ClientScheme::of(&head(""), silent), Unknown);
        assert_eq!(Arrival::of(&head("X-Forwarded-For: 192.0.2.1\r\n"), silent, |_| true).client, None);
    }
}
