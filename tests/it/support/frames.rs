//! HTTP/2 frame by frame, for what no client library would send.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustls::ClientConnection;
use rustls::pki_types::ServerName;

use super::tls::{Client, socket};
use super::{PATIENCE, eventually};

// RFC 9113 section 6.
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// The reason of a `RST_STREAM` or `GOAWAY`.
    pub fn reason(&self) -> u32 {
        let code = if self.kind == GOAWAY { &self.payload[4..8] } else { &self.payload[..4] };
        u32::from_be_bytes(code.try_into().expect("four bytes"))
    }
}

/// A frame on the wire.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: impl AsRef<[u8]>) -> Vec<u8> {
    let payload = payload.as_ref();
    let length = u32::try_from(payload.len()).expect("a length").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A literal field without indexing (RFC 7541 section 6.2.2).
pub fn field(name: &str, value: &str) -> Vec<u8> {
    [&[0][..], &string(name), &string(value)].concat()
}

/// A literal field with indexing (RFC 7541 section 6.2.1); the newest has index 62.
pub fn indexed_field(name: &str, value: &str) -> Vec<u8> {
    [&[0x40][..], &string(name), &string(value)].concat()
}

/// A string without Huffman coding, after its length (RFC 7541 sections 5.1 and 5.2).
fn string(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    if text.len() < 127 {
        out.push(u8::try_from(text.len()).expect("below 127"));
    } else {
        out.push(127);
        let mut rest = text.len() - 127;
        while rest >= 128 {
            out.push(u8::try_from(rest % 128).expect("below 128") | 128);
            rest /= 128;
        }
        out.push(u8::try_from(rest).expect("below 128"));
    }
    out.extend_from_slice(text.as_bytes());
    out
}

/// The pseudo fields of every request.
pub fn request_fields(method: &str, path: &str) -> Vec<u8> {
    [field(":method", method), field(":scheme", "https"), field(":authority", "shop.test"), field(":path", path)]
        .concat()
}

/// A complete GET.
pub fn get_frame(stream: u32, path: &str) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, request_fields("GET", path))
}

/// A connection that writes given frames, and collects the received ones.
pub struct Frames {
    tls: ClientConnection,
    socket: TcpStream,
    input: Vec<u8>,
    /// The frames received so far.
    pub received: Vec<Frame>,
    ended: bool,
}

impl Frames {
    /// Opens a connection, with these settings (RFC 9113 section 6.5.2).
    pub fn open(address: SocketAddr, settings: &[(u16, u32)]) -> Self {
        let name = ServerName::try_from("shop.test").expect("a server name");
        let config = Client::of(&rustls::version::TLS13, &[b"h2"]).config();
        let mut tls = ClientConnection::new(config, name).expect("a client");
        let mut socket = socket(address);
        while tls.is_handshaking() {
            tls.complete_io(&mut socket).expect("a handshake");
        }
        socket.set_nonblocking(true).expect("a socket option");
        let mut this = Frames { tls, socket, input: Vec::new(), received: Vec::new(), ended: false };
        let payload: Vec<u8> =
            settings.iter().flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()).collect();
        let opened = this.send([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(SETTINGS, 0, 0, payload)].concat());
        assert!(opened, "the connection ended at once");
        this
    }

    /// Sends all bytes and reads meanwhile, so that neither side waits for the other. False if the server ended the
    /// connection, or did not read for too long.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        let mut rest = bytes.as_ref();
        let mut moved = Instant::now();
        while !self.ended && (!rest.is_empty() || self.tls.wants_write()) {
            let taken = self.tls.writer().write(rest).expect("memory");
            rest = &rest[taken..];
            if self.turn() || taken > 0 {
                moved = Instant::now();
            } else if moved.elapsed() > PATIENCE {
                return false;
            } else {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        !self.ended
    }

    /// Sends as much as the server takes, without reading. Returns the number of bytes.
    pub fn send_blindly(&mut self, bytes: &[u8], while_: Duration) -> usize {
        let (mut rest, began) = (bytes, Instant::now());
        while began.elapsed() < while_ && !rest.is_empty() {
            let taken = self.tls.writer().write(rest).expect("memory");
            rest = &rest[taken..];
            match self.tls.write_tls(&mut self.socket) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(1)),
                Err(_) => break,
            }
        }
        bytes.len() - rest.len()
    }

    /// Writes and reads what is possible without waiting; returns whether anything was.
    fn turn(&mut self) -> bool {
        let mut moved = false;
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.socket) {
                Ok(_) => moved = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.read_turn();
                    self.ended = true;
                    return true;
                }
            }
        }
        self.read_turn() || moved
    }

    fn read_turn(&mut self) -> bool {
        let mut moved = false;
        loop {
            match self.tls.read_tls(&mut self.socket) {
                Ok(0) => self.ended = true,
                Ok(_) => moved = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.ended = true,
            }
            let state = self.tls.process_new_packets();
            let Ok(state) = state else {
                self.ended = true;
                break;
            };
            let mut piece = vec![0; state.plaintext_bytes_to_read()];
            self.tls.reader().read_exact(&mut piece).expect("what is there");
            self.input.extend_from_slice(&piece);
            if self.ended {
                break;
            }
        }
        self.cut_frames();
        moved || self.ended
    }

    fn cut_frames(&mut self) {
        let mut at = 0;
        while let Some(head) = self.input.get(at..at + 9) {
            let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            let Some(payload) = self.input.get(at + 9..at + 9 + length) else { break };
            let stream = u32::from_be_bytes([head[5] & 127, head[6], head[7], head[8]]);
            self.received.push(Frame { kind: head[3], flags: head[4], stream, payload: payload.to_vec() });
            at += 9 + length;
        }
        self.input.drain(..at);
    }

    /// Reads until one of the received frames is wanted. `None` if the connection ends first.
    pub fn wait_for(&mut self, what: &str, wanted: impl Fn(&Frame) -> bool) -> Option<Frame> {
        eventually(what, || {
            self.turn();
            let found = self.received.iter().find(|frame| wanted(frame)).cloned();
            if found.is_none() && self.ended { Some(None) } else { found.map(Some) }
        })
    }

    /// Whether the server answers a PING, and so has read everything before it.
    pub fn answers_ping(&mut self, payload: u64) -> bool {
        let payload = payload.to_be_bytes();
        self.send(frame(PING, 0, 0, payload))
            && self
                .wait_for("the PING is answered", |frame| {
                    frame.kind == PING && frame.flags == 1 && frame.payload == payload
                })
                .is_some()
    }

    /// Reads to the end of the connection. Returns the reason of a `GOAWAY`, if one came.
    pub fn ended(&mut self, what: &str) -> Option<u32> {
        eventually(what, || {
            self.turn();
            self.ended.then_some(())
        });
        self.received.iter().rfind(|frame| frame.kind == GOAWAY).map(Frame::reason)
    }
}
