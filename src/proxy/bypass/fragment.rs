//! The fragments of a page (`<esi:include>`), fetched from the web node that rendered it.
//!
//! A reader takes one slot of the bypass limit of a node, and his fragments are fetched one at a time within it: the
//! page is read to its end first, so a node never works on more than one of his requests. Fragments use the page's
//! connection if it is free again: a page already holds one of the files for connections, and must not wait for a
//! second one that other pages hold. An unavailable fragment is left out, as Varnish does with `onerror="continue"`,
//! and the page continues; Varnish 7.1 would insert the error text.
//!
//! Only the shop itself is asked. Varnish sends every address to its own backend, whatever host it names; here the host
//! has to be that of the page, because the node serves the host that the reader requested.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::super::client::Client;
use super::super::deadline::Phase;
use super::{is_encoded, is_markup};
use crate::files::FilePermit;
use crate::fleet::Node;
use crate::http1::{BadChunk, BadHead, BodyDecoder, HeadLimits, HeadScan, Method, ResponseHead, Scheme};
use crate::upstream::{Openness, UpstreamConnection};

/// The longest fragment, in bytes. Magento's menus are a tenth of it.
const LONGEST: usize = 1 << 20;

/// The deepest nesting of fragments: Varnish's `max_esi_depth`.
pub(in crate::proxy) const DEEPEST: usize = 5;

/// The most fragments of one page, at all depths together, so that a page that includes itself costs a node no more
/// than this.
pub(in crate::proxy) const MOST: usize = 64;

/// The most interim heads that are skipped before the answer.
const MAX_INTERIM: usize = 16;

/// Bytes read at once.
const READ: usize = 16 * 1024;

/// A fetched fragment.
#[derive(Debug)]
pub(in crate::proxy) struct Fragment {
    pub(in crate::proxy) body: Vec<u8>,
    /// It may contain fragments itself.
    pub(in crate::proxy) is_markup: bool,
}

/// Why a fragment is left out.
#[derive(Debug, thiserror::Error)]
pub(in crate::proxy) enum LeftOut {
    #[error("its address is not one of this shop")]
    Foreign,
    #[error("the page has more than {MOST} fragments")]
    TooMany,
    #[error("fragments stand more than {DEEPEST} deep in each other")]
    TooDeep,
    #[error("connecting failed: {0}")]
    Connect(io::Error),
    #[error("no file for a connection")]
    NoFile,
    #[error("no answer: {0}")]
    NoAnswer(io::Error),
    #[error("the answer was cut off: {0}")]
    Cut(io::Error),
    #[error("the head of the answer is refused: {0}")]
    BadHead(BadHead),
    #[error("the body of the answer is refused: {0}")]
    BadBody(BadChunk),
    #[error("the answer was {0}")]
    Status(u16),
    #[error("the answer has an encoding")]
    Encoded,
    #[error("it is longer than {LONGEST} bytes")]
    TooLong,
    #[error("it took too long")]
    Late,
}

/// The request target for an address in a page, if it is one of the shop's own: a path, one relative to `base` (the
/// target of the enclosing page), or a URL with the same `host`. The scheme is ignored: Magento writes `http`, because
/// Varnish knows no other.
pub(in crate::proxy) fn target_of(source: &[u8], host: &[u8], base: &[u8]) -> Option<Vec<u8>> {
    let source = source.split(|&byte| byte == b'#').next().unwrap_or_default();
    if source.starts_with(b"/") {
        return Some(source.to_vec());
    }
    if let Some((scheme, rest)) = Scheme::strip(source) {
        let end = rest.iter().position(|&byte| matches!(byte, b'/' | b'?')).unwrap_or(rest.len());
        let (authority, target) = rest.split_at(end);
        let is_ours = [scheme, Scheme::Http, Scheme::Https].iter().any(|scheme| scheme.is_same_host(authority, host));
        let slash: &[u8] = if target.starts_with(b"/") { b"" } else { b"/" };
        return is_ours.then(|| [slash, target].concat());
    }
    // Any other scheme, and anything that resembles one.
    let path = source.split(|&byte| matches!(byte, b'?' | b'/')).next().unwrap_or_default();
    if path.contains(&b':') {
        return None;
    }
    let page = base.split(|&byte| byte == b'?').next().unwrap_or_default();
    let folder = page.iter().rposition(|&byte| byte == b'/')?;
    Some([&page[..=folder], source].concat())
}

/// The page's connection, with no request in flight.
pub(in crate::proxy) struct OfPage<'p> {
    pub(in crate::proxy) stream: &'p mut TcpStream,
    /// Another request may be sent on it.
    pub(in crate::proxy) is_free: &'p mut bool,
}

/// Sends a request with this head to a node, over the page's connection if `of_page` is given, and reads the answer.
pub(in crate::proxy) async fn fetch(
    client: &Client,
    node: &Node,
    of_page: Option<OfPage<'_>>,
    request: &[u8],
) -> Result<Fragment, LeftOut> {
    client.deadline.enter(Phase::Fragment);
    let fetched = async {
        if let Some(OfPage { stream, is_free }) = of_page {
            // Until the answer is complete.
            *is_free = false;
            match ask(client, stream, request).await {
                // The node closed an idle connection, which it may do at any time.
                Err(LeftOut::NoAnswer(_)) => {}
                asked => {
                    return asked.map(|(fragment, stays)| {
                        *is_free = stays;
                        fragment
                    });
                }
            }
        }
        let pools = &client.worker.pools;
        if let Some(kept) = pools.get(node, None, Openness::AsKnown) {
            match ask_and_keep(client, node, kept, request).await {
                Err(LeftOut::NoAnswer(_)) => {}
                asked => return asked,
            }
        }
        let file = room(client).ok_or(LeftOut::NoFile)?;
        let fresh = pools.connect(node, file).await.map_err(LeftOut::Connect)?;
        ask_and_keep(client, node, fresh, request).await
    };
    client.deadline.limit(fetched).await.unwrap_or(Err(LeftOut::Late))
}

fn room(client: &Client) -> Option<FilePermit> {
    let worker = &client.worker;
    let room = worker.shared.files_of(client.frontend.role).nodes;
    room.try_take(1).or_else(|| {
        worker.close_unused();
        room.take_another()
    })
}

async fn ask_and_keep(
    client: &Client,
    node: &Node,
    mut connection: UpstreamConnection,
    request: &[u8],
) -> Result<Fragment, LeftOut> {
    let (fragment, stays) = ask(client, &mut connection.stream, request).await?;
    if stays {
        client.worker.pools.put(node, connection, None);
    }
    Ok(fragment)
}

/// Sends the request on this connection. Also returns whether the connection may carry another one.
async fn ask(client: &Client, stream: &mut TcpStream, request: &[u8]) -> Result<(Fragment, bool), LeftOut> {
    stream.write_all(request).await.map_err(LeftOut::NoAnswer)?;
    let limits = client.worker.limits().of_answers();
    let (mut input, mut head) = (Vec::new(), ResponseHead::default());
    let len = read_head(stream, &mut input, &mut head, limits).await?;
    if head.status != 200 {
        return Err(LeftOut::Status(head.status));
    }
    if is_encoded(&head) {
        return Err(LeftOut::Encoded);
    }
    let is_markup = is_markup(&head);
    let mut decoder = BodyDecoder::new(head.framing);
    let mut body = Vec::new();
    let mut piece = input.split_off(len);
    let surplus = loop {
        let (content, consumed) = decoder.decode_in_place(&mut piece).map_err(LeftOut::BadBody)?;
        if body.len() + content > LONGEST {
            return Err(LeftOut::TooLong);
        }
        body.extend_from_slice(&piece[..content]);
        if decoder.is_done() {
            break piece.len() - consumed;
        }
        piece.clear();
        if read_some(stream, &mut piece).await.map_err(LeftOut::Cut)? == 0 {
            if !decoder.end() {
                return Err(LeftOut::Cut(io::ErrorKind::UnexpectedEof.into()));
            }
            break 0;
        }
    };
    Ok((Fragment { body, is_markup }, head.keep_alive && surplus == 0))
}

/// Reads up to the end of the final head; returns its length in `input`.
async fn read_head(
    stream: &mut TcpStream,
    input: &mut Vec<u8>,
    head: &mut ResponseHead,
    limits: HeadLimits,
) -> Result<usize, LeftOut> {
    let (mut scan, mut interim) = (HeadScan::default(), 0);
    loop {
        if let Some(len) = head.read(input, Method::Get, &mut scan, limits).map_err(LeftOut::BadHead)? {
            if !head.is_interim() {
                return Ok(len);
            }
            interim += 1;
            if interim > MAX_INTERIM {
                return Err(LeftOut::BadHead(BadHead::Status));
            }
            input.drain(..len);
            scan = HeadScan::default();
            continue;
        }
        let is_first = input.is_empty();
        let failed = |error: io::Error| if is_first { LeftOut::NoAnswer(error) } else { LeftOut::Cut(error) };
        if read_some(stream, input).await.map_err(failed)? == 0 {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

async fn read_some(stream: &mut TcpStream, into: &mut Vec<u8>) -> io::Result<usize> {
    into.reserve(READ);
    stream.read_buf(into).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_shop_itself_is_asked() {
        let target = |source: &str| {
            let target = target_of(source.as_bytes(), b"shop.test", b"/a/b?c=/d");
            target.map(|target| String::from_utf8(target).unwrap())
        };
        for (source, expected) in [
            ("/page_cache/block/esi/", "/page_cache/block/esi/"),
            ("http://shop.test/x?y", "/x?y"),
            ("https://SHOP.test:443/x", "/x"),
            ("https://shop.test:80/x", "/x"),
            ("http://shop.test", "/"),
            ("http://shop.test?q", "/?q"),
            ("x", "/a/x"),
            ("../x?y=http://z", "/a/../x?y=http://z"),
            ("?q", "/a/?q"),
            ("", "/a/"),
            ("//other.test/x", "//other.test/x"),
            ("/x#y", "/x"),
        ] {
            assert_eq!(target(source).as_deref(), Some(expected), "{source}");
        }
        for source in [
            "http://other.test/x",
            "http://shop.test:81/x",
            "http://u@shop.test/x",
            "http://shop.test.other.test/x",
            "http:///x",
            "ftp://shop.test/x",
            "file:/etc/passwd",
            "javascript:x",
        ] {
            assert_eq!(target(source), None, "{source}");
        }
        assert_eq!(target_of(b"http://a:8080/x", b"a:8080", b"/").as_deref(), Some(&b"/x"[..]));
        assert_eq!(target_of(b"x", b"a", b"*"), None);
    }
}
