use super::*;
use crate::http1::{Version, write_response};

/// The head that the client gets for an answer with these fields to this request.
fn delivered(request: &str, fields: &str) -> String {
    let asked = format!("{request} HTTP/1.1\r\nHost: a\r\n\r\n");
    let bytes = format!("HTTP/1.1 200 OK\r\n{fields}Content-Length: 2\r\n\r\n");
    let (mut head, mut answer) = (RequestHead::default(), ResponseHead::default());
    head.parse(asked.as_bytes(), 100).unwrap();
    answer.parse(bytes.as_bytes(), head.method, 100).unwrap();
    deliver(&mut answer, &head);
    let mut out = Vec::new();
    write_response(&mut out, &answer, Version::Http11, true);
    String::from_utf8(out).unwrap().to_lowercase()
}

const NEVER: &str =
    "cache-control: no-store, no-cache, must-revalidate, max-age=0\r\npragma: no-cache\r\nexpires: -1\r\n";

#[test]
fn a_page_must_not_be_stored_and_has_no_fields_meant_for_varnish() {
    let page = "Cache-Control: public, max-age=86400, s-maxage=86400\r\nPragma: cache\r\nExpires: Fri\r\nAge: 3\r\n\
        X-Magento-Tags: cat_p_1\r\nX-Magento-Tags: cat_p_2\r\nX-Powered-By: PHP\r\nServer: nginx\r\nVia: 1.1 x\r\n\
        Link: </a>; rel=preload\r\nSurrogate-Control: max-age=9\r\nX-Varnish: 1\r\nxkey: a\r\nX-Clearcoat-Url: /\r\n\
        Set-Cookie: a=b\r\nX-Kept: c\r\n";
    assert_eq!(
        delivered("GET /p?q", page),
        format!(
            "http/1.1 200 ok\r\nset-cookie: a=b\r\nx-kept: c\r\n{NEVER}\
             via: 1.1 clearcoat\r\ncontent-length: 2\r\n\r\n"
        )
    );
}

#[test]
fn what_nobody_marked_as_private_must_not_be_stored() {
    for fields in [
        "",
        "Cache-Control: max-age=5\r\n",
        "Cache-Control: public\r\nCache-Control: s-maxage=60\r\n",
        "Cache-Control: private=\"Set-Cookie\", s-maxage=60\r\n",
        "Cache-Control: not-private\r\n",
    ] {
        assert!(delivered("GET /p", fields).contains(NEVER), "{fields}");
        assert!(delivered("POST /p", fields).contains(NEVER), "{fields}");
        assert!(delivered("GET /statics/x.css", fields).contains(NEVER), "{fields}");
        assert!(delivered("GET /p?/static/", fields).contains(NEVER), "{fields}");
    }
    for fields in ["Cache-Control: private, max-age=5\r\n", "Cache-Control: no-cache\r\nCache-Control: PRIVATE\r\n"] {
        let head = delivered("GET /p", fields);
        assert!(head.contains(&fields.to_lowercase()) && !head.contains("pragma"), "{head}");
    }
}

#[test]
fn a_file_keeps_its_lifetime_and_sets_no_cookie_with_it() {
    let fields = "Cache-Control: public, max-age=5\r\nETag: \"x\"\r\nSet-Cookie: a=b\r\n";
    for path in ["/static/a.css", "/media/b.jpg", "/pub/static/c.js", "/pub/media/d.html?x"] {
        let head = delivered(&format!("GET {path}"), fields);
        assert!(head.contains("cache-control: public, max-age=5\r\netag: \"x\"\r\n"), "{head}");
        assert!(!head.contains("set-cookie") && !head.contains("pragma"), "{head}");
    }
    let head = delivered("GET /media/x", "Cache-Control: no-store\r\nSet-Cookie: a=b\r\n");
    assert!(head.contains("set-cookie: a=b\r\n"), "{head}");
}

#[test]
fn the_age_of_a_page_is_for_those_who_debug() {
    let head = delivered("GET /p", "X-Magento-Debug: 1\r\nAge: 7\r\nX-Magento-Tags: a\r\n");
    assert!(head.contains("age: 7\r\n") && !head.contains("x-magento-tags") && !head.contains("x-magento-debug"));
    assert!(!delivered("GET /p", "Age: 7\r\n").contains("age: 7"));
}

#[test]
fn a_page_to_be_filled_in_says_nothing_of_bytes_that_will_be_others() {
    let fields =
        "Content-Type: text/html; charset=UTF-8\r\nETag: \"x\"\r\nLast-Modified: Fri\r\nAccept-Ranges: bytes\r\n";
    for method in ["GET", "HEAD", "POST"] {
        let head = delivered(&format!("{method} /p"), fields);
        for gone in ["etag", "last-modified", "accept-ranges", "content-length"] {
            assert!(!head.contains(gone), "{method}: {head}");
        }
        assert_eq!(head.contains("transfer-encoding: chunked\r\n"), method != "HEAD", "{head}");
    }
    assert!(delivered("GET /p", "Content-Type: text/plain\r\nETag: x\r\n").contains("etag: x\r\n"));
    assert!(delivered("GET /p", "Content-Type: Text/HTML\r\nContent-Encoding: gzip\r\n").contains("content-length: 2"));
}

#[test]
fn methods_are_those_of_the_vcl() {
    let admitted = |method: &str| {
        let asked = format!("{method} /p HTTP/1.1\r\nHost: a\r\n\r\n");
        let mut head = RequestHead::default();
        head.parse(asked.as_bytes(), 100).unwrap();
        admits(&head)
    };
    for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
        assert!(admitted(method), "{method}");
    }
    for method in ["get", "PROPFIND", "BREW", "TRACE", "LOCK", "GETX"] {
        assert!(!admitted(method), "{method}");
    }
}

#[test]
fn a_page_is_asked_for_whole_and_a_file_as_the_client_wants_it() {
    let asked = |path: &str| {
        let bytes = format!(
            "GET {path} HTTP/1.1\r\nHost: a\r\nRange: bytes=0-1\r\nIf-Range: x\r\nAccept-Encoding: gzip\r\nA: b\r\n\
             If-None-Match: x\r\nIf-Modified-Since: Fri\r\n\r\n"
        );
        let mut head = RequestHead::default();
        head.parse(bytes.as_bytes(), 100).unwrap();
        ask_for_whole(&mut head);
        head.kept_fields().count()
    };
    assert_eq!((asked("/p"), asked("/static/x")), (1, 6));
}
