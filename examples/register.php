<?php
/**
 * Registers a node with clearcoat through etcd's JSON gateway: for hosts that have PHP and nothing else.
 *
 *   ETCD=http://203.0.113.1:2379 ROLE=web ID=web-1 ADDRESS=192.0.2.5:80 php register.php run
 *
 * run         registers, refreshes until SIGTERM or SIGINT (needs ext-pcntl, which PHP for the command line has in most
 *             distributions), then drains for DRAIN seconds and deregisters
 * register    writes the key and prints the lease; run `LEASE=… php register.php refresh` more often than every TTL seconds
 * refresh     a sign of life; prints the lease, which is another one where etcd has ended the first
 * deregister  takes the key away, if it is of this LEASE, and ends the lease
 *
 * It checks nothing: start it when the node is ready, and end it before the node ends.
 */
declare(strict_types=1);

final class Node
{
    private string $key;
    private string $state = 'up';

    public function __construct(
        private string $etcd,
        string $key,
        private string $address,
        private int $ttl,
        public ?string $lease,
    ) {
        // The gateway wants keys and values in base64.
        $this->key = base64_encode($key);
    }

    public function register(): void
    {
        $this->lease = $this->call('lease/grant', ['TTL' => $this->ttl])['ID'];
        $this->put();
    }

    /** The answer of a lease that etcd does not know any more has no TTL. */
    public function refresh(): void
    {
        if ($this->lease === null || !isset($this->call('lease/keepalive', ['ID' => $this->lease])['result']['TTL'])) {
            $this->register();
        }
    }

    public function drain(): void
    {
        $this->state = 'drain';
        $this->put();
    }

    /** Only a key of our own lease: another process may have registered under this name by now. */
    public function deregister(): void
    {
        $this->call('kv/txn', [
            'compare' => [['key' => $this->key, 'target' => 'LEASE', 'lease' => $this->lease]],
            'success' => [['request_delete_range' => ['key' => $this->key]]],
        ]);
        $this->call('lease/revoke', ['ID' => $this->lease]);
    }

    private function put(): void
    {
        $record = json_encode(['address' => $this->address, 'state' => $this->state], JSON_UNESCAPED_SLASHES);
        $this->call('kv/put', ['key' => $this->key, 'value' => base64_encode($record), 'lease' => $this->lease]);
    }

    /** One request. 64 bit numbers come and go as strings. */
    private function call(string $path, array $request): array
    {
        $context = stream_context_create(['http' => [
            'method' => 'POST',
            'header' => 'Content-Type: application/json',
            'content' => json_encode($request),
            'timeout' => 5,
        ]]);
        $answer = @file_get_contents("$this->etcd/v3/$path", false, $context);
        if ($answer === false) {
            throw new RuntimeException(error_get_last()['message'] ?? 'etcd does not answer');
        }
        return json_decode($answer, true, 16, JSON_THROW_ON_ERROR);
    }
}

function run(Node $node, int $ttl, int $drain): void
{
    $ending = false;
    pcntl_async_signals(true);
    foreach ([SIGTERM, SIGINT] as $signal) {
        pcntl_signal($signal, function () use (&$ending) { $ending = true; });
    }
    while (!$ending) {
        try {
            $node->refresh();
        } catch (Exception $error) {
            // While etcd is away it is tried again: the node lives on.
            fwrite(STDERR, "not registered: {$error->getMessage()}; it is tried again\n");
        }
        // In short steps: a signal that comes just before a sleep does not end it.
        for ($until = microtime(true) + $ttl / 3; !$ending && microtime(true) < $until;) {
            usleep(50_000);
        }
    }
    if ($node->lease !== null) {
        try {
            $node->drain();
            $ending = false;
            for ($until = microtime(true) + $drain; !$ending && microtime(true) < $until;) {
                usleep(50_000);
            }
        } finally {
            $node->deregister();
        }
    }
}

[$role, $id, $address] = array_map('getenv', ['ROLE', 'ID', 'ADDRESS']);
$command = $argv[1] ?? '';
if (!$role || !$id || !$address || !in_array($command, ['run', 'register', 'refresh', 'deregister'], true)) {
    fwrite(STDERR, "usage: ROLE=web|varnish ID=… ADDRESS=HOST:PORT [ETCD=URL] [PREFIX=/clearcoat/v1/] [TTL=30] [DRAIN=5]\n");
    fwrite(STDERR, "       [LEASE=…] php register.php run|register|refresh|deregister\n");
    exit(2);
}
$ttl = (int) (getenv('TTL') ?: 30);
$key = (getenv('PREFIX') ?: '/clearcoat/v1/') . "nodes/$role/$id";
$node = new Node(getenv('ETCD') ?: 'http://127.0.0.1:2379', $key, $address, $ttl, getenv('LEASE') ?: null);
try {
    if ($command === 'run') {
        run($node, $ttl, (int) (getenv('DRAIN') === false ? 5 : getenv('DRAIN')));
    } else {
        $node->$command();
        echo $command === 'deregister' ? '' : "$node->lease\n";
    }
} catch (Exception $error) {
    fwrite(STDERR, "{$error->getMessage()}\n");
    exit(1);
}
