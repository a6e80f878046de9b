//! Joins the tags of a page into one line, so that bans find them.
//!
//! VCL reads only the first line of a name, and a ban looks for a tag between commas. So a tag in a second
//! `X-Magento-Tags` line, or after a comma and a blank, is not found by any purge. The origin listener writes all tags
//! in one line, separated by commas alone.
//!
//! Lines whose joined length exceeds Varnish's default limit stay separate (a longer one would be a 503 of Varnish): a
//! module of Magento writes them so, for a VCL that joins them with `std.collect`, that is with a comma and a blank. So
//! each but the first begins with a comma. We cannot know whether the VCL joins them, so such a page must not be
//! stored.

use super::field::{Field, list_items, trim};
use super::response::ResponseHead;

/// The longest joined line in bytes: below the default of `http_resp_hdr_len`, 8 KiB.
const LONGEST_LINE: usize = 8_000;

/// How the tags of an answer are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TagLines {
    /// Unchanged, or there are none.
    AsTheyCame,
    One,
    /// Several lines, each trimmed.
    Several,
}

impl TagLines {
    pub(super) fn of(head: &ResponseHead) -> Self {
        let (mut lines, mut bytes, mut has_blanks) = (0, 0, false);
        for field in head.kept().filter(|field| is_tags(field, &head.bytes)) {
            let value = field.value.bytes(&head.bytes);
            lines += 1;
            bytes += value.len() + ",".len();
            // A blank within a tag belongs to it.
            has_blanks |= memchr::memchr2(b' ', b'\t', value).is_some()
                && value.split(|&byte| byte == b',').any(|tag| trim(tag).len() < tag.len());
        }
        match lines {
            2.. if bytes > LONGEST_LINE => TagLines::Several,
            2.. => TagLines::One,
            _ if has_blanks => TagLines::One,
            _ => TagLines::AsTheyCame,
        }
    }
}

impl ResponseHead {
    /// Whether its tags stand in several lines that are too long together to be written as one.
    pub fn has_scattered_tags(&self) -> bool {
        TagLines::of(self) == TagLines::Several
    }
}

pub(super) fn is_tags(field: &Field, bytes: &[u8]) -> bool {
    field.name.bytes(bytes).eq_ignore_ascii_case(b"x-magento-tags")
}

/// Writes a line of tags, or nothing if the first line already included it.
pub(super) fn push_tags(out: &mut Vec<u8>, lines: TagLines, field: &Field, head: &ResponseHead) {
    let bytes = &head.bytes[..];
    let is_first = head.kept().find(|field| is_tags(field, bytes)).is_some_and(|first| first.name == field.name);
    if lines == TagLines::One && !is_first {
        return;
    }
    out.extend_from_slice(field.name.bytes(bytes));
    out.extend_from_slice(if is_first { b": " } else { b": ," });
    let all = head.kept().filter(|other| is_tags(other, bytes));
    let mut between: &[u8] = b"";
    for line in all.filter(|other| lines == TagLines::One || other.name == field.name) {
        for tag in list_items(line.value.bytes(bytes)) {
            out.extend_from_slice(between);
            out.extend_from_slice(tag);
            between = b",";
        }
    }
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::super::{Method, Version, write_response};
    use super::*;

    /// The tag lines written for these, and whether the page may still be stored.
    fn written(lines: &[&str], joins: bool) -> (Vec<String>, bool) {
        let lines: Vec<String> =
            lines.iter().map(|line| format!("x-magento-TAGS: {line}\r\nX-Other: a, b\r\n")).collect();
        let bytes = format!("HTTP/1.1 200 OK\r\nA: b\r\n{}Content-Length: 0\r\n\r\n", lines.concat());
        let mut head = ResponseHead::default();
        head.parse(bytes.as_bytes(), Method::Get, 100).unwrap();
        if joins {
            head.join_tags();
        }
        let scattered = joins && head.has_scattered_tags();
        let mut out = Vec::new();
        write_response(&mut out, &head, Version::Http11, true);
        let out = String::from_utf8(out).unwrap();
        assert_eq!(out.matches("X-Other: a, b\r\n").count(), lines.len());
        assert!(out.starts_with("HTTP/1.1 200 OK\r\nA: b\r\n"), "{out}");
        let tags = out.lines().filter_map(|line| line.strip_prefix("x-magento-TAGS: ").map(str::to_owned));
        (tags.collect(), !scattered)
    }

    #[test]
    fn all_tags_are_in_one_line_with_commas_alone_between_them() {
        for (lines, expected) in [
            (&["a,b", "c,d"][..], "a,b,c,d"),
            (&["a, b"], "a,b"),
            (&["a ,\tb , my tag,,c"], "a,b,my tag,c"),
            (&["a", "", " ", "b,"], "a,b"),
            (&["my tag,b"], "my tag,b"),
            (&["a,,b,"], "a,,b,"),
        ] {
            assert_eq!(written(lines, true), (vec![expected.to_owned()], true), "{lines:?}");
        }
        assert_eq!(written(&[], true), (vec![], true));
    }

    #[test]
    fn another_listener_leaves_them_as_they_are() {
        assert_eq!(written(&["a, b", "c"], false), (vec!["a, b".to_owned(), "c".to_owned()], true));
    }

    #[test]
    fn lines_too_long_for_one_begin_with_a_comma_and_are_not_to_be_stored() {
        let long = "x".repeat(5_000);
        let (lines, may_be_stored) = written(&[&format!("a, {long}"), &format!("b, {long}")], true);
        assert_eq!(lines, [format!("a,{long}"), format!(",b,{long}")]);
        assert!(!may_be_stored);
        // A single line keeps the length that the web node gave it.
        assert_eq!(written(&[&format!("a, {long}{long}")], true), (vec![format!("a,{long}{long}")], true));
    }
}
