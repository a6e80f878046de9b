//! As much of WebSocket (RFC 6455) as an echo needs: the handshake with the values of the RFC's own example (section
//! 1.3), and frames (section 5.2) in one piece.

use std::io;

use crate::support::client::Connection;
use crate::support::upstream::{Call, Then};

/// The handshake of section 1.3.
pub(in crate::data_path) const ASK: &str = "GET /socket HTTP/1.1\r\nHost: shop.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";

/// Its answer.
pub(in crate::data_path) const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
    Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opcode {
    Binary = 2,
    Close = 8,
}

/// A complete message. Clients must mask theirs, servers must not.
pub(super) fn frame(opcode: Opcode, mask: Option<[u8; 4]>, payload: &[u8]) -> Vec<u8> {
    let masked = if mask.is_some() { 0x80 } else { 0 };
    let mut bytes = vec![0x80 | opcode as u8];
    match (u16::try_from(payload.len()), payload.len()) {
        (_, length @ ..126) => bytes.push(masked | length as u8),
        (Ok(length), _) => {
            bytes.push(masked | 126);
            bytes.extend(length.to_be_bytes());
        }
        (Err(_), length) => {
            bytes.push(masked | 127);
            bytes.extend((length as u64).to_be_bytes());
        }
    }
    bytes.extend(mask.iter().flatten());
    let start = bytes.len();
    bytes.extend_from_slice(payload);
    apply(mask, &mut bytes[start..]);
    bytes
}

fn apply(mask: Option<[u8; 4]>, payload: &mut [u8]) {
    if let Some(mask) = mask {
        payload.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
    }
}

/// A reader that hands bytes over in pieces, for fakes and clients.
type Take<'t> = &'t mut dyn FnMut(&[u8]);

pub(super) fn read_frame(mut exactly: impl FnMut(usize, Take<'_>) -> io::Result<()>) -> io::Result<(Opcode, Vec<u8>)> {
    let mut read = |length| {
        let mut bytes = Vec::with_capacity(length);
        exactly(length, &mut |piece| bytes.extend_from_slice(piece))?;
        io::Result::Ok(bytes)
    };
    let start = read(2)?;
    let opcode = match start[0] {
        0x82 => Opcode::Binary,
        0x88 => Opcode::Close,
        other => panic!("a frame that nobody here sends: {other:#x}"),
    };
    let number = |bytes: Vec<u8>| bytes.into_iter().fold(0_usize, |number, byte| number << 8 | usize::from(byte));
    let length = match start[1] & 0x7f {
        126 => number(read(2)?),
        127 => number(read(8)?),
        length => usize::from(length),
    };
    let mask = if start[1] & 0x80 == 0 { None } else { Some(read(4)?.try_into().expect("four bytes")) };
    let mut payload = read(length)?;
    apply(mask, &mut payload);
    Ok((opcode, payload))
}

/// A node that accepts the offer and echoes every message, up to the close.
pub(super) fn echo(call: &mut Call<'_>) -> Then {
    assert_eq!(call.seen.header("Sec-WebSocket-Key"), Some("dGhlIHNhbXBsZSBub25jZQ=="), "{}", call.seen.head);
    if call.send(SWITCH).is_err() {
        return Then::Close;
    }
    loop {
        let Ok((opcode, payload)) = read_frame(|length, take| call.exactly(length, take)) else { return Then::Close };
        if call.send(frame(opcode, None, &payload)).is_err() || opcode == Opcode::Close {
            return Then::Close;
        }
    }
}

/// Performs the WebSocket handshake.
pub(super) fn shake_hands(client: &mut Connection) {
    client.send(ASK).expect("clearcoat reads");
    let head = client.head().expect("an answer");
    let fields = ["Upgrade", "Connection", "Sec-WebSocket-Accept"].map(|name| head.header(name).map(str::to_owned));
    let expected = ["websocket", "upgrade", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="].map(|value| Some(value.to_owned()));
    assert_eq!((head.status, fields), (101, expected), "{head:?}");
    assert_eq!((head.header("Content-Length"), head.header("Transfer-Encoding")), (None, None), "{head:?}");
}
