//! `clearcoat purge`: Magento's own request, from a shell or a deploy script.
//!
//! It writes the very bytes that Magento's client writes, chunked in the same way, so that it can stand in for
//! Magento anywhere: in front of clearcoat, of a single Varnish, or of a test. The difference is that it reads the
//! answer and fails if the answer is no.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::ArgGroup;
use http::{HeaderValue, Request, Response, Uri, header};
use http_body_util::Full;
use hyper::body::Bytes;
use serde::Deserialize;

use super::http::Endpoint;
use super::printable;
use crate::config::Token;
use crate::purge::{is_literal_tag, to_magento};

/// The longest pattern of one request, in bytes: Magento's own limit.
const MAX_PATTERN: usize = 7680;

/// Longer than the longest `purge.ack_timeout`.
const TIMEOUT: Duration = Duration::from_secs(70);

/// In bytes. A longer answer is not from clearcoat.
const MAX_ANSWER: usize = 1 << 20;

/// Purge pages from every Varnish, as Magento does
#[derive(Debug, clap::Args)]
#[command(
    group(ArgGroup::new("what").required(true).args(["tag", "pattern", "pool", "url", "all"])),
    after_help = "Examples:\n  \
        clearcoat purge --tag cat_p_42 --tag cat_c_3\n  \
        clearcoat purge --url https://shop.example/sale.html\n  \
        clearcoat purge --all --soft"
)]
pub(super) struct PurgeCommand {
    /// The purge listener
    #[arg(long, value_name = "URL", env = "CLEARCOAT_ENDPOINT", default_value = "http://127.0.0.1:6081")]
    endpoint: Endpoint,
    /// Pages that carry this tag; may be repeated
    #[arg(long, value_name = "TAG", value_parser = literal_tag)]
    tag: Vec<String>,
    /// Pages whose tags match this regular expression
    #[arg(long, value_name = "RE", value_parser = header_value)]
    pattern: Option<HeaderValue>,
    /// Pages of the pools that match this regular expression
    #[arg(long, value_name = "POOL", value_parser = header_value)]
    pool: Option<HeaderValue>,
    /// One page
    #[arg(long, value_name = "URL", value_parser = page)]
    url: Option<Uri>,
    /// Every page; with --soft, every page with tags
    #[arg(long)]
    all: bool,
    /// Keep the pages as stale copies, for grace
    #[arg(long)]
    soft: bool,
    /// A file with the bearer token that the listener wants
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Print the answers as they came, one JSON object a line
    #[arg(long)]
    json: bool,
}

impl PurgeCommand {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        self.run_to(&mut std::io::stdout()).await
    }

    /// Sends the requests one after the other, ends with the first that fails, and writes a line for each answer.
    async fn run_to(&self, out: &mut impl Write) -> anyhow::Result<()> {
        let requests = self.requests()?;
        let send_all = async {
            for request in requests {
                let answer = self.endpoint.send(request, MAX_ANSWER).await?;
                writeln!(out, "{}", self.line(&answer)?)?;
            }
            Ok(())
        };
        let seconds = TIMEOUT.as_secs();
        tokio::time::timeout(TIMEOUT, send_all)
            .await
            .with_context(|| format!("{} has not answered within {seconds} s", self.endpoint))?
    }

    /// The requests to send: more than one only if the tags do not fit into one pattern.
    fn requests(&self) -> anyhow::Result<Vec<Request<Full<Bytes>>>> {
        let read = |file: &PathBuf| Token::read(file).with_context(|| file.display().to_string());
        let token = self.token_file.as_ref().map(read).transpose()?;
        let tags_header = |pattern| Some(("x-magento-tags-pattern", pattern));
        let headers = if let Some(pattern) = &self.pattern {
            vec![tags_header(pattern.clone())]
        } else if let Some(pool) = &self.pool {
            vec![Some(("x-pool", pool.clone()))]
        } else if self.all {
            return Ok(vec![self.request(self.everything(), token.as_ref())?]);
        } else if self.url.is_some() {
            vec![None]
        } else {
            let patterns = patterns(&self.tag)
                .into_iter()
                .map(|pattern| HeaderValue::from_bytes(pattern.as_bytes()).map(tags_header));
            patterns.collect::<Result<_, _>>()?
        };
        headers.into_iter().map(|header| self.request(header.as_slice(), token.as_ref())).collect()
    }

    /// The headers that mean "everything". A listener that does not know the last one drops the pages that the others
    /// name. There is no soft purge of everything, so with `--soft` it is Magento's flush.
    fn everything(&self) -> &'static [(&'static str, HeaderValue)] {
        static PARTS: [(&str, HeaderValue); 3] = [
            ("x-magento-tags-pattern", HeaderValue::from_static(".*")),
            ("x-pool", HeaderValue::from_static(".*")),
            ("x-clearcoat-flush", HeaderValue::from_static("all")),
        ];
        if self.soft { &PARTS[..1] } else { &PARTS }
    }

    fn request(
        &self,
        headers: &[(&'static str, HeaderValue)],
        token: Option<&Token>,
    ) -> anyhow::Result<Request<Full<Bytes>>> {
        let page = self.url.as_ref().and_then(|url| Some((url.path_and_query()?.as_str(), url.authority()?.as_str())));
        let (target, host) = page.unwrap_or(("/", self.endpoint.authority()));
        let mut request = Request::builder().method("PURGE").uri(target);
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        if self.soft {
            request = request.header("x-magento-purge-soft", "1");
        }
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.reveal()));
        }
        Ok(request.header(header::HOST, host).body(Full::default())?)
    }

    /// The line to print for an answer, or the error.
    fn line(&self, response: &Response<Bytes>) -> anyhow::Result<String> {
        let body = String::from_utf8_lossy(response.body());
        if !response.status().is_success() {
            let reason =
                serde_json::from_str(&body).map_or_else(|_| body.into_owned(), |refusal: RefusedAnswer| refusal.error);
            bail!("{} answered {}: {}", self.endpoint, response.status(), printable(reason.trim()));
        }
        let answer: AcceptedAnswer = serde_json::from_str(&body).map_err(|_| {
            anyhow!(
                "the answer of {} is not clearcoat's; is that its purge listener (purge.listen, port 6081)?",
                self.endpoint
            )
        })?;
        Ok(printable(&if self.json { body.trim().to_owned() } else { answer.to_string() }))
    }
}

/// The answer to a purge that was carried out.
#[derive(Debug, Deserialize)]
struct AcceptedAnswer {
    position: u64,
    applied: Vec<String>,
    /// Missing in the answers of versions without seals.
    #[serde(default)]
    pending: Vec<String>,
    fenced: Vec<String>,
}

impl std::fmt::Display for AcceptedAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "purged at position {}: ", self.position)?;
        let applied = ("applied by ", &self.applied);
        let pending = ("no reader gets what is older; to be sent to ", &self.pending);
        let fenced = ("fenced: ", &self.fenced);
        let parts: Vec<String> = [applied, pending, fenced]
            .into_iter()
            .filter(|(_, nodes)| !nodes.is_empty())
            .map(|(what, nodes)| format!("{what}{}", nodes.join(", ")))
            .collect();
        match (parts.is_empty(), self.applied.is_empty() && self.pending.is_empty()) {
            (true, _) => f.write_str("no Varnish is there")?,
            (false, true) => f.write_str("applied by none; ")?,
            (false, false) => {}
        }
        f.write_str(&parts.join("; "))
    }
}

/// The answer to a purge that was not carried out.
#[derive(Debug, Deserialize)]
struct RefusedAnswer {
    error: String,
}

/// Joins the tags into Magento's patterns, each filled up to [`MAX_PATTERN`] bytes.
fn patterns(tags: &[String]) -> Vec<String> {
    let mut patterns: Vec<String> = Vec::new();
    for tag in tags {
        let term = to_magento([tag.as_str()]);
        match patterns.last_mut() {
            Some(pattern) if pattern.len() + 1 + term.len() <= MAX_PATTERN => {
                pattern.push('|');
                pattern.push_str(&term);
            }
            _ => patterns.push(term),
        }
    }
    patterns
}

fn literal_tag(tag: &str) -> Result<String, &'static str> {
    if tag.contains(',') {
        return Err("a comma separates tags: repeat --tag for each of them");
    }
    if !is_literal_tag(tag) {
        return Err("a tag is literal: no control characters and none of \\ ^ $ . | ? * + ( ) [ ] { }; \
                    use --pattern for a regular expression");
    }
    Ok(tag.to_owned())
}

fn header_value(text: &str) -> Result<HeaderValue, &'static str> {
    if text.is_empty() {
        return Err("it is empty; use --all for every page");
    }
    HeaderValue::from_bytes(text.as_bytes()).map_err(|_| "control characters cannot stand in a header")
}

fn page(url: &str) -> Result<Uri, &'static str> {
    const WANTED: &str = "wanted http://HOST/PATH or https://HOST/PATH";
    let uri: Uri = url.parse().map_err(|_| WANTED)?;
    let has_host = uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    if has_host && matches!(uri.scheme_str(), Some("http" | "https")) { Ok(uri) } else { Err(WANTED) }
}

#[cfg(test)]
mod tests;
