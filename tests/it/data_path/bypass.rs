//! Past the caches: what a reader gets from a web node while no Varnish may serve.

use clearcoat::fleet::PurgeDialect;
use clearcoat::varnish::vcl;
use http::Request;

use crate::data_path::rig::{Rig, get_request};
use crate::data_path::tls::Secure;
use crate::support::client::{Answer, Connection};
use crate::support::http2::{Http2, request};
use crate::support::upstream::{Call, Gate, Then, Upstream};
use crate::support::varnish::Varnish;

/// Magento's header fields of a page meant for a VCL.
const PAGE: &str = "Content-Type: text/html; charset=UTF-8\r\nCache-Control: public, max-age=86400, s-maxage=86400\r\n\
    Pragma: cache\r\nExpires: Fri, 27 Nov 2026 23:59:59 GMT\r\nX-Magento-Tags: cat_p_1,cat_p\r\nX-Powered-By: PHP\r\n\
    Set-Cookie: PHPSESSID=a\r\n";

fn page(call: &mut Call<'_>, body: &str) -> Then {
    call.send_then(format!("HTTP/1.1 200 OK\r\n{PAGE}Content-Length: {}\r\n\r\n{body}", body.len()), Then::KeepAlive)
}

/// Web nodes without a Varnish.
fn shop(script: impl Fn(&mut Call<'_>) -> Then + Send + Sync + 'static) -> Rig {
    Rig::start("", Vec::new(), vec![Upstream::start(script)])
}

fn ask(client: &mut Connection, request: &str) -> Answer {
    client.send(request).unwrap();
    client.answer(request.starts_with("HEAD")).unwrap_or_else(|error| panic!("{request}: {error}"))
}

fn fragments(rig: &Rig, result: &str) -> f64 {
    rig.counter(&format!("clearcoat_bypass_fragments_total{{result=\"{result}\"}}"))
}

/// Serves a page with a menu, which includes another fragment.
fn with_menu(call: &mut Call<'_>) -> Then {
    match call.path().to_owned().as_str() {
        "/menu" => page(call, "<b>menu <esi:include src=\"http://shop.test/items?a=1&amp;b=2\"/></b>"),
        "/items?a=1&b=2" => page(call, "<i>"),
        _ => page(call, "<html><esi:include src=\"/menu\"/><esi:remove>no cache</esi:remove></html>"),
    }
}

#[test]
fn a_page_is_what_a_vcl_would_deliver_with_its_blocks_for_every_client() {
    let whole = "<html><b>menu <i></b></html>";
    let secure = Secure::start_with_web("", vec![Upstream::start(with_menu)]);
    let rig = &secure.rig;
    let mut client = rig.edge();
    for _ in 0..2 {
        let answer = ask(&mut client, &get_request("/p"));
        assert_eq!(answer.text(), whole, "{answer:?}");
        for (name, value) in [
            ("cache-control", Some("no-store, no-cache, must-revalidate, max-age=0")),
            ("pragma", Some("no-cache")),
            ("expires", Some("-1")),
            ("x-magento-cache-debug", None),
            ("set-cookie", Some("PHPSESSID=a")),
            ("x-magento-tags", None),
            ("x-powered-by", None),
            ("connection", None),
        ] {
            assert_eq!(answer.header(name), value, "{name}");
        }
        assert_eq!(answer.head.to_lowercase().matches("cache-control").count(), 1, "{answer:?}");
    }
    // HTTP/1.0 has no chunks, and HEAD no body.
    let answer = ask(&mut rig.edge(), "GET /p HTTP/1.0\r\nHost: shop.test\r\n\r\n");
    assert_eq!((answer.text(), answer.header("transfer-encoding")), (whole, None), "{answer:?}");
    let mut client = rig.edge();
    let answer = ask(&mut client, "HEAD /p HTTP/1.1\r\nHost: shop.test\r\n\r\n");
    assert_eq!((answer.status, answer.header("content-length")), (200, None), "{answer:?}");
    assert_eq!(ask(&mut client, &get_request("/p")).text(), whole);

    let answer = Http2::open(secure.address()).get("/p").unwrap();
    assert_eq!(
        (answer.text(), answer.header("x-magento-tags"), answer.header("pragma")),
        (whole, None, Some("no-cache"))
    );
    assert_eq!(fragments(rig, "included"), 10.0);
    assert_eq!(fragments(rig, "left_out"), 0.0);
}

#[test]
fn fragments_are_asked_for_as_the_page_was_and_one_after_the_other() {
    let rig = shop(|call| {
        assert!(call.body().is_ok());
        with_menu(call)
    });
    let request = "POST /p?x HTTP/1.1\r\nHost: Shop.test\r\nCookie: a=b\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\
        Accept-Encoding: gzip\r\nIf-None-Match: \"x\"\r\nRange: bytes=0-1\r\nX-Forwarded-Proto: https\r\nAccept: x\r\n\r\nhi";
    assert_eq!(ask(&mut rig.edge(), request).text(), "<html><b>menu <i></b></html>");
    let calls = rig.web[0].calls();
    let tail = "X-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Host: Shop.test\r\nVia: 1.1 clearcoat\r\n";
    let of_fragment =
        |path| format!("GET {path} HTTP/1.1\r\nHost: Shop.test\r\nCookie: a=b\r\nAccept: x\r\n{tail}\r\n");
    let of_page = "POST /p?x HTTP/1.1\r\nHost: Shop.test\r\nCookie: a=b\r\nContent-Type: text/plain\r\nAccept: x\r\n";
    assert_eq!(calls[0].head, format!("{of_page}{tail}Content-Length: 2\r\n\r\n"));
    assert_eq!([&calls[1].head, &calls[2].head], [&of_fragment("/menu"), &of_fragment("/items?a=1&b=2")]);
    rig.becomes_idle();
}

#[test]
fn a_fragment_that_cannot_be_had_is_left_out_and_the_page_goes_on() {
    let rig = shop(|call| {
        let path = call.path().split('?').next().expect("a path").to_owned();
        let answer = match path.as_str() {
            "/missing" => "HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nno!",
            "/gzip" => "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nno!",
            "/malformed" => "HTTP/1.1 200 OK\r\nContent-Length: +3\r\n\r\nno!",
            "/bad-chunk" => "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx",
            "/cut" => return call.send_then("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nno!", Then::Close),
            "/gone" => return Then::Close,
            "/long" => {
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 2 << 20);
                return if call.send(head + &"x".repeat(2 << 20)).is_ok() { Then::KeepAlive } else { Then::Close };
            }
            path => {
                let fragment = path.strip_prefix("/of").unwrap_or(path);
                return page(call, &format!("<p>a<esi:include src=\"{fragment}?secret=2\"/>b"));
            }
        };
        call.send_then(answer, Then::KeepAlive)
    });
    let mut client = rig.edge();
    let cases = ["/missing", "/gzip", "/malformed", "/bad-chunk", "/cut", "/gone", "/long"];
    for path in cases {
        assert_eq!(ask(&mut client, &get_request(&format!("/of{path}?secret=1"))).text(), "<p>ab", "{path}");
    }
    for address in ["http://other.test/", "ftp:x"] {
        assert_eq!(ask(&mut client, &get_request(&format!("/of{address}"))).text(), "<p>ab", "{address}");
    }
    assert_eq!((fragments(&rig, "included"), fragments(&rig, "left_out")), (0.0, cases.len() as f64 + 2.0));
    // The page that includes itself ends at Varnish's depth.
    assert_eq!(ask(&mut client, &get_request("/itself")).text(), "<p>a".repeat(6) + &"b".repeat(6));
    rig.clearcoat.log().waits_for("a fragment is left out of a page");
    let log = rig.clearcoat.log();
    let lines: Vec<_> = log.text().lines().filter(|line| line.contains("is left out")).map(str::to_owned).collect();
    assert!(lines[0].contains("\"path\":\"/of/missing\"") && lines[0].contains("the answer was 404"), "{}", lines[0]);
    assert!(!lines.iter().any(|line| line.contains("secret")), "{lines:?}");
}

#[test]
fn no_page_makes_a_node_carry_out_more_than_so_many_fragments() {
    let rig = shop(|call| {
        let is_page = call.path() == "/p";
        let body = if is_page { "<esi:include src=\"/f\"/>".repeat(1000) } else { "<f>".to_owned() };
        page(call, &format!("{body}."))
    });
    let answer = ask(&mut rig.edge(), &get_request("/p"));
    assert_eq!(answer.text(), "<f>.".repeat(64) + ".");
    assert_eq!(rig.web[0].calls().len(), 65);
}

#[test]
fn a_page_is_the_same_however_it_comes_and_however_long_it_is() {
    let text = "<p>".to_owned() + &"0123456789abcdef".repeat(200_000);
    let rig = shop({
        let text = text.clone();
        move |call| {
            let head = format!("HTTP/1.1 200 OK\r\n{PAGE}");
            let include = "<esi:include src=\"/f\"/>";
            let sent = match call.path().to_owned().as_str() {
                "/f" => return page(call, "<f>"),
                "/bytes" => {
                    let wire = format!("{head}Content-Length: 30\r\n\r\n<p>a{include}b--");
                    wire.bytes().try_for_each(|byte| call.send([byte]))
                }
                "/chunks" => {
                    let wire = format!("{head}Transfer-Encoding: chunked\r\n\r\n");
                    let chunks = format!("<p>a{include}b--")
                        .bytes()
                        .fold(String::new(), |all, byte| all + &format!("1\r\n{}\r\n", char::from(byte)));
                    call.send(format!("{wire}{chunks}0\r\nX: trailer\r\n\r\n"))
                }
                "/until-close" => return call.send_then(format!("{head}\r\n<p>a{include}b--"), Then::Close),
                // Longer than the hold limit, with a fragment in its middle and at its end.
                _ => {
                    let length = 2 * text.len() + 2 * include.len();
                    call.send(format!("{head}Content-Length: {length}\r\n\r\n{text}{include}{text}{include}"))
                }
            };
            if sent.is_ok() { Then::KeepAlive } else { Then::Close }
        }
    });
    let mut client = rig.edge();
    for path in ["/bytes", "/chunks", "/until-close", "/bytes"] {
        assert_eq!(ask(&mut client, &get_request(path)).text(), "<p>a<f>b--", "{path}");
    }
    let answer = ask(&mut client, &get_request("/long"));
    assert!(answer.text() == format!("{text}<f>{text}<f>"), "{} bytes", answer.body.len());
}

#[test]
fn a_page_that_is_cut_off_reaches_nobody_as_a_whole_one() {
    let rig = shop(|call| {
        let head = format!("HTTP/1.1 200 OK\r\n{PAGE}Content-Length: {}\r\n\r\n", 4 << 20);
        let body = if call.path() == "/short" { "<p>cut".to_owned() } else { "<p>".to_owned() + &"x".repeat(3 << 20) };
        call.send_then(head + &body, Then::Close)
    });
    // Nothing has been sent yet: the request is retried once, and then this is the answer.
    assert_eq!(ask(&mut rig.edge(), &get_request("/short")).status, 502);
    let mut client = rig.edge();
    client.send(get_request("/long")).unwrap();
    assert!(client.answer(false).is_err());
}

#[test]
fn the_top_of_a_page_is_there_while_its_fragment_is_rendered() {
    let rendered = Gate::default();
    let rig = shop({
        let rendered = rendered.clone();
        move |call| {
            if call.path() == "/slow" && !call.wait(&rendered) {
                return Then::Close;
            }
            let body = if call.path() == "/slow" { "<f>" } else { "<p>top<esi:include src=\"/slow\"/>end" };
            page(call, body)
        }
    });
    let mut client = rig.edge();
    client.send(get_request("/p")).unwrap();
    assert_eq!(client.head().unwrap().status, 200);
    assert_eq!(client.take(11).unwrap(), b"6\r\n<p>top\r\n");
    rendered.open();
    assert_eq!(client.take(16).unwrap(), b"6\r\n<f>end\r\n0\r\n\r\n");
}

#[test]
fn methods_that_our_vcl_refuses_reach_no_web_node() {
    let secure = Secure::start_with_web("", vec![Upstream::echo()]);
    for method in ["PROPFIND", "BREW", "get", "LOCK"] {
        let answer = ask(&mut secure.rig.edge(), &format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n"));
        assert_eq!(answer.status, 405, "{method}");
        assert_eq!(answer.header("Allow"), Some("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"));
        let asked: Request<()> = request(method, "/").body(()).unwrap();
        assert_eq!(Http2::open(secure.address()).ask(asked, true).answer().unwrap().status, 405, "{method}");
    }
    assert!(secure.rig.web[0].calls().is_empty());
    for method in ["PUT", "DELETE", "PATCH", "OPTIONS"] {
        assert_eq!(ask(&mut secure.rig.edge(), &format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n")).status, 200);
    }
}

#[test]
fn what_is_no_page_passes_as_it_is_but_for_its_head() {
    let include = "<esi:include src=\"/f\"/>";
    let rig = shop(move |call| {
        let (status, fields) = match call.path().to_owned().as_str() {
            "/json" => ("200 OK", "Content-Type: application/json\r\nCache-Control: s-maxage=9\r\nETag: \"x\"\r\n"),
            "/gzip" => ("200 OK", "Content-Type: text/html\r\nContent-Encoding: gzip\r\n"),
            "/part" => ("206 Partial Content", "Content-Type: text/html\r\nContent-Range: bytes 0-22/99\r\n"),
            "/static/a.html" => {
                ("200 OK", "Content-Type: text/html\r\nCache-Control: public, max-age=9\r\nETag: \"x\"\r\n")
            }
            "/304" => return call.send_then("HTTP/1.1 304 Not Modified\r\nX-Magento-Tags: a\r\n\r\n", Then::KeepAlive),
            path => panic!("{path}"),
        };
        let length = include.len();
        call.send_then(
            format!("HTTP/1.1 {status}\r\n{fields}Content-Length: {length}\r\n\r\n{include}"),
            Then::KeepAlive,
        )
    });
    let mut client = rig.edge();
    for (path, etag) in [("/json", true), ("/gzip", false), ("/part", false), ("/static/a.html", true)] {
        let answer = ask(&mut client, &get_request(path));
        assert_eq!(
            (answer.text(), answer.header("content-length"), answer.header("etag").is_some()),
            (include, Some("23"), etag)
        );
        let is_stored = path == "/static/a.html";
        assert_eq!(answer.header("cache-control") == Some("public, max-age=9"), is_stored, "{answer:?}");
    }
    let answer = ask(&mut client, &get_request("/304"));
    assert_eq!((answer.status, answer.header("x-magento-tags")), (304, None));
    assert_eq!(fragments(&rig, "hidden"), 1.0);
    assert_eq!(ask(&mut client, &get_request("/json")).status, 200);
}

/// Pages with odd ESI, identified by their index.
const ODD_PAGES: [&str; 14] = [
    "<p>a<esi:include src=\"/f\">b</p>",
    "<p>a<esi:include src='/f' alt=\"x>y\" /></esi:include>b",
    "<p><!-- <esi:include src=\"/f\"/> --><![CDATA[<esi:include src=\"/f\"/>]]>",
    "<p><!--esi <esi:include src=\"http://shop.test/f\"/> -->b-->",
    "<p><esi:remove><esi:include src=\"/f\"/></esi:remove><esi:comment text=\"x\"/><esi:vars>$(X)</esi:vars>",
    "no markup <esi:include src=\"/f\"/>",
    "\n <p><esi:include src=\"f\"/><esi:include src=\"?f\"/>",
    "<p><esi:include src=\"/deeper\"/>",
    "<p><esi:include src=\"/text\"/>",
    "<p><esi:include src=\"/f?a=1&amp;b=2\"/>",
    "<p><esi:include/><esi:include src=\"/f\" src=\"/f\"/><esi:include src=\"a b\"/>",
    "<p>cut <esi:include src=\"/f\"",
    "<p>cut <esi:remove>",
    "",
];

/// The same shop behind a Varnish and at the edge without one: the answers differ only in who is said to have answered.
#[test]
fn a_page_past_the_caches_is_the_page_that_varnish_makes_of_it() {
    let script = |call: &mut Call<'_>| {
        let path = call.path().to_owned();
        let number = path.strip_prefix("/page/").and_then(|number| number.parse::<usize>().ok());
        match (number, path.as_str()) {
            (Some(number), _) => page(call, ODD_PAGES[number]),
            (None, "/deeper") => page(call, "<i><esi:include src=\"/f?deep\"/></i>"),
            (None, "/text") => {
                let text = "<esi:include src=\"/f\"/>";
                let head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nCache-Control: private, max-age=5\r\n";
                call.send_then(format!("{head}Content-Length: {}\r\n\r\n{text}", text.len()), Then::KeepAlive)
            }
            (None, "/private") => {
                let head =
                    "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nCache-Control: private, max-age=5\r\nServer: x\r\n";
                call.send_then(format!("{head}Content-Length: 3\r\n\r\n<p>"), Then::KeepAlive)
            }
            (None, path) => page(call, &format!("<f {path}>")),
        }
    };
    let behind = Upstream::start(script);
    let folder = tempfile::tempdir().expect("a folder");
    let text =
        vcl::render(vcl::VarnishVersion::Seven, PurgeDialect::Magento, &[behind.address.into()], &[]).expect("a VCL");
    let file = folder.path().join("shop.vcl");
    std::fs::write(&file, text).expect("a file");
    let mut varnish = Varnish::spawn(folder.path(), "varnish", &file);
    let rig = shop(script);
    varnish.ready();
    let paths = (0..ODD_PAGES.len()).map(|number| format!("/page/{number}"));
    for path in paths.chain(["/text", "/private", "/f"].map(str::to_owned)) {
        let [through, past] = [varnish.address, rig.clearcoat.edge].map(|address| {
            let mut client = Connection::open(address).expect("it listens");
            ask(&mut client, &get_request(&path))
        });
        assert_eq!((past.status, past.text()), (through.status, through.text()), "{path}");
        for field in ["cache-control", "pragma", "expires", "x-magento-tags", "x-powered-by", "server", "link", "age"] {
            assert_eq!(past.header(field), through.header(field), "{path}: {field}");
        }
    }
}
