<?php
/*
 * A small shop with pages as Magento sends them to Varnish: X-Magento-Tags, Cache-Control. Each product has a version, in
 * a file that all web nodes share, as they share a database. To save a product is to count its version up and then to purge its
 * tag, at clearcoat alone.
 *
 *   GET  /               the products
 *   GET  /product/N      one of them
 *   POST /product/N      saves it, and says what the purge answered
 *   POST /upload         says how long the body was, and its MD5
 */
declare(strict_types=1);

const PRODUCTS = 100;

function answer(int $status, string $type, string $body, array $fields = []): never
{
    http_response_code($status);
    header("Content-Type: $type");
    header('Content-Length: ' . strlen($body));
    foreach ($fields as $field) {
        header($field);
    }
    echo $body;
    exit;
}

function file_of(int $product): string
{
    return (getenv('SHOP_DATA') ?: '/var/lib/shop') . "/product-$product";
}

function version(int $product): int
{
    return (int) @file_get_contents(file_of($product));
}

/** Counts the version up, and gives the new one. */
function save(int $product): int
{
    $file = fopen(file_of($product), 'c+') ?: throw new RuntimeException('the data cannot be written');
    flock($file, LOCK_EX);
    $version = 1 + (int) stream_get_contents($file);
    rewind($file);
    fwrite($file, (string) $version);
    fclose($file);
    return $version;
}

/** Purges a tag as Magento does, at the first clearcoat that takes it. Gives the answer. */
function purge(string $tag): string
{
    $where = getenv('SHOP_PURGE') ?: 'clearcoat:6081';
    [$name, $port] = explode(':', $where);
    $options = ['method' => 'PURGE', 'ignore_errors' => true, 'timeout' => 5,
        'header' => "X-Magento-Tags-Pattern: ((^|,)$tag(,|$))"];
    foreach (gethostbynamel($name) ?: [] as $address) {
        $answer = @file_get_contents("http://$address:$port/", false, stream_context_create(['http' => $options]));
        if ($answer !== false && str_contains($http_response_header[0], ' 200')) {
            return $answer;
        }
    }
    throw new RuntimeException("no clearcoat at $where has taken the purge");
}

/** What Magento sends with a page that may be cached. */
function page(string $body, array $tags): never
{
    answer(200, 'text/html; charset=utf-8', "<!doctype html>\n$body\n", [
        'X-Magento-Tags: ' . implode(',', $tags),
        'Cache-Control: max-age=86400, public, s-maxage=86400',
        'Pragma: cache',
    ]);
}

$path = parse_url($_SERVER['REQUEST_URI'], PHP_URL_PATH);
if ($path === '/health_check.php') {
    answer(200, 'text/plain', "ok\n", ['Cache-Control: no-store']);
}
if ($path === '/') {
    $links = array_map(fn ($n) => "<li><a href=\"/product/$n\">product $n</a>", range(1, PRODUCTS));
    page('<h1>Shop</h1><ul>' . implode("\n", $links) . '</ul>', ['cat_c_2', 'cat_p', 'store']);
}
if ($path === '/upload' && $_SERVER['REQUEST_METHOD'] === 'POST') {
    $body = (string) file_get_contents('php://input');
    answer(200, 'text/plain', strlen($body) . ' ' . md5($body) . "\n", ['Cache-Control: no-store']);
}
if (preg_match('#^/product/([0-9]{1,6})$#', $path, $match)) {
    $product = (int) $match[1];
    if ($_SERVER['REQUEST_METHOD'] !== 'POST') {
        page("<h1>Product $product</h1><p>version " . version($product) . '</p>', ["cat_p_$product", 'cat_p', 'store']);
    }
    try {
        $version = save($product);
        answer(200, 'text/plain', "version $version\n" . purge("cat_p_$product") . "\n", ['Cache-Control: no-store']);
    } catch (RuntimeException $failed) {
        answer(500, 'text/plain', $failed->getMessage() . "\n", ['Cache-Control: no-store']);
    }
}
answer(404, 'text/plain', "no such page\n", ['Cache-Control: no-store']);
