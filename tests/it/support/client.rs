//! HTTP clients that write exactly the given bytes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use super::PATIENCE;

/// An answer as received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    /// The head without the blank line, as text.
    pub head: String,
    /// The body without its framing.
    pub body: Vec<u8>,
    /// The trailer lines, each with its CR LF.
    pub trailers: String,
}

impl Answer {
    /// The value of a header field, names in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut fields = self.head.lines().skip(1).filter_map(|line| line.split_once(':'));
        fields.find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("a text body")
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// `HIT`, `MISS` or `UNCACHEABLE`, as set by our VCL.
    pub fn cache(&self) -> &str {
        self.header("X-Magento-Cache-Debug").unwrap_or("none")
    }
}

/// A connection that is kept between requests.
pub struct Connection {
    pub stream: TcpStream,
    input: Vec<u8>,
}

impl Connection {
    pub fn open(address: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Connection { stream, input: Vec::new() })
    }

    /// From an address of this machine other than 127.0.0.1.
    pub fn open_from(source: [u8; 4], address: SocketAddr) -> std::io::Result<Self> {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((source, 0)).into())?;
        socket.connect_timeout(&address.into(), PATIENCE)?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Connection { stream, input: Vec::new() })
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
        self.stream.write_all(bytes.as_ref())
    }

    /// Reads the head of an answer.
    pub fn head(&mut self) -> std::io::Result<Answer> {
        let end = loop {
            if let Some(at) = self.input.windows(4).position(|window| window == b"\r\n\r\n") {
                break at;
            }
            self.read_more()?;
        };
        let head = String::from_utf8_lossy(&self.input[..end]).into_owned();
        self.input.drain(..end + 4);
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line");
        Ok(Answer { status, head, body: Vec::new(), trailers: String::new() })
    }

    /// Reads one answer. `head_only`: to a HEAD request, whose answer has no body whatever its head says.
    pub fn answer(&mut self, head_only: bool) -> std::io::Result<Answer> {
        let mut answer = self.head()?;
        let status = answer.status;
        if head_only || status < 200 || status == 204 || status == 304 {
            return Ok(answer);
        }
        if let Some(length) = answer.header("Content-Length") {
            let length = length.parse().expect("a length");
            while self.input.len() < length {
                self.read_more()?;
            }
            answer.body = self.input.drain(..length).collect();
        } else if answer.header("Transfer-Encoding").is_some() {
            answer.body = self.chunked_body()?;
            answer.trailers = self.trailers()?;
        } else {
            self.stream.read_to_end(&mut self.input)?;
            answer.body = std::mem::take(&mut self.input);
        }
        Ok(answer)
    }

    /// Reads this many bytes as they come.
    pub fn take(&mut self, length: usize) -> std::io::Result<Vec<u8>> {
        while self.input.len() < length {
            self.read_more()?;
        }
        Ok(self.input.drain(..length).collect())
    }

    /// Reads a line without its end.
    fn line(&mut self) -> std::io::Result<String> {
        loop {
            if let Some(at) = self.input.windows(2).position(|window| window == b"\r\n") {
                let line = String::from_utf8_lossy(&self.input[..at]).into_owned();
                self.input.drain(..at + 2);
                return Ok(line);
            }
            self.read_more()?;
        }
    }

    /// Reads the line with the size of the next chunk.
    fn chunk_size(&mut self) -> std::io::Result<usize> {
        Ok(usize::from_str_radix(&self.line()?, 16).expect("a chunk size"))
    }

    /// Reads up to the chunk of size 0.
    fn chunked_body(&mut self) -> std::io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let size = self.chunk_size()?;
            if size == 0 {
                return Ok(body);
            }
            while self.input.len() < size + 2 {
                self.read_more()?;
            }
            body.extend_from_slice(&self.input[..size]);
            self.input.drain(..size + 2);
        }
    }

    /// Reads the trailers after the chunk of size 0, up to the blank line.
    fn trailers(&mut self) -> std::io::Result<String> {
        let mut trailers = String::new();
        loop {
            match self.line()?.as_str() {
                "" => return Ok(trailers),
                line => trailers += &format!("{line}\r\n"),
            }
        }
    }

    fn read_more(&mut self) -> std::io::Result<()> {
        let mut piece = [0; 16 * 1024];
        let read = loop {
            match self.stream.read(&mut piece) {
                // A process that was stopped and continued, say.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        self.input.extend_from_slice(&piece[..read]);
        Ok(())
    }

    /// Whether the peer closes or resets without sending anything more.
    pub fn is_closed_by_peer(&mut self) -> bool {
        self.input.is_empty()
            && matches!(self.read_more(), Err(error) if !matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut))
    }
}

/// How a peer ended a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// Regularly (FIN, or `close_notify`).
    Clean,
    /// With a reset.
    Reset,
    /// Not at all.
    Open,
}

impl Connection {
    /// The rest of the bytes, and the end.
    pub fn rest(&mut self) -> (Vec<u8>, Ending) {
        let ending = loop {
            match self.read_more() {
                Ok(()) => {}
                Err(error) => break ending(&error),
            }
        };
        (std::mem::take(&mut self.input), ending)
    }

    /// Reads the body that this head announces (with a length or chunked), piece by piece.
    pub fn body_in_pieces(&mut self, head: &Answer, mut take: impl FnMut(&[u8])) -> std::io::Result<()> {
        if let Some(length) = head.header("Content-Length") {
            return self.exactly(length.parse().expect("a length"), take);
        }
        loop {
            let size = self.chunk_size()?;
            self.exactly(size, &mut take)?;
            self.exactly(2, |line_end| assert!(b"\r\n".iter().any(|byte| line_end[0] == *byte), "{line_end:?}"))?;
            if size == 0 {
                return Ok(());
            }
        }
    }

    /// Reads this many bytes, piece by piece.
    pub fn exactly(&mut self, mut length: usize, mut take: impl FnMut(&[u8])) -> std::io::Result<()> {
        while length > 0 {
            if self.input.is_empty() {
                self.read_more()?;
            }
            let piece = length.min(self.input.len());
            take(&self.input[..piece]);
            self.input.drain(..piece);
            length -= piece;
        }
        Ok(())
    }

    /// The next bytes, at least one; empty at an end of any kind.
    pub fn some(&mut self) -> Vec<u8> {
        if self.input.is_empty() && self.read_more().is_err() {
            return Vec::new();
        }
        std::mem::take(&mut self.input)
    }
}

fn ending(error: &std::io::Error) -> Ending {
    use std::io::ErrorKind::{TimedOut, UnexpectedEof, WouldBlock};
    match error.kind() {
        UnexpectedEof => Ending::Clean,
        WouldBlock | TimedOut => Ending::Open,
        _ => Ending::Reset,
    }
}

/// Sends bytes on a new connection and reads one answer.
pub fn exchange(address: SocketAddr, bytes: impl AsRef<[u8]>) -> std::io::Result<Answer> {
    let mut connection = Connection::open(address)?;
    connection.send(bytes)?;
    connection.answer(false)
}

/// A GET on a new connection: of the shop, or of the API of a clearcoat, which is not for the shop's readers.
pub fn get(address: SocketAddr, path: &str) -> std::io::Result<Answer> {
    let host = if path.starts_with("/api/v1/") { "localhost" } else { "shop.test" };
    get_of(address, host, path)
}

/// A GET on a new connection, of this host.
pub fn get_of(address: SocketAddr, host: &str, path: &str) -> std::io::Result<Answer> {
    exchange(address, format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"))
}

/// A purge in Magento's form, on a new connection.
pub fn purge(address: SocketAddr, pattern: &str) -> std::io::Result<Answer> {
    exchange(address, format!("PURGE / HTTP/1.1\r\nX-Magento-Tags-Pattern: {pattern}\r\nHost: 127.0.0.1\r\n\r\n"))
}

/// Magento's pattern for one tag.
pub fn tag(tag: &str) -> String {
    format!("((^|,){tag}(,|$))")
}
