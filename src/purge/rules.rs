//! What the purge listener accepts, above all which methods.
//!
//! Most VCLs know `PURGE` and `BAN`; others have their own words (`PURGEKEYS`, `URIBAN`, `REFRESH`), which only the
//! configuration can name. A method that a shop uses must never be one of them: it would be refused at the edge, and
//! repeated to every Varnish at the purge listener.

/// The methods of RFC 9110, RFC 5789 (`PATCH`), RFC 9113 (`PRI`) and the `QUERY` draft: they ask for pages.
const ORDINARY: [&str; 11] =
    ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE", "PRI", "QUERY"];

/// The longest method, in bytes.
const LONGEST: usize = 32;

/// What the purge listener accepts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PurgeRules {
    /// The methods that purge, as they are written on the wire.
    pub methods: Vec<String>,
    /// Header fields, in lower case, that the configuration sets for each node: a sender's values for them are
    /// credentials and dropped.
    pub withheld: Vec<String>,
    /// Varnish's limits for a forwarded request.
    pub limits: RequestLimits,
}

impl Default for PurgeRules {
    /// What every version has accepted: `PURGE` and `BAN`.
    fn default() -> Self {
        PurgeRules {
            methods: vec!["PURGE".to_owned(), "BAN".to_owned()],
            withheld: Vec::new(),
            limits: RequestLimits::default(),
        }
    }
}

impl PurgeRules {
    /// Whether this method purges. Methods are case-sensitive (RFC 9110 section 9.1).
    pub(super) fn accepts(&self, method: &str) -> bool {
        self.methods.iter().any(|accepted| accepted == method)
    }

    /// Whether a sender's field with this name, in lower case, is dropped.
    pub(super) fn withholds(&self, field: &str) -> bool {
        self.withheld.iter().any(|withheld| withheld == field)
    }
}

/// The largest request that a Varnish takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestLimits {
    /// Bytes of a line, the first one too (`http_req_hdr_len`).
    pub line: usize,
    /// Bytes of the head (`http_req_size`).
    pub head: usize,
    /// Header fields (`http_max_hdr`, less the six places of the first line and some for what VCL adds).
    pub fields: usize,
}

impl Default for RequestLimits {
    /// Varnish's defaults, from 4.1 to 8.0.
    fn default() -> Self {
        RequestLimits { line: 8 * 1024, head: 32 * 1024, fields: 48 }
    }
}

/// Whether a method may be one that purges: a token (RFC 9110 section 5.6.2) of at most 32 bytes that asks for no page.
/// Case does not count: a VCL or a web server may compare methods in any.
pub fn may_purge(method: &str) -> bool {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    (1..=LONGEST).contains(&method.len())
        && method.bytes().all(is_token)
        && !ORDINARY.iter().any(|ordinary| ordinary.eq_ignore_ascii_case(method))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_that_asks_for_pages_never_purges() {
        for good in ["PURGE", "BAN", "PURGEKEYS", "URIBAN", "REFRESH", "XKEY", "M-PURGE", "purge"] {
            assert!(may_purge(good), "{good}");
        }
        for bad in ["", "GET", "get", "Head", "POST", "PRI", "A B", "A\r\nB", "PÜRGE", "A:", "A/B", &"X".repeat(33)] {
            assert!(!may_purge(bad), "{bad:?}");
        }
    }
}
