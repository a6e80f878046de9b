//! Edge Side Includes: processed as in Varnish, for pages that bypass every Varnish.
//!
//! Magento writes `<esi:include src="…"/>` for a block with its own lifetime in every answer: its configuration, not
//! the request, says that a cache will fill it in. A page that bypasses the caches must be filled in as well, or its
//! reader gets it without its menu.
//!
//! The parser follows Varnish 7 (`cache_esi_parse.c`), tested tag by tag against it, so that a page looks the same on
//! both paths: only a page whose first character is `<` is parsed; `<!--esi … -->` is unwrapped; ordinary comments and
//! CDATA are left alone; `<esi:remove>` is removed with its content; any other `esi:` tag is removed alone. Names are
//! in lower case. The only addition is a limit: a longer tag than 8 KiB is text.
//!
//! [`EsiParser`] is fed a page as it arrives and never needs more of it than one tag.

/// The longest tag, in bytes.
const LONGEST_TAG: usize = 8 * 1024;

/// The length of the longest opening that has to be distinguished.
const LONGEST_OPENING: usize = b"<![CDATA[".len();

/// A part of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece<'p> {
    /// Passed on unchanged.
    Text(&'p [u8]),
    /// An include of the page at this address; entities are decoded, and it has no blank or control byte.
    Include(Vec<u8>),
    /// Removed.
    Nothing,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ScanState {
    /// Before the first character other than white space.
    #[default]
    Start,
    /// In a page without markup: all of it is text.
    Plain,
    Markup,
    /// In an ordinary comment.
    Comment,
    Cdata,
}

/// Splits a page into pieces.
#[derive(Debug, Default)]
pub struct EsiParser {
    state: ScanState,
    /// Within `<esi:remove>`.
    removing: bool,
    /// Within `<!--esi`, whose end is to be removed.
    opened: bool,
}

impl EsiParser {
    /// A parser for a page that is passed on unchanged.
    pub fn plain() -> Self {
        EsiParser { state: ScanState::Plain, ..EsiParser::default() }
    }

    /// The next piece of a page, and its length. `page` is the rest so far; if `is_whole`, nothing follows it. `None`
    /// if more input is needed, or nothing is left.
    pub fn next<'p>(&mut self, page: &'p [u8], is_whole: bool) -> Option<(Piece<'p>, usize)> {
        if page.is_empty() {
            return None;
        }
        if self.state == ScanState::Start {
            self.state = match page.iter().find(|byte| !byte.is_ascii_whitespace()) {
                Some(b'<') => ScanState::Markup,
                None if !is_whole && page.len() < LONGEST_TAG => return None,
                _ => ScanState::Plain,
            };
        }
        match self.state {
            ScanState::Start | ScanState::Plain => Some((Piece::Text(page), page.len())),
            ScanState::Comment => self.up_to(b"-->", page, is_whole),
            ScanState::Cdata => self.up_to(b"]]>", page, is_whole),
            ScanState::Markup => self.markup(page, is_whole),
        }
    }

    fn text<'p>(&self, text: &'p [u8]) -> (Piece<'p>, usize) {
        (if self.removing { Piece::Nothing } else { Piece::Text(text) }, text.len())
    }

    /// Text up to the end of an uninterpreted section.
    fn up_to<'p>(&mut self, end: &[u8], page: &'p [u8], is_whole: bool) -> Option<(Piece<'p>, usize)> {
        if let Some(at) = find(page, end) {
            self.state = ScanState::Markup;
            return Some(self.text(&page[..at + end.len()]));
        }
        // The end marker may be arriving.
        let certain = if is_whole { page.len() } else { page.len().saturating_sub(end.len() - 1) };
        (certain > 0).then(|| self.text(&page[..certain]))
    }

    fn markup<'p>(&mut self, page: &'p [u8], is_whole: bool) -> Option<(Piece<'p>, usize)> {
        let next = self.next_mark(page, is_whole);
        if next > 0 {
            return Some(self.text(&page[..next]));
        }
        if self.opened && page.starts_with(b"-->") {
            self.opened = false;
            return Some((Piece::Nothing, 3));
        }
        if page.starts_with(b"<!--esi") {
            self.opened = true;
            return Some((Piece::Nothing, b"<!--esi".len()));
        }
        let undecided = !is_whole && page.len() < LONGEST_OPENING;
        if page.starts_with(b"<esi:") || page.starts_with(b"</esi:") {
            return self.tag(page, is_whole);
        }
        if undecided {
            return None;
        }
        if page.starts_with(b"<!--") {
            (self.state, self.opened) = (ScanState::Comment, false);
            return Some(self.text(&page[..4]));
        }
        if page.starts_with(b"<![CDATA[") {
            self.state = ScanState::Cdata;
        }
        Some(self.text(&page[..1]))
    }

    /// The length of the text before the next possible markup.
    fn next_mark(&self, page: &[u8], is_whole: bool) -> usize {
        let may_open = |at: usize| {
            let rest = &page[at..];
            let openings: [&[u8]; 4] = [b"<!--", b"<![CDATA[", b"<esi:", b"</esi:"];
            openings.iter().any(|opening| rest.starts_with(opening) || (!is_whole && opening.starts_with(rest)))
        };
        let mark = memchr::memchr_iter(b'<', page).find(|&at| may_open(at)).unwrap_or(page.len());
        if !self.opened {
            return mark;
        }
        match find(&page[..mark], b"-->") {
            Some(at) => at,
            None if is_whole || mark < page.len() => mark,
            None => {
                let tail = if page.ends_with(b"--") { 2 } else { usize::from(page.ends_with(b"-")) };
                mark - tail
            }
        }
    }

    /// An `esi:` tag, with whose first bytes `page` begins.
    fn tag<'p>(&mut self, page: &'p [u8], is_whole: bool) -> Option<(Piece<'p>, usize)> {
        // Even within quotes, as in Varnish.
        let Some(end) = memchr::memchr(b'>', &page[..page.len().min(LONGEST_TAG)]) else {
            return match page.len() {
                LONGEST_TAG.. => Some(self.text(&page[..1])),
                // A truncated tag is removed.
                _ if is_whole => Some((Piece::Nothing, page.len())),
                _ => None,
            };
        };
        let tag = &page[..end];
        let is_end = tag.starts_with(b"</");
        let inner = &tag[if is_end { b"</esi:".len() } else { b"<esi:".len() }..];
        let (inner, is_empty) = inner.strip_suffix(b"/").map_or((inner, false), |inner| (inner, true));
        let name_end = inner.iter().position(u8::is_ascii_whitespace).unwrap_or(inner.len());
        let piece = match (&inner[..name_end], is_end) {
            (b"remove", _) => {
                self.removing = !is_end && !is_empty;
                Piece::Nothing
            }
            (b"include", false) if !self.removing => {
                source_of(&inner[name_end..]).map_or(Piece::Nothing, Piece::Include)
            }
            _ => Piece::Nothing,
        };
        Some((piece, end + 1))
    }
}

fn find(bytes: &[u8], mark: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, mark)
}

/// The one `src` among the attributes, decoded. `None` if there is none or more than one, a quote is not closed, or it
/// is not a valid address.
fn source_of(mut attributes: &[u8]) -> Option<Vec<u8>> {
    let mut source = None;
    loop {
        attributes = attributes.trim_ascii_start();
        if attributes.is_empty() {
            break;
        }
        let equals = attributes.iter().position(|&byte| byte == b'=')?;
        let (name, rest) = (attributes[..equals].trim_ascii(), attributes[equals + 1..].trim_ascii_start());
        let (value, rest) = match rest.first() {
            Some(&quote @ (b'"' | b'\'')) => {
                let end = rest[1..].iter().position(|&byte| byte == quote)?;
                (&rest[1..=end], &rest[end + 2..])
            }
            _ => rest.split_at(rest.iter().position(u8::is_ascii_whitespace).unwrap_or(rest.len())),
        };
        if name == b"src" && source.replace(value).is_some() {
            return None;
        }
        attributes = rest;
    }
    let decoded = decode_entities(source?);
    decoded.iter().all(u8::is_ascii_graphic).then_some(decoded)
}

/// The five entities of XML.
fn decode_entities(value: &[u8]) -> Vec<u8> {
    const ENTITIES: [(&[u8], u8); 5] =
        [(b"&amp;", b'&'), (b"&lt;", b'<'), (b"&gt;", b'>'), (b"&quot;", b'"'), (b"&apos;", b'\'')];
    let (mut decoded, mut rest) = (Vec::with_capacity(value.len()), value);
    while let Some(&first) = rest.first() {
        let entity = ENTITIES.iter().find(|(entity, _)| rest.starts_with(entity));
        let (byte, len) = entity.map_or((first, 1), |(entity, byte)| (*byte, entity.len()));
        decoded.push(byte);
        rest = &rest[len..];
    }
    decoded
}

#[cfg(test)]
mod tests;
