//! The messages of the HTTP/1.1 benches: a browser's request to a shop, and Magento's answer. Both benches use the same
//! ones, so that their figures can be compared.

/// The length of the answer's tag header, in bytes. Magento lists every product and block of a page there.
const TAGS: usize = 2 * 1024;

/// A GET with 12 header fields, as Firefox sends it for a category page.
pub(crate) fn request() -> Vec<u8> {
    b"GET /women/tops-women/jackets-women.html?product_list_order=price&color=50 HTTP/1.1\r\n\
      Host: shop.example.com\r\n\
      User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\r\n\
      Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n\
      Accept-Language: de-DE,de;q=0.8,en-US;q=0.5,en;q=0.3\r\n\
      Accept-Encoding: gzip, deflate, br, zstd\r\n\
      Referer: https://shop.example.com/women/tops-women.html\r\n\
      Cookie: PHPSESSID=0123456789abcdef0123456789; form_key=AbCdEfGhIjKlMnOp; X-Magento-Vary=9bf9a599123e6402b85cde67144717a08b817412; mage-cache-sessid=true\r\n\
      Upgrade-Insecure-Requests: 1\r\n\
      Sec-Fetch-Dest: document\r\n\
      Sec-Fetch-Mode: navigate\r\n\
      Sec-Fetch-Site: same-origin\r\n\
      Connection: keep-alive\r\n\r\n"
        .to_vec()
}

/// The head of Magento's answer to it: 15 header fields, one of them the tags of the page. The body has `length` bytes.
pub(crate) fn answer_head(length: usize) -> Vec<u8> {
    let mut tags = String::from("store,cms_b,cat_c,cat_c_p,cat_p");
    for product in 1000.. {
        if tags.len() >= TAGS {
            break;
        }
        tags.push_str(&format!(",cat_p_{product}"));
    }
    tags.truncate(TAGS);
    format!(
        "HTTP/1.1 200 OK\r\n\
         Date: Mon, 03 Mar 2025 10:00:00 GMT\r\n\
         Server: Apache\r\n\
         Content-Type: text/html; charset=UTF-8\r\n\
         Content-Length: {length}\r\n\
         Cache-Control: max-age=86400, public, s-maxage=86400\r\n\
         Pragma: cache\r\n\
         Expires: Tue, 04 Mar 2025 10:00:00 GMT\r\n\
         Vary: Accept-Encoding\r\n\
         X-Magento-Tags: {tags}\r\n\
         X-Content-Type-Options: nosniff\r\n\
         X-XSS-Protection: 1; mode=block\r\n\
         X-Frame-Options: SAMEORIGIN\r\n\
         Content-Security-Policy-Report-Only: font-src 'self' 'unsafe-inline'; form-action 'self' 'unsafe-inline'\r\n\
         Set-Cookie: form_key=AbCdEfGhIjKlMnOp; path=/; secure; SameSite=Lax\r\n\
         X-Varnish: 32770 98308\r\n\r\n"
    )
    .into_bytes()
}
