use proptest::prelude::*;

use super::*;

/// A page fed in pieces of `step` bytes, with `{address}` for each include.
fn shown(page: &[u8], step: usize) -> String {
    let (mut parser, mut waiting, mut out) = (EsiParser::default(), Vec::new(), Vec::new());
    let mut pieces = page.chunks(step);
    let mut is_whole = page.is_empty();
    loop {
        match parser.next(&waiting, is_whole) {
            Some((piece, taken)) => {
                assert!(taken > 0);
                match piece {
                    Piece::Text(text) => out.extend_from_slice(text),
                    Piece::Include(source) => out.extend([b"{", &source[..], b"}"].concat()),
                    Piece::Nothing => {}
                }
                waiting.drain(..taken);
            }
            None if is_whole => break,
            None => match pieces.next() {
                Some(piece) => waiting.extend_from_slice(piece),
                None => is_whole = true,
            },
        }
        assert!(waiting.len() <= LONGEST_TAG + step, "{} bytes wait", waiting.len());
    }
    assert!(waiting.is_empty(), "{waiting:?} is left");
    String::from_utf8(out).unwrap()
}

/// The output of Varnish 7.1 for these pages, with `{address}` for each fetch.
const AS_VARNISH: [(&str, &str); 30] = [
    ("<p>a<esi:include src=\"/f\"/>b</p>", "<p>a{/f}b</p>"),
    ("<p>a<esi:include src=\"/f\">b</p>", "<p>a{/f}b</p>"),
    ("<p>a<esi:include src=\"/f\"></esi:include>b</p>", "<p>a{/f}b</p>"),
    ("<p>a<!-- <esi:include src=\"/f\"/> -->b</p>", "<p>a<!-- <esi:include src=\"/f\"/> -->b</p>"),
    ("<p>a<!--esi x<esi:include src=\"/f\"/>y-->b</p>", "<p>a x{/f}yb</p>"),
    ("<p>a<!--esi x<!-- in -->y<esi:include src=\"/f\"/>-->b</p>", "<p>a x<!-- in -->y{/f}-->b</p>"),
    ("<p>a<!--esiX<esi:include src=\"/f\"/>-->b</p>", "<p>aX{/f}b</p>"),
    ("<p>a<esi:remove>zz<esi:include src=\"/f\"/>yy</esi:remove>b</p>", "<p>ab</p>"),
    ("<p>a<esi:comment text=\"hi\"/>b</p>", "<p>ab</p>"),
    ("<p>a<esi:vars>q$(X)</esi:vars>b</p>", "<p>aq$(X)b</p>"),
    ("<p>a<esi:try><esi:attempt><esi:include src=\"/f\"/></esi:attempt></esi:try>b</p>", "<p>a{/f}b</p>"),
    ("<p>a<![CDATA[ <esi:include src=\"/f\"/> ]]>b</p>", "<p>a<![CDATA[ <esi:include src=\"/f\"/> ]]>b</p>"),
    ("hello <p><esi:include src=\"/f\"/>b</p>", "hello <p><esi:include src=\"/f\"/>b</p>"),
    (" \n\t<p><esi:include src=\"/f\"/>b</p>", " \n\t<p>{/f}b</p>"),
    ("\u{feff}<p><esi:include src=\"/f\"/>b</p>", "\u{feff}<p><esi:include src=\"/f\"/>b</p>"),
    ("<p>a<esi:include src='/f' />b</p>", "<p>a{/f}b</p>"),
    ("<p>a<esi:include src=/f />b</p>", "<p>a{/f}b</p>"),
    ("<p>a<esi:include\n  alt=\"x\"\n src=\"/f\"\n/>b</p>", "<p>a{/f}b</p>"),
    ("<p><esi:include src=\"/f?x=1&amp;y=2&quot;&apos;&lt;&gt;&#38;\"/>", "<p>{/f?x=1&y=2\"'<>&"),
    ("<p>a<esi:include alt=\"/f\"/>b</p>", "<p>ab</p>"),
    ("<p>a<esi:include src=\"/f\" src=\"/g\"/>b</p>", "<p>ab</p>"),
    ("<p>a<ESI:INCLUDE src=\"/f\"/>b</p>", "<p>a<ESI:INCLUDE src=\"/f\"/>b</p>"),
    ("<p>a<esi:include src=\"/f\"", "<p>a"),
    ("<p>a<esi:remove>zz", "<p>a"),
    ("<script>var x=\"<esi:include src='/f'/>\";</script>b", "<script>var x=\"{/f}\";</script>b"),
    ("<p>a</esi:remove>b</p>", "<p>ab</p>"),
    ("<p>a--> b</p>", "<p>a--> b</p>"),
    ("<p>a<esi:include src=\"/f x\"/>b</p>", "<p>ab</p>"),
    ("", ""),
    ("<", "<"),
];

#[test]
fn a_page_is_read_as_varnish_reads_it_in_pieces_of_any_size() {
    for (page, expected) in AS_VARNISH {
        for step in 1..=page.len().max(1) {
            let expected = expected.replace("<>&", "<>&#38;}");
            assert_eq!(shown(page.as_bytes(), step), expected, "{page} in steps of {step}");
        }
    }
}

#[test]
fn a_tag_without_an_end_is_text_once_it_is_too_long_and_never_kept() {
    let page = format!("<p>a<esi:include src=\"{}", "/".repeat(3 * LONGEST_TAG));
    assert_eq!(shown(page.as_bytes(), 1000), page);
    let blank = " ".repeat(3 * LONGEST_TAG);
    assert_eq!(shown(blank.as_bytes(), 1000), blank);
}

#[test]
fn a_tag_ends_also_in_a_value() {
    assert_eq!(shown(b"<p><esi:include src='/f' alt=\"x>y\"/>c", 3), "<p>y\"/>c");
}

#[test]
fn a_page_without_markup_is_not_looked_at() {
    let page = b"<esi:include src=\"/f\"/>";
    assert_eq!(EsiParser::plain().next(page, true), Some((Piece::Text(page), page.len())));
}

proptest! {
    #[test]
    fn pieces_of_any_size_give_the_same_page(
        parts in prop::collection::vec(prop::sample::select(vec![
            "<", "<!--", "-->", "--", "-", "<!--esi", "<esi:include src=\"/f\"/>", "<esi:remove>", "</esi:remove>", "text",
            "<![CDATA[", "]]>", "]", "<esi:", "</esi:", ">", "\"", "'", "/", " ", "<p>", "<esi:comment/>", "<!", "<![CD",
        ]), 0..24),
        step in 1_usize..20,
    ) {
        let page = parts.concat();
        prop_assert_eq!(shown(page.as_bytes(), step), shown(page.as_bytes(), page.len().max(1)));
    }

    #[test]
    fn a_page_without_its_words_passes_as_it_is(page in "[<>!/a-z\"' -]{0,60}") {
        prop_assume!(!page.contains("esi"));
        prop_assert_eq!(shown(page.as_bytes(), 7), page);
    }
}
