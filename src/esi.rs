//! Edge Side Includes in a page: what Varnish does with them, for a page that comes past every Varnish.
//!
//! Magento writes `<esi:include src="…"/>` where a block has a lifetime of its own, whoever asks: it is told by its
//! configuration and not by the request that a cache is there to fill the block in. A page that no Varnish sees on its way
//! has to be filled in all the same, or its reader gets it without its menu.
//!
//! The reading is that of Varnish 7 (`cache_esi_parse.c`), tag by tag as tried on it, so that a page looks the same on both
//! ways: only a page whose first character is `<` is looked at; `<!--esi … -->` is opened; ordinary comments and CDATA are
//! left alone; `<esi:remove>` goes with what is in it; any other `esi:` tag goes alone. Names are in lower case. What this
//! adds is a bound: a tag longer than 8 KiB is none.
//!
//! [`Parser`] is fed a page as it comes and never asks for more of it than one tag.

/// The longest tag, in bytes.
const LONGEST_TAG: usize = 8 * 1024;

/// The longest of the openings that have to be told apart.
const LONGEST_OPENING: usize = b"<![CDATA[".len();

/// A part of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece<'p> {
    /// Passes as it is.
    Text(&'p [u8]),
    /// The page behind this address stands here; entities are decoded, no byte of it is a blank or a control.
    Include(Vec<u8>),
    /// Is left out.
    Nothing,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum EsiState {
    /// Before the first character that is no white space.
    #[default]
    Start,
    /// In a page without markup: all of it is text.
    Plain,
    Markup,
    /// In an ordinary comment.
    Comment,
    Cdata,
}

/// Takes a page apart.
#[derive(Debug, Default)]
pub struct Parser {
    state: EsiState,
    /// Within `<esi:remove>`.
    removing: bool,
    /// Within `<!--esi`, whose end is still to be left out.
    opened: bool,
}

impl Parser {
    /// For a page in which nothing is looked for.
    pub fn plain() -> Self {
        Parser { state: EsiState::Plain, ..Parser::default() }
    }

    /// The next part of a page, and how many bytes it took. `page` is what was not taken yet; with `is_whole`, nothing
    /// follows it. `None` where more is needed, or nothing is left.
    pub fn next<'p>(&mut self, page: &'p [u8], is_whole: bool) -> Option<(Piece<'p>, usize)> {
        if page.is_empty() {
            return None;
        }
        if self.state == EsiState::Start {
            self.state = match page.iter().find(|byte| !byte.is_ascii_whitespace()) {
                Some(b'<') => EsiState::Markup,
                None if !is_whole && page.len() < LONGEST_TAG => return None,
                _ => EsiState::Plain,
            };
        }
        match self.state {
            EsiState::Start | EsiState::Plain => Some((Piece::Text(page), page.len())),
            EsiState::Comment => self.up_to(b"-->", page, is_whole),
            EsiState::Cdata => self.up_to(b"]]>", page, is_whole),
            EsiState::Markup => self.markup(page, is_whole),
        }
    }

    fn text<'p>(&self, text: &'p [u8]) -> (Piece<'p>, usize) {
        (if self.removing { Piece::Nothing } else { Piece::Text(text) }, text.len())
    }

    /// Text up to the end of what is not looked into.
    fn up_to<'p>(&mut self, end: &[u8], page: &'p [u8], is_whole: bool) -> Option<(Piece<'p>, usize)> {
        if let Some(at) = find(page, end) {
            self.state = EsiState::Markup;
            return Some(self.text(&page[..at + end.len()]));
        }
        // The end may be under way.
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
            (self.state, self.opened) = (EsiState::Comment, false);
            return Some(self.text(&page[..4]));
        }
        if page.starts_with(b"<![CDATA[") {
            self.state = EsiState::Cdata;
        }
        Some(self.text(&page[..1]))
    }

    /// Where something begins that is not text for certain: up to there it is.
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

    /// An `esi:` tag, of which `page` begins with the first bytes.
    fn tag<'p>(&mut self, page: &'p [u8], is_whole: bool) -> Option<(Piece<'p>, usize)> {
        // Also where that stands in quotes, as with Varnish.
        let Some(end) = memchr::memchr(b'>', &page[..page.len().min(LONGEST_TAG)]) else {
            return match page.len() {
                LONGEST_TAG.. => Some(self.text(&page[..1])),
                // Cut off: there is nothing to show of it.
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

/// The one `src` among the attributes, decoded. `None` where there is none or more than one, where a quote is open, or
/// where it cannot be an address.
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
