//! The messages: requests as from browsers, answers as from Magento.

/// The host of every request.
pub(crate) const HOST: &str = "shop.example";

/// The origin's page that returns the head of the request, as received there.
pub(crate) const ECHO: &str = "/echo";

/// The fields of a browser's navigation request, without Host: with it they are twelve.
const BROWSER: &[(&str, &str)] = &[
    (
        "User-Agent",
        "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/128.0.0.0 Safari/537.36",
    ),
    ("Accept", "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"),
    ("Accept-Language", "de-DE,de;q=0.9,en-US;q=0.8,en;q=0.7"),
    ("Accept-Encoding", "gzip, deflate, br, zstd"),
    ("Referer", "https://shop.example/women/tops-women/jackets-women.html?product_list_order=price"),
    (
        "Cookie",
        "PHPSESSID=0m5s2k9c3v7q8r1t4u6w; form_key=Zk3Vw9aQx7LpT2Rn; mage-cache-storage=%7B%7D; mage-cache-sessid=true; \
         private_content_version=5b1f0a3c9d8e7f6a5b4c3d2e1f0a9b8c; X-Magento-Vary=9bf9a599123e6402b85cde67144717a08b817412",
    ),
    ("Upgrade-Insecure-Requests", "1"),
    ("Sec-Fetch-Dest", "document"),
    ("Sec-Fetch-Mode", "navigate"),
    ("Sec-Fetch-Site", "same-origin"),
    ("Priority", "u=0, i"),
];

/// The fields of a Magento page behind Varnish, without Content-Length: with it they are fifteen.
const MAGENTO: &[(&str, &str)] = &[
    ("Date", "Tue, 03 Jun 2025 08:14:05 GMT"),
    ("Content-Type", "text/html; charset=UTF-8"),
    ("Cache-Control", "no-store, no-cache, must-revalidate, max-age=0"),
    ("Pragma", "no-cache"),
    ("Expires", "-1"),
    ("Vary", "Accept-Encoding"),
    ("X-Magento-Cache-Debug", "HIT"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-XSS-Protection", "1; mode=block"),
    ("X-Frame-Options", "SAMEORIGIN"),
    (
        "Content-Security-Policy-Report-Only",
        "font-src fonts.gstatic.com data: 'self'; form-action 'self'; frame-ancestors 'self'; img-src data: 'self'; \
         script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; base-uri 'self'",
    ),
    ("X-UA-Compatible", "IE=edge"),
    ("X-Varnish", "32770 3"),
    ("Age", "117"),
];

/// The fields of an answer of which only the body matters.
const PLAIN: &[(&str, &str)] =
    &[("Date", "Tue, 03 Jun 2025 08:14:05 GMT"), ("Content-Type", "application/octet-stream")];

/// A page of the origin: its path and its complete answers.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) path: &'static str,
    /// For a kept connection.
    pub(crate) kept: Vec<u8>,
    /// For a connection that the client wants closed.
    pub(crate) closing: Vec<u8>,
}

/// A request and its required answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exchange {
    pub(crate) path: &'static str,
    /// Whether the request looks like a browser's, or is minimal.
    pub(crate) rich: bool,
    /// Bytes to post; 0 means a GET.
    pub(crate) upload: usize,
    /// Bytes of the answer's body.
    pub(crate) download: usize,
}

/// The realistic exchange.
pub(crate) const RICH: Exchange = Exchange { path: "/women/jackets.html", rich: true, upload: 0, download: 1024 };
/// One whose only cost is the forwarding itself.
pub(crate) const SMALL: Exchange = Exchange { path: "/1k", rich: false, upload: 0, download: 1024 };
/// A larger page.
pub(crate) const MEDIUM: Exchange = Exchange { path: "/16k", rich: false, upload: 0, download: 16 << 10 };
/// A large body, which is copied or spliced.
pub(crate) const LARGE: Exchange = Exchange { path: "/1m", rich: false, upload: 0, download: 1 << 20 };
/// A request body.
pub(crate) const POST: Exchange = Exchange { path: "/1k", rich: false, upload: 1024, download: 1024 };

impl Exchange {
    /// The request in HTTP/1.1.
    pub(crate) fn request(&self, keep_alive: bool) -> Vec<u8> {
        let method = if self.upload > 0 { "POST" } else { "GET" };
        let mut head = format!("{method} {} HTTP/1.1\r\nHost: {HOST}\r\n", self.path);
        for (name, value) in self.fields() {
            head.extend([name, ": ", value, "\r\n"]);
        }
        if self.upload > 0 {
            head.push_str(&format!("Content-Length: {}\r\n", self.upload));
        }
        if !keep_alive {
            head.push_str("Connection: close\r\n");
        }
        head.push_str("\r\n");
        let mut request = head.into_bytes();
        request.resize(request.len() + self.upload, b'u');
        request
    }

    /// The fields of the request, without those about its framing and connection.
    pub(crate) fn fields(&self) -> &'static [(&'static str, &'static str)] {
        if self.rich { BROWSER } else { &BROWSER[..2] }
    }
}

/// All pages used by the exchanges.
pub(crate) fn pages() -> Vec<Page> {
    let page = |exchange: &Exchange| {
        let fields = if exchange.rich { MAGENTO } else { PLAIN };
        let body = vec![b'd'; exchange.download];
        let answer = |keep_alive| answer("200 OK", fields, &body, keep_alive);
        Page { path: exchange.path, kept: answer(true), closing: answer(false) }
    };
    [RICH, SMALL, MEDIUM, LARGE].iter().map(page).collect()
}

/// A complete HTTP/1.1 answer.
pub(crate) fn answer(status: &str, fields: &[(&str, &str)], body: &[u8], keep_alive: bool) -> Vec<u8> {
    let mut head = format!("HTTP/1.1 {status}\r\n");
    for (name, value) in fields {
        head.extend([name, ": ", value, "\r\n"]);
    }
    if !keep_alive {
        head.push_str("Connection: close\r\n");
    }
    head.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
    let mut answer = head.into_bytes();
    answer.extend_from_slice(body);
    answer
}
