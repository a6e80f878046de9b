//! The shop of the demo: only as much of a Magento web node as a proxy sees.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use http::{HeaderValue, header};
use parking_lot::Mutex;

use crate::http_server::{Handler, Response, response, text};

const PRODUCTS: u32 = 5;

/// The state that all web nodes of a shop share, like its database.
#[derive(Debug, Default)]
pub(super) struct Shop {
    prices: Mutex<BTreeMap<u32, String>>,
    renders: AtomicU64,
}

/// One web node.
#[derive(Debug)]
pub(super) struct WebNode {
    name: String,
    shop: Arc<Shop>,
}

impl WebNode {
    pub(super) fn new(name: &str, shop: Arc<Shop>) -> Self {
        WebNode { name: name.to_owned(), shop }
    }

    fn product_page(&self, product: u32) -> Response {
        let prices = self.shop.prices.lock();
        let price = prices.get(&product).map_or("24.90", String::as_str);
        let render = self.shop.renders.fetch_add(1, Ordering::Relaxed) + 1;
        let page = format!(
            "<!doctype html>\n<title>Product {product}</title>\n<h1>Product {product}</h1>\n<p>Price: {price}</p>\n\
             <p>Rendered by {} as page number {render} of this shop</p>\n<p><a href=\"/\">All products</a></p>\n",
            self.name
        );
        cacheable(page, &format!("cat_p_{product},cat_p"))
    }

    fn front_page() -> Response {
        let mut page = "<!doctype html>\n<title>Shop</title>\n<h1>Shop</h1>\n<ul>\n".to_owned();
        for product in 1..=PRODUCTS {
            // Writing to a string does not fail.
            _ = writeln!(page, "<li><a href=\"/product/{product}.html\">Product {product}</a></li>");
        }
        page.push_str("</ul>\n");
        cacheable(page, "cms_p_2,cat_p")
    }

    fn set_price(&self, product: u32, price: &str) -> Response {
        if price.is_empty() || price.len() > 12 || !price.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
            return text(400, "a price is digits and a point\n");
        }
        self.shop.prices.lock().insert(product, price.to_owned());
        text(200, format!("product {product} now costs {price}; purge cat_p_{product} to show it\n"))
    }
}

impl Handler for WebNode {
    async fn handle(&self, request: http::Request<hyper::body::Bytes>, _peer: SocketAddr) -> Response {
        let parts: Vec<&str> = request.uri().path().trim_start_matches('/').split('/').collect();
        let product = |text: &str| text.parse().ok().filter(|number| (1..=PRODUCTS).contains(number));
        match (request.method().as_str(), &parts[..]) {
            ("GET" | "HEAD", ["health_check.php"]) => text(200, "ok\n"),
            ("GET" | "HEAD", [""]) => Self::front_page(),
            ("GET" | "HEAD", ["product", page]) => match page.strip_suffix(".html").and_then(product) {
                Some(product) => self.product_page(product),
                None => text(404, "no such product\n"),
            },
            ("POST", ["product", number, "price", price]) => match product(number) {
                Some(product) => self.set_price(product, price),
                None => text(404, "no such product\n"),
            },
            _ => text(404, "not found\n"),
        }
    }
}

/// A page as Magento sends it: public, cacheable for a day, with the tags of its content.
fn cacheable(page: String, tags: &str) -> Response {
    let mut response = response(200, "text/html; charset=utf-8", page.into_bytes());
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("public, max-age=86400, s-maxage=86400"));
    if let Ok(tags) = HeaderValue::from_str(tags) {
        headers.insert("x-magento-tags", tags);
    }
    response
}
