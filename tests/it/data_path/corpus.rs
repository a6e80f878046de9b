//! The strict corpus: bytes that a client or a node may send, one case per file, each with its verdict. No hostile case
//! passes.
//!
//! The cases are files and not code, so that HTTP experts without Rust can read, question and add cases
//! (`tests/corpus/README.md`). Every case runs against the real program, at both listeners, and twice: written at once
//! and byte by byte, since an incremental parser can reach a different verdict. Some cases are valid and only look odd:
//! without them a proxy that refuses everything would pass.

mod answers;
mod case;
mod requests;

use std::io;
use std::net::{Shutdown, SocketAddr};

use crate::data_path::corpus::case::Case;
use crate::data_path::rig::Rig;
use crate::support::client::{Connection, Ending};
use crate::support::eventually;
use crate::support::upstream::Upstream;

/// How bytes are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writes {
    AtOnce,
    ByteByByte,
}

impl Writes {
    const ALL: [Writes; 2] = [Writes::AtOnce, Writes::ByteByByte];

    fn each(self, bytes: &[u8], write: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        bytes.chunks(if self == Writes::AtOnce { bytes.len().max(1) } else { 1 }).try_for_each(write)
    }
}

/// An untrusted address, so that both listeners forward the same fields.
const STRANGER: [u8; 4] = [127, 0, 0, 9];

fn connect(address: SocketAddr) -> Result<Connection, String> {
    Connection::open_from(STRANGER, address).map_err(|error| format!("clearcoat does not accept: {error}"))
}

/// Half-closes a connection. One that has already ended is ignored.
fn half_close(client: &Connection) -> Result<(), String> {
    match client.stream.shutdown(Shutdown::Write) {
        Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(format!("the client cannot end: {error}")),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// The failures, one line for each case, so that a change that breaks many cases shows all of them.
#[derive(Default)]
struct Failures(Vec<String>);

impl Failures {
    fn note(&mut self, case: &Case, listener: &str, writes: Writes, result: Result<(), String>) {
        if let Err(error) = result {
            self.0.push(format!("{} ({}) at the {listener}, {writes:?}: {error}", case.name, case.verdict()));
        }
    }

    fn assert_none(self) {
        assert!(self.0.is_empty(), "{} failures:\n{}", self.0.len(), self.0.join("\n"));
    }
}

/// One answer received by a client.
#[derive(Debug)]
struct Message {
    status: u16,
    /// Includes the blank line.
    head: Vec<u8>,
    /// Without its framing.
    body: Vec<u8>,
}

impl Message {
    fn field(&self, name: &str) -> Option<String> {
        let head = String::from_utf8_lossy(&self.head).into_owned();
        let mut fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
        fields.find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim().to_owned())
    }
}

/// Splits all bytes of a connection into answers, as a trusting client does.
///
/// `to_head` says for each final answer whether its request was HEAD, so that it has no body; further ones are assumed
/// not to be.
///
/// # Errors
/// If the last answer is incomplete.
fn messages(mut bytes: &[u8], ending: &Ending, to_head: &[bool]) -> Result<Vec<Message>, String> {
    let (mut all, mut finals) = (Vec::new(), 0);
    while !bytes.is_empty() {
        let head = take_until(&mut bytes, b"\r\n\r\n").ok_or_else(|| format!("no whole head: {}", shown(bytes)))?;
        let code = head.get(9..12).and_then(|code| std::str::from_utf8(code).ok()).and_then(|code| code.parse().ok());
        let status = code.ok_or_else(|| format!("no status: {}", shown(head)))?;
        let mut message = Message { status, head: head.to_vec(), body: Vec::new() };
        let bodyless = status < 200 || status == 204 || status == 304 || to_head.get(finals) == Some(&true);
        finals += usize::from(status >= 200);
        let length = message.field("Content-Length").map(|length| length.parse::<usize>().expect("a length of ours"));
        message.body = match length {
            _ if bodyless => Vec::new(),
            Some(length) => take(&mut bytes, length).ok_or("a body shorter than its length")?.to_vec(),
            None if message.field("Transfer-Encoding").is_some() => unchunk(&mut bytes)?,
            None if *ending == Ending::Clean => std::mem::take(&mut bytes).to_vec(),
            None => return Err("a body that no clean end ends".into()),
        };
        all.push(message);
    }
    Ok(all)
}

fn unchunk(bytes: &mut &[u8]) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    loop {
        let line = take_until(bytes, b"\r\n").ok_or("a chunked body without its end")?;
        let size =
            std::str::from_utf8(&line[..line.len() - 2]).ok().and_then(|size| usize::from_str_radix(size, 16).ok());
        let size = size.ok_or_else(|| format!("a chunk size of ours: {}", shown(line)))?;
        body.extend(take(bytes, size).ok_or("a chunk without its end")?);
        if take(bytes, 2) != Some(b"\r\n") {
            return Err("no CR LF behind a chunk".into());
        }
        if size == 0 {
            return Ok(body);
        }
    }
}

fn take<'b>(bytes: &mut &'b [u8], length: usize) -> Option<&'b [u8]> {
    let (taken, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(taken)
}

/// Takes the bytes up to and including this mark.
fn take_until<'b>(bytes: &mut &'b [u8], mark: &[u8]) -> Option<&'b [u8]> {
    let at = bytes.windows(mark.len()).position(|window| window == mark)?;
    take(bytes, at + mark.len())
}

/// Bytes for an error message, truncated.
fn shown(bytes: &[u8]) -> String {
    let more = if bytes.len() > 400 { format!("... ({} bytes)", bytes.len()) } else { String::new() };
    format!("\"{}\"{more}", bytes[..bytes.len().min(400)].escape_ascii())
}

/// Sends a valid request on its own connection, and reads to the end of that connection.
fn is_served(address: SocketAddr, path: &str) -> Result<(), String> {
    let mut client = connect(address)?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: shop.test\r\nConnection: close\r\n\r\n");
    client.send(request).map_err(|error| format!("clearcoat does not read the next request: {error}"))?;
    let (bytes, ending) = client.rest();
    match messages(&bytes, &ending, &[false]).as_deref() {
        Ok([answer]) if answer.status == 200 && answer.body == path.as_bytes() => Ok(()),
        _ => Err(format!("the next request is not served: {}", shown(&bytes))),
    }
}

/// Ends clearcoat and waits until its nodes have read all its bytes. Returns each node's heads and number of bytes,
/// without health checks.
fn all_bytes(rig: &mut Rig) -> Vec<(Vec<String>, u64)> {
    rig.clearcoat.kill();
    let of_node = |node: &Upstream| {
        eventually("the node has read everything", || (node.open_connections() == 0).then_some(()));
        let (bytes, calls) = node.all_traffic();
        (calls.into_iter().map(|call| call.head).collect(), bytes)
    };
    rig.varnish.iter().chain(&rig.web).map(of_node).collect()
}
