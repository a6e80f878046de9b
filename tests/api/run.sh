#!/usr/bin/env bash
# Holds the answers of a running admin listener against docs/openapi.json, with requests that schemathesis makes up: tests/api/run.sh
#
# The same requests each time, so that what fails once fails again. Needs target/debug/clearcoat, and
# `deploy/install-deps.sh --for test`.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=${CARGO_TARGET_DIR:-target}
work=$(mktemp -d)
pid=
stop() {
    if [ -n "$pid" ]; then
        # It may have ended.
        kill "$pid" 2>/dev/null || true
        wait "$pid" || true
    fi
    rm -rf "$work"
}
trap stop EXIT
trap 'exit 130' INT TERM

token=the-token-of-this-test
printf %s "$token" >"$work/token"
cat >"$work/clearcoat.toml" <<CONFIG
[edge]
listen = ["127.0.0.1:0"]
[origin]
listen = ["127.0.0.1:0"]
[purge]
listen = ["127.0.0.1:0"]
[admin]
listen = ["127.0.0.1:0"]
token_file = "$work/token"
[journal]
kind = "disk"
path = "$work/journal"
CONFIG
"$target/debug/clearcoat" serve --config "$work/clearcoat.toml" 2>"$work/log" &
pid=$!

# The address of the admin listener, once purges and readers are served too.
admin=
for _ in $(seq 600); do
    admin=$(sed -n 's/.*listener="admin" address=\([0-9.:]*\).*/\1/p' "$work/log")
    if [ -n "$admin" ] && grep -q 'the edge is open' "$work/log"; then break; fi
    kill -0 "$pid" 2>/dev/null || { cat "$work/log" >&2; exit 1; }
    sleep 0.1
done

# The stream of events does not end, so it is left out: tests/it/status_page.rs reads it. What the schema allows may still be refused
# with 400: it cannot say what a tag is, and it takes 5.0 for a whole number.
# It keeps what failed in the folder where it runs.
schemathesis=$(realpath "$target/tools/schemathesis/bin/schemathesis")
description=$PWD/docs/openapi.json
cd "$work"
"$schemathesis" run "$description" --url "http://$admin" \
    --header "Authorization: Bearer $token" --exclude-path /api/v1/events \
    --exclude-checks positive_data_acceptance --generation-deterministic --max-examples 50 --no-color --warnings off || {
    cat "$work/log" >&2
    exit 1
}
kill -0 "$pid"
