//! The trial page: three tags with a common prefix, and a new name each time it is rendered.
//!
//! A VCL that parses patterns fails on the common prefix in a pattern for several tags, and a VCL that takes several
//! tags for one key fails on a page with several. So the purge names one tag of the page, the middle one, and two that
//! no page has.
//!
//! Its path says all that is to be known of it, so that any clearcoat before the same fleet can answer it: a Varnish may
//! fetch it through another one than that which tries it.

use crate::purge::{Purge, TagSet, Target, to_magento};

/// The path of our own pages.
const FOLDER: &[u8] = b"/.clearcoat";

/// The paths of trial pages with a seal and without one, before their token.
const SEALED: &str = "/.clearcoat/trial/sealed/";
const BARE: &str = "/.clearcoat/trial/bare/";

/// The text after the name in the body of a page that was asked for with what the edge would say of a reader.
const ASKED: &str = " asked";

/// The text before the name of a rendered page, in its body.
const MARK: &str = "clearcoat trial ";

/// The number of hexadecimal digits of a name.
const NAME: usize = 32;

/// Whether a path is one of clearcoat's own, which no client asks for.
pub fn is_ours(path: &[u8]) -> bool {
    path.strip_prefix(FOLDER).is_some_and(|rest| matches!(rest.first(), None | Some(b'/')))
}

/// The length of the seal of a page under trial, in names of the page: as long as any seal that the origin writes.
const SEAL: usize = 250;

/// A page under trial.
#[derive(Clone, Debug)]
pub(super) struct TrialPage {
    token: String,
    /// It comes with a seal.
    is_sealed: bool,
}

/// A rendered trial page, as its body says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RenderedPage {
    /// Its name.
    pub(super) name: String,
    /// It was asked for with what the edge would say of a reader.
    was_asked: bool,
}

impl RenderedPage {
    /// The page in this body, if there is one.
    pub(super) fn read(body: &[u8]) -> Option<Self> {
        let body = String::from_utf8_lossy(body);
        let (_, rest) = body.split_once(MARK)?;
        let (name, rest) = rest.split_at_checked(NAME)?;
        Some(RenderedPage { name: name.to_owned(), was_asked: rest.starts_with(ASKED) })
    }
}

impl TrialPage {
    /// Another one each time: nobody can guess it.
    pub(super) fn new(is_sealed: bool) -> Self {
        TrialPage { token: name(), is_sealed }
    }

    /// The page at this path.
    pub(super) fn at(path: &str) -> Option<Self> {
        let pages = [(SEALED, true), (BARE, false)];
        let (token, is_sealed) =
            pages.into_iter().find_map(|(folder, is_sealed)| Some((path.strip_prefix(folder)?, is_sealed)))?;
        let is_token = token.len() == NAME && token.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_token.then(|| TrialPage { token: token.to_owned(), is_sealed })
    }

    /// What the edge would say of a reader.
    fn asked(&self) -> String {
        let (journal, id) = self.token.split_at(NAME / 2);
        format!("1 {journal}.{} 0 {id} {}", &id[..8], self.path())
    }

    /// Whether a node that answered with this page and this seal returns seals, and passes on what the edge says. `None` of a
    /// page without a seal.
    pub(super) fn has_seal(&self, page: &RenderedPage, seal: Option<&[u8]>) -> Option<bool> {
        self.is_sealed.then(|| page.was_asked && seal == Some(seal_of(&page.name).as_bytes()))
    }

    /// Its path.
    pub(super) fn path(&self) -> String {
        let folder = if self.is_sealed { SEALED } else { BARE };
        format!("{folder}{}", self.token)
    }

    /// The request for it. `X-Forwarded-Proto` is for a VCL that redirects plain requests.
    pub(super) fn request(&self, host: &str) -> String {
        format!(
            "GET {} HTTP/1.1\r\nHost: {host}\r\nX-Forwarded-Proto: https\r\nUser-Agent: clearcoat/{}\r\nAccept: text/html\r\n\
             X-Clearcoat-Asked: {}\r\n\r\n",
            self.path(),
            env!("CARGO_PKG_VERSION"),
            self.asked()
        )
    }

    /// The complete answer of a web node with this page, with a new name each time, to a request with this
    /// `X-Clearcoat-Asked`. Its lifetime exceeds a trial.
    pub(super) fn answer(&self, asked: Option<&[u8]>) -> Vec<u8> {
        let name = name();
        let said = if asked == Some(self.asked().as_bytes()) { ASKED } else { "" };
        let body = format!("<!doctype html><title>clearcoat</title><p>{MARK}{name}{said}</p>\n");
        let seal = if self.is_sealed { format!("X-Clearcoat-Seal: {}\r\n", seal_of(&name)) } else { String::new() };
        let [one, two, three] = [1, 2, 3].map(|number| self.tag(number));
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nCache-Control: public, max-age=120, s-maxage=120\r\n\
             X-Magento-Tags: {one},{two},{three}\r\n{seal}Content-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        (head + &body).into_bytes()
    }

    /// The purge that drops it.
    pub(super) fn purge(&self) -> Purge {
        let tags = [2, 4, 5].map(|number| self.tag(number));
        // In Magento's form, which always parses as a list of tags for letters, digits and `_`.
        let tags = TagSet::from_magento(&to_magento(tags.iter().map(String::as_str)));
        Purge { targets: tags.map(Target::Tags).into_iter().collect(), soft: false }
    }

    fn tag(&self, number: u8) -> String {
        format!("clearcoat_{}_{number}", &self.token[..8])
    }
}

/// The seal of the page with this name.
fn seal_of(name: &str) -> String {
    name.repeat(SEAL)
}

fn name() -> String {
    format!("{:032x}", fastrand::u128(..))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{DEFAULT_HEADER_LIMIT, PurgeDialect};
    use crate::purge::{Ban, compile};

    #[test]
    fn a_page_has_another_name_each_time_and_can_be_told_by_it() {
        let page = TrialPage::new(true);
        let read = |answer: Vec<u8>| RenderedPage::read(&answer).unwrap();
        let (one, two) = (read(page.answer(None)), read(page.answer(None)));
        assert_ne!(one.name, two.name);
        assert_eq!(one.name.len(), NAME);
        for other in ["", "clearcoat trial 12", "<h1>shop</h1>"] {
            assert_eq!(RenderedPage::read(other.as_bytes()), None);
        }
    }

    #[test]
    fn a_page_is_the_same_to_every_clearcoat_that_is_asked_for_its_path() {
        for page in [TrialPage::new(true), TrialPage::new(false)] {
            let elsewhere = TrialPage::at(&page.path()).unwrap();
            assert_eq!((&elsewhere.token, elsewhere.is_sealed), (&page.token, page.is_sealed));
        }
        for other in
            ["/.clearcoat/trial/", "/.clearcoat/trial/bare/12", "/.clearcoat/trial/bare/../../../etc/passwd/12345"]
        {
            assert!(TrialPage::at(other).is_none(), "{other}");
        }
    }

    #[test]
    fn the_purge_is_one_that_a_vcl_with_words_stumbles_over() {
        let page = TrialPage::new(true);
        let Ban::Tags { pattern, .. } = &compile([&page.purge()], PurgeDialect::Magento, DEFAULT_HEADER_LIMIT).bans[0]
        else {
            panic!("no pattern")
        };
        // No tag occurs in it literally.
        assert!(!pattern.contains(&page.tag(2)) && pattern.contains("_[245]"), "{pattern}");
        assert!(String::from_utf8(page.answer(None)).unwrap().contains(&page.tag(2)));
    }

    #[test]
    fn a_seal_counts_if_it_is_that_of_the_page_and_the_page_was_asked_for() {
        let page = TrialPage::new(true);
        let answer = |asked: &[u8]| {
            let text = String::from_utf8(page.answer(Some(asked))).unwrap();
            let seal = text.lines().find_map(|line| line.strip_prefix("X-Clearcoat-Seal: ")).unwrap().to_owned();
            (RenderedPage::read(text.as_bytes()).unwrap(), seal)
        };
        let (rendered, seal) = answer(b"another");
        assert_eq!(seal.len(), 8_000);
        assert_eq!(page.has_seal(&rendered, Some(seal.as_bytes())), Some(false), "nobody asked as the edge does");
        let (rendered, seal) = answer(page.asked().as_bytes());
        assert_eq!(page.has_seal(&rendered, Some(seal.as_bytes())), Some(true));
        assert!([None, Some(&b"another"[..])].iter().all(|other| page.has_seal(&rendered, *other) == Some(false)));
        let bare = TrialPage::new(false);
        assert_eq!(bare.has_seal(&rendered, None), None);
        assert!(!String::from_utf8(bare.answer(Some(bare.asked().as_bytes()))).unwrap().contains("Seal"));
    }

    #[test]
    fn no_path_of_a_shop_is_ours() {
        for ours in ["/.clearcoat", "/.clearcoat/", "/.clearcoat/trial/1"] {
            assert!(is_ours(ours.as_bytes()), "{ours}");
        }
        for other in ["/", "/.clearcoats", "/clearcoat", "/a/.clearcoat/", "/.clearcoat.html"] {
            assert!(!is_ours(other.as_bytes()), "{other}");
        }
    }
}
