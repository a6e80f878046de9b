//! Hosts and ports in `Host` and in absolute targets.

/// The scheme of an absolute target, which sets the default port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// `http`, port 80.
    Http,
    /// `https`, port 443.
    Https,
}

impl Scheme {
    /// Removes `http://` or `https://` from a target; case is ignored.
    pub fn strip(target: &[u8]) -> Option<(Self, &[u8])> {
        [("http://", Scheme::Http), ("https://", Scheme::Https)].into_iter().find_map(|(start, scheme)| {
            let (found, rest) = target.split_at_checked(start.len())?;
            found.eq_ignore_ascii_case(start.as_bytes()).then_some((scheme, rest))
        })
    }

    fn default_port(self) -> u16 {
        match self {
            Scheme::Http => 80,
            Scheme::Https => 443,
        }
    }

    /// Whether two hosts, with or without ports, are equal for this scheme (RFC 9110 section 4.2.3).
    pub fn is_same_host(self, one: &[u8], other: &[u8]) -> bool {
        let (one, other) = (split_port(one), split_port(other));
        let port = |port: Option<&[u8]>| match port {
            None | Some([]) => Some(self.default_port()),
            Some(digits) => std::str::from_utf8(digits).ok()?.parse().ok(),
        };
        one.0.eq_ignore_ascii_case(other.0) && port(one.1).is_some() && port(one.1) == port(other.1)
    }

    /// The host without a default port.
    pub fn without_default_port(self, authority: &[u8]) -> &[u8] {
        let (name, _) = split_port(authority);
        if self.is_same_host(name, authority) { name } else { authority }
    }
}

/// The host of an authority, without its port and without the dot of the root (RFC 1034 section 3.1), which names may end in.
pub fn bare_host(authority: &[u8]) -> &[u8] {
    let (host, _) = split_port(authority);
    host.strip_suffix(b".").unwrap_or(host)
}

/// Splits host and port. The colons of an IPv6 address are within brackets.
fn split_port(authority: &[u8]) -> (&[u8], Option<&[u8]>) {
    let from = authority.iter().position(|&byte| byte == b']').unwrap_or(0);
    match authority[from..].iter().position(|&byte| byte == b':') {
        Some(colon) => (&authority[..from + colon], Some(&authority[from + colon + 1..])),
        None => (authority, None),
    }
}

/// `uri-host [ ":" port ]` (RFC 3986 section 3.2), without user information, without percent-encoding (no shop needs
/// it, and caches normalise it differently).
pub(super) fn is_host(host: &[u8]) -> bool {
    let name_end = match host.first() {
        Some(b'[') => match host.iter().position(|&byte| byte == b']') {
            Some(end) if end > 1 && host[1..end].iter().all(|&b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.')) => {
                end + 1
            }
            _ => return false,
        },
        _ => {
            let is_in_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(&byte);
            let end = host.iter().position(|&byte| !is_in_name(byte)).unwrap_or(host.len());
            if end == 0 {
                return false;
            }
            end
        }
    };
    match &host[name_end..] {
        [] => true,
        [b':', port @ ..] => is_port(port),
        _ => false,
    }
}

/// Digits up to 65535; RFC 3986 section 3.2.3 allows an empty port.
fn is_port(port: &[u8]) -> bool {
    port.is_empty()
        || (port.iter().all(u8::is_ascii_digit)
            && std::str::from_utf8(port).is_ok_and(|port| port.parse::<u16>().is_ok()))
}
