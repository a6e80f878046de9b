<?php
/*
 * Readers and a sender of purges for deploy/test-compose.sh, inside the network of compose.yaml: they read pages of the shop,
 * save products and purge them, and say what no reader may see.
 *
 *   php8.2 checker.php RATE READERS PURGES-A-SECOND CLEARCOAT...      until there is /tmp/stop
 *
 * While there is /tmp/uploads, three clients upload as well, each for UPLOADING seconds and then again.
 *
 * - refused: a status that is not 200, or no answer from any clearcoat. A purge that is answered 503 was not accepted, and says
 *   when to send it again (Retry-After): it is, and refused only if it never is accepted.
 * - stale: a page older than the version whose purge was answered before the page was asked for.
 * - A connection to a clearcoat that fails is refused, too, unless there is /tmp/excused: while a clearcoat itself is killed, cut
 *   off or paused, nobody but its clients can help. They ask the other one then, as a balancer would (retried). One that reaches
 *   nobody can but say so: while there is /tmp/cut-off, a 502, 503 or 504 is asked of the other one as well.
 *
 * - cut: an upload that was begun and is not answered with what was sent, whatever happened meanwhile. None is excused.
 *
 * Prints each failure, and a line of JSON at the end. Ends with 1 if anything failed, or too little was done.
 */
declare(strict_types=1);

const PRODUCTS = 60;
const DATA = '/var/lib/shop';
const STATE = '/tmp/checker';
/** Seconds for a connection, and for an answer: a page that a web node was paused over is asked for elsewhere first. */
const CONNECTING = 3;
const ANSWERING = 15;
/** The time that an upload takes, in seconds, and its parts. */
const UPLOADING = 20;
const PARTS = 40;
const UPLOADERS = 3;

[, $rate, $readers, $purges] = $argv;
$clearcoats = array_slice($argv, 4);

function is_there(string $file): bool
{
    clearstatcache(true, $file);
    return file_exists($file);
}

/** Replaces a number in a file. */
function put(string $file, int $number): void
{
    file_put_contents("$file.new", (string) $number);
    rename("$file.new", $file);
}

/** The whole answer to a request, or why there is none. */
function ask(string $host, int $port, string $head): array
{
    $stream = @stream_socket_client("tcp://$host:$port", $code, $reason, CONNECTING);
    if ($stream === false) {
        return [null, "connecting to $host failed: $reason"];
    }
    stream_set_timeout($stream, ANSWERING);
    @fwrite($stream, "$head\r\nHost: shop.example\r\nConnection: close\r\n\r\n");
    $answer = (string) @stream_get_contents($stream);
    $late = stream_get_meta_data($stream)['timed_out'];
    fclose($stream);
    [$fields, $body] = explode("\r\n\r\n", $answer, 2) + ['', ''];
    if (!preg_match('#^HTTP/1\.1 ([0-9]{3}) #', $fields, $status)) {
        return [null, "$host " . ($late ? 'says nothing' : 'hangs up')];
    }
    $whole = preg_match('#\r\nContent-Length: ([0-9]+)#i', $fields, $length)
        ? strlen($body) === (int) $length[1]
        : str_ends_with($body, "\r\n0\r\n\r\n");
    return $whole ? [(int) $status[1], $body] : [null, "the answer of $host was cut"];
}

/** Asks one clearcoat, and another one if there is no answer. Counts what happens. */
function ask_any(array $hosts, int $port, string $head, array &$counts): array
{
    $reasons = [];
    foreach ($hosts as $host) {
        [$status, $body] = ask($host, $port, $head);
        $cut_off = $status >= 502 && is_there('/tmp/cut-off');
        if ($status !== null && !$cut_off) {
            return [$status, $body];
        }
        $reasons[] = $body;
        if (!$cut_off && !is_there('/tmp/excused')) {
            break;
        }
        $counts['retried']++;
    }
    return [0, implode(', ', $reasons)];
}

function say(string $line): void
{
    fwrite(STDOUT, gmdate('H:i:s ') . substr($line, 0, 300) . "\n");
}

/** Calls `act` this often a second, until there is /tmp/stop; notes what it counted. */
function paced(float $rate, int $number, callable $act): void
{
    $counts = array_fill_keys(['reads', 'purged', 'not accepted', 'retried', 'refused', 'stale', 'uploads', 'cut'], 0);
    mt_srand($number);
    for ($next = microtime(true); !is_there('/tmp/stop'); $next += 1 / $rate) {
        $pause = $next - microtime(true);
        if ($pause > 0) {
            usleep((int) ($pause * 1e6));
        } else {
            $next = microtime(true);
        }
        $act($counts);
    }
    file_put_contents(STATE . "/counts-$number", json_encode($counts));
}

function read_a_page(array $clearcoats, array &$counts): void
{
    $product = mt_rand(1, PRODUCTS);
    $promised = (int) @file_get_contents(STATE . "/promised-$product");
    shuffle($clearcoats);
    [$status, $body] = ask_any($clearcoats, 8080, "GET /product/$product HTTP/1.1", $counts);
    $counts['reads']++;
    if ($status !== 200 || !preg_match('#<p>version ([0-9]+)</p>#', $body, $version)) {
        $counts['refused']++;
        say("refused: product $product: $status: $body");
    } elseif ((int) $version[1] < $promised) {
        $counts['stale']++;
        say("stale: product $product: version $version[1] after the purge of $promised");
    }
}

function save_a_product(array $clearcoats, array &$counts): void
{
    $product = mt_rand(1, PRODUCTS);
    $version = 1 + (int) @file_get_contents(DATA . "/product-$product");
    put(DATA . "/product-$product", $version);
    shuffle($clearcoats);
    $head = "PURGE / HTTP/1.1\r\nX-Magento-Tags-Pattern: ((^|,)cat_p_$product(,|$))";
    for ($tries = 0; $tries < 5; $tries++) {
        [$status, $body] = ask_any($clearcoats, 6081, $head, $counts);
        if ($status !== 503) {
            break;
        }
        $counts['not accepted']++;
        sleep(1);
    }
    if ($status === 200) {
        put(STATE . "/promised-$product", $version);
        $counts['purged']++;
    } elseif (!is_there('/tmp/excused')) {
        $counts['refused']++;
        say("refused: the purge of product $product: $status: $body");
    }
}

/** Sends an upload slowly, if uploads are wanted. */
function upload(array $clearcoats, array &$counts): void
{
    if (!is_there('/tmp/uploads')) {
        return;
    }
    shuffle($clearcoats);
    foreach ($clearcoats as $host) {
        $stream = @stream_socket_client("tcp://$host:8080", $code, $reason, CONNECTING);
        if ($stream !== false || !is_there('/tmp/excused')) {
            break;
        }
        $counts['retried']++;
    }
    if ($stream === false) {
        $counts['refused']++;
        say("refused: an upload: connecting to $host failed: $reason");
        return;
    }
    $part = random_bytes(8192);
    $body = str_repeat($part, PARTS);
    fwrite($stream, "POST /upload HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\nContent-Length: " . strlen($body) . "\r\n\r\n");
    for ($sent = 0; $sent < PARTS; $sent++) {
        @fwrite($stream, $part);
        usleep((int) (UPLOADING * 1e6 / PARTS));
    }
    stream_set_timeout($stream, ANSWERING);
    $answer = (string) @stream_get_contents($stream);
    fclose($stream);
    $counts['uploads']++;
    // It may come in chunks.
    if (!str_starts_with($answer, 'HTTP/1.1 200 ') || !str_contains($answer, strlen($body) . ' ' . md5($body) . "\n")) {
        $counts['cut']++;
        say("cut: an upload to $host: " . json_encode(substr($answer, 0, 20) . ' ... ' . substr($answer, -60)));
    }
}

@mkdir(STATE);
for ($number = 1; $number <= UPLOADERS; $number++) {
    if (pcntl_fork() === 0) {
        paced(1, $readers + $number, fn (&$counts) => upload($clearcoats, $counts));
        exit(0);
    }
}
for ($number = 0; $number <= (int) $readers; $number++) {
    if (pcntl_fork() === 0) {
        $number === 0
            ? paced((float) $purges, 0, fn (&$counts) => save_a_product($clearcoats, $counts))
            : paced($rate / $readers, $number, fn (&$counts) => read_a_page($clearcoats, $counts));
        exit(0);
    }
}
$began = microtime(true);
while (pcntl_wait($status) > 0) {
}
$total = ['seconds' => (int) (microtime(true) - $began)];
foreach (glob(STATE . '/counts-*') as $file) {
    foreach (json_decode(file_get_contents($file), true) as $what => $count) {
        $total[$what] = ($total[$what] ?? 0) + $count;
    }
}
echo json_encode($total), "\n";
// A reader that met nothing because it read nothing proves nothing.
$enough = $total['reads'] >= $total['seconds'] * $rate / 4 && $total['purged'] >= $total['seconds'] * $purges / 4;
exit($enough && $total['refused'] + $total['stale'] + $total['cut'] === 0 ? 0 : 1);
