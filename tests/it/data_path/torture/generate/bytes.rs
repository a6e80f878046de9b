//! The bytes of messages: names, values, targets, bodies and their framing.

use fastrand::Rng;

use super::chance;
use crate::data_path::torture::message::{Field, Number};

/// The most chunks of one body with random sizes, and the most bytes of extensions of one chunk.
const CHUNKS: usize = 60;
const EXTENSION: usize = 40;

/// Ordinary names without a meaning for a proxy. Other names begin with Q or Z, like no meaningful one.
const NAMES: [&str; 12] = [
    "Accept",
    "Accept-Encoding",
    "Cache-Control",
    "Content-Type",
    "Cookie",
    "ETag",
    "Link",
    "Range",
    "Set-Cookie",
    "User-Agent",
    "Vary",
    TAGS,
];

const TAGS: &str = "X-Magento-Tags";

/// The finaliser of splitmix64: neighbouring numbers give unrelated ones.
pub fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// A body specific to this exchange and direction: a foreign or missing byte is detected within the next few.
pub fn body_content(random: &mut Rng, seed: u64, number: Number, direction: u64) -> Vec<u8> {
    let size = match random.u8(..100) {
        0..15 => 0,
        15..45 => random.usize(1..=64),
        45..75 => random.usize(65..=4096),
        75..94 => random.usize(4096..=64 * 1024),
        94..99 => random.usize(64 * 1024..=256 * 1024),
        _ => random.usize(256 * 1024..=1024 * 1024),
    };
    let key = mix(seed ^ mix(u64::from(number.conversation) << 32 | u64::from(number.index) << 1 | direction));
    let mut content: Vec<u8> =
        (0..size.div_ceil(8) as u64).flat_map(|word| mix(key.wrapping_add(word)).to_le_bytes()).collect();
    content.truncate(size);
    content
}

/// A valid chunked frame (RFC 9112 section 7.1) in all its variety.
pub fn chunked(random: &mut Rng, content: &[u8]) -> Vec<u8> {
    let mut wire = Vec::with_capacity(content.len() + 1024);
    let mut rest = content;
    let small = chance(random, 30);
    for count in 0.. {
        if rest.is_empty() {
            break;
        }
        let most = match random.u8(..4) {
            _ if count >= CHUNKS => rest.len(),
            0 => 1,
            _ if small => rest.len().min(20),
            1 => rest.len(),
            _ => rest.len().min(2 << random.u32(..=rest.len().ilog2())),
        };
        let size = if count >= CHUNKS { rest.len() } else { random.usize(1..=most) };
        chunk_head(random, &mut wire, size);
        wire.extend_from_slice(&rest[..size]);
        wire.extend_from_slice(b"\r\n");
        rest = &rest[size..];
    }
    chunk_head(random, &mut wire, 0);
    wire.extend_from_slice(b"\r\n");
    wire
}

fn chunk_head(random: &mut Rng, wire: &mut Vec<u8>, size: usize) {
    let zeros = if chance(random, 15) { random.usize(1..=12) } else { 0 };
    wire.resize(wire.len() + zeros, b'0');
    let digits = if random.bool() { format!("{size:x}") } else { format!("{size:X}") };
    wire.extend_from_slice(digits.as_bytes());
    if chance(random, 15) {
        let length = random.usize(1..EXTENSION);
        let value: String = std::iter::repeat_with(|| random.alphanumeric()).take(length).collect();
        let extension = match random.u8(..4) {
            0 => format!(";{value}"),
            1 => format!(" ; {value}=1"),
            2 => format!(";n={value};m"),
            _ => format!(";n=\"{value}; ,=\""),
        };
        wire.extend_from_slice(extension.as_bytes());
    }
    wire.extend_from_slice(b"\r\n");
}

/// In origin form, with every byte that RFC 3986 allows in a path and a query.
pub fn target(random: &mut Rng, number: Number) -> String {
    const BYTES: &[u8] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~!$&'()*+,;=:@/";
    let mut target = format!("/{number}/");
    let length = if chance(random, 3) { random.usize(..2000) } else { random.usize(..40) };
    for _ in 0..length {
        match random.u8(..30) {
            0 => target.push_str(["%20", "%2F", "%00", "%e4", "%C3%A4"][random.usize(..5)]),
            1 => target.push('?'),
            _ => target.push(char::from(BYTES[random.usize(..BYTES.len())])),
        }
    }
    target
}

pub fn host(random: &mut Rng) -> String {
    let hosts = ["shop.test", "Shop.Test:8080", "a", "10.1.2.3", "[::1]:80", "[2001:db8::1]", "a_b.test:", "x-y.z"];
    hosts[random.usize(..hosts.len())].to_owned()
}

/// Fields that are forwarded, or (names with an underscore in a request) are not, of at most `budget` bytes.
pub fn fields(random: &mut Rng, budget: usize, in_answer: bool) -> Vec<Field> {
    let count = match random.u8(..10) {
        0 => random.usize(..=60),
        1..4 => random.usize(..=25),
        _ => random.usize(..=8),
    };
    let mut left = budget;
    let mut fields = Vec::with_capacity(count + 6);
    for _ in 0..count {
        let name = field_name(random);
        let mut value = field_value(random);
        if name.eq_ignore_ascii_case(TAGS) {
            // Several lines of tags are joined, without blanks: values without blanks pass unchanged.
            value.retain(|byte| !matches!(byte, b' ' | b'\t'));
            if fields.iter().any(|field: &Field| field.name.eq_ignore_ascii_case(TAGS)) {
                continue;
            }
        }
        let size = name.len() + value.len() + 10;
        if size > left {
            break;
        }
        left -= size;
        // CGI turns a hyphen into an underscore: clearcoat drops names that could be mistaken for another field there.
        let end_to_end = in_answer || !name.contains('_');
        fields.push(Field { name, value, blanks: blanks(random), end_to_end });
    }
    fields
}

fn field_name(random: &mut Rng) -> String {
    const TOKEN: &[u8] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'*+-.^_`|~";
    if random.bool() {
        let name = NAMES[random.usize(..NAMES.len())];
        return any_case(random, name);
    }
    let mut name = String::from(["q", "Q", "z", "Z"][random.usize(..4)]);
    for _ in 0..if chance(random, 5) { random.usize(..200) } else { random.usize(..20) } {
        name.push(char::from(TOKEN[random.usize(..TOKEN.len())]));
    }
    name
}

fn any_case(random: &mut Rng, name: &str) -> String {
    match random.u8(..4) {
        0 => name.to_ascii_lowercase(),
        1 => {
            name.chars().map(|c| if random.bool() { c.to_ascii_uppercase() } else { c.to_ascii_lowercase() }).collect()
        }
        _ => name.to_owned(),
    }
}

/// Visible bytes and those from 0x80 to 0xff, with blanks between them and none around them (RFC 9110 section 5.5).
fn field_value(random: &mut Rng) -> Vec<u8> {
    let length = match random.u8(..100) {
        0..10 => return Vec::new(),
        10..95 => random.usize(1..60),
        95..99 => random.usize(60..1000),
        _ => random.usize(1000..=8192),
    };
    let high = chance(random, 20);
    let mut value: Vec<u8> = (0..length)
        .map(|_| match random.u8(..) {
            0..12 => b' ',
            12..15 => b'\t',
            15..60 if high => random.u8(0x80..),
            other => b'!' + other % 94,
        })
        .collect();
    for at in [0, length - 1] {
        if matches!(value[at], b' ' | b'\t') {
            value[at] = b'x';
        }
    }
    value
}

fn blanks(random: &mut Rng) -> [&'static str; 2] {
    if random.bool() {
        return [" ", ""];
    }
    let all = ["", " ", "\t", "  ", " \t "];
    [all[random.usize(..all.len())], all[random.usize(..all.len())]]
}

/// Inserts a field about the connection at a random position among the others. Returns the position.
pub fn line(random: &mut Rng, lines: &mut Vec<Field>, name: &str, value: &str) -> usize {
    let at = random.usize(..=lines.len());
    let name = any_case(random, name);
    lines.insert(at, Field { name, value: value.into(), blanks: blanks(random), end_to_end: false });
    at
}

/// A head with its blank line.
pub fn head(first_line: &str, fields: &[Field]) -> Vec<u8> {
    let mut wire = format!("{first_line}\r\n").into_bytes();
    for Field { name, value, blanks: [before, behind], .. } in fields {
        for part in [name.as_bytes(), b":", before.as_bytes(), value, behind.as_bytes(), b"\r\n"] {
            wire.extend_from_slice(part);
        }
    }
    wire.extend_from_slice(b"\r\n");
    wire
}
