//! Whether the node is well, as seen from beside it.
//!
//! The answer decides about the traffic, and about nothing else. A node that has not been well yet is not registered:
//! nobody knows it, so nobody waits for it. One that was well and is not any more stays registered and says `drain`: it
//! gets no new requests, but purges still reach it. Had its key been deleted instead, a Varnish that stalls for some
//! seconds would leave the fleet with all its pages and come back as one that has missed every purge in between.
//!
//! clearcoat checks nodes itself; what can be seen from outside is better left to it. This check is for what only the
//! node's own host can tell, and for the first moment: that there is something at the address at all.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use http::Uri;
use http_body_util::Full;
use tokio::net::TcpStream;

use crate::http_client::HttpConnection;

/// The check, and how often it is made.
#[derive(Clone, Debug)]
pub struct CheckSettings {
    /// A page to ask for. Without one, the node is well when it takes a connection at its address.
    pub page: Option<CheckUrl>,
    /// Status codes that pass.
    pub expect: Vec<u16>,
    /// Time between two checks.
    pub interval: Duration,
    /// Time after which a check has failed.
    pub timeout: Duration,
    /// Passes in a row that bring the node up.
    pub rise: u32,
    /// Failures in a row that take it out of the traffic.
    pub fall: u32,
}

/// `http://HOST:PORT/PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckUrl(Uri);

impl FromStr for CheckUrl {
    type Err = &'static str;

    fn from_str(url: &str) -> Result<Self, Self::Err> {
        const WANTED: &str = "wanted http://HOST:PORT/PATH; the check is made on this host, without TLS";
        let uri: Uri = url.parse().map_err(|_| WANTED)?;
        let has_host = uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
        if uri.scheme_str() == Some("http") && has_host { Ok(CheckUrl(uri)) } else { Err(WANTED) }
    }
}

impl fmt::Display for CheckUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a check has failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CheckFailure {
    #[error("no answer within {0:?}")]
    NoAnswer(Duration),
    #[error("connecting to {0} failed")]
    Connect(String, #[source] std::io::Error),
    #[error("{0}")]
    Http(CheckUrl, #[source] hyper::Error),
    #[error("the check cannot be written as a request")]
    Request(#[from] http::Error),
    #[error("{0} answered {1}")]
    Status(CheckUrl, u16),
}

impl CheckSettings {
    /// Checks once. `address` is the node's own.
    pub(super) async fn ask(&self, address: &str) -> Result<(), CheckFailure> {
        let asked = async {
            match &self.page {
                Some(page) => self.judge(page, get(page).await?),
                None => connect(address).await.map(drop),
            }
        };
        tokio::time::timeout(self.timeout, asked).await.unwrap_or(Err(CheckFailure::NoAnswer(self.timeout)))
    }

    fn judge(&self, page: &CheckUrl, status: u16) -> Result<(), CheckFailure> {
        if self.expect.contains(&status) { Ok(()) } else { Err(CheckFailure::Status(page.clone(), status)) }
    }
}

async fn connect(address: &str) -> Result<TcpStream, CheckFailure> {
    TcpStream::connect(address).await.map_err(|error| CheckFailure::Connect(address.to_owned(), error))
}

/// The status of a page.
async fn get(page: &CheckUrl) -> Result<u16, CheckFailure> {
    let uri = &page.0;
    let host = uri.host().unwrap_or_default();
    let stream = connect(&format!("{host}:{}", uri.port_u16().unwrap_or(80))).await?;
    let http = |error| CheckFailure::Http(page.clone(), error);
    let mut connection = HttpConnection::over(stream).await.map_err(http)?;
    let request = http::Request::builder()
        .uri(uri.path_and_query().map_or("/", |path| path.as_str()))
        .header(http::header::HOST, uri.authority().map_or("", |authority| authority.as_str()))
        .header(http::header::USER_AGENT, concat!("clearcoat-agent/", env!("CARGO_PKG_VERSION")))
        .header(http::header::CONNECTION, "close")
        .body(Full::default())?;
    Ok(connection.send(request).await.map_err(http)?.status().as_u16())
}

/// Counts the results of checks.
#[derive(Debug)]
pub(super) struct Tally {
    rise: u32,
    fall: u32,
    /// Checks in a row that say something else than `up`.
    against: u32,
    up: bool,
    was_up: bool,
}

impl Tally {
    pub(super) fn new(check: &CheckSettings) -> Self {
        Tally { rise: check.rise, fall: check.fall, against: 0, up: false, was_up: false }
    }

    /// Counts one more; returns whether the node is up.
    pub(super) fn count(&mut self, passed: bool) -> bool {
        self.against = if passed == self.up { 0 } else { self.against + 1 };
        if self.against >= if self.up { self.fall } else { self.rise } {
            (self.up, self.against) = (passed, 0);
        }
        self.was_up |= self.up;
        self.up
    }

    /// Whether the node has been up at all.
    pub(super) fn has_been_up(&self) -> bool {
        self.was_up
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(rise: u32, fall: u32) -> CheckSettings {
        let second = Duration::from_secs(1);
        CheckSettings { page: None, expect: vec![200, 204], interval: second, timeout: second, rise, fall }
    }

    fn follow(rise: u32, fall: u32, checks: &str) -> String {
        let mut tally = Tally::new(&check(rise, fall));
        checks.chars().map(|c| if tally.count(c == '+') { 'U' } else { 'd' }).collect()
    }

    #[test]
    fn a_node_goes_up_and_down_after_as_many_checks_in_a_row_as_it_is_told() {
        assert_eq!(follow(1, 3, "--+--+---+"), "ddUUUUUUdU");
        assert_eq!(follow(2, 1, "+-++-+"), "dddUdd");
    }

    #[test]
    fn a_node_that_was_up_once_is_remembered() {
        let mut tally = Tally::new(&check(1, 1));
        tally.count(false);
        assert!(!tally.has_been_up());
        tally.count(true);
        tally.count(false);
        assert!(tally.has_been_up());
    }

    #[test]
    fn a_page_is_judged_by_its_status() {
        let page: CheckUrl = "http://127.0.0.1/health_check.php".parse().unwrap();
        assert!(check(1, 1).judge(&page, 204).is_ok());
        let failed = check(1, 1).judge(&page, 302).unwrap_err().to_string();
        assert_eq!(failed, "http://127.0.0.1/health_check.php answered 302");
    }

    #[test]
    fn a_page_is_a_url_without_tls_and_without_a_user() {
        for bad in ["", "/health", "127.0.0.1:80", "https://127.0.0.1/", "http://u@127.0.0.1/", "http:///x"] {
            assert!(bad.parse::<CheckUrl>().is_err(), "{bad}");
        }
    }
}
