#!/bin/sh
# Registers a node with clearcoat through etcd's JSON gateway: for hosts on which `clearcoat agent` cannot run.
#
#   ETCD=http://203.0.113.1:2379 ROLE=web ID=web-1 ADDRESS=192.0.2.5:80 register.sh run
#
# run         registers, refreshes until SIGTERM or SIGINT, then drains for DRAIN seconds and deregisters
# register    writes the key and prints the lease; run `LEASE=… register.sh refresh` more often than every TTL seconds
# refresh     a sign of life; prints the lease, which is another one where etcd has ended the first
# deregister  takes the key away, if it is of this LEASE, and ends the lease
#
# It checks nothing: start it when the node is ready, and end it before the node ends.
set -eu

ETCD=${ETCD:-http://127.0.0.1:2379}
PREFIX=${PREFIX:-/clearcoat/v1/}
TTL=${TTL:-30}
DRAIN=${DRAIN:-5}
LEASE=${LEASE:-}

usage() {
    echo "usage: ROLE=web|varnish ID=… ADDRESS=HOST:PORT [ETCD=URL] [PREFIX=/clearcoat/v1/] [TTL=30] [DRAIN=5]" >&2
    echo "       [LEASE=…] ${0##*/} run|register|refresh|deregister" >&2
    exit 2
}
if [ $# -ne 1 ] || [ -z "${ROLE:-}" ] || [ -z "${ID:-}" ] || [ -z "${ADDRESS:-}" ]; then usage; fi

# The gateway wants keys and values in base64.
encode() { printf %s "$1" | base64 | tr -d '\n'; }
key=$(encode "${PREFIX}nodes/$ROLE/$ID")

# call PATH JSON: prints the answer. Fails where there is none, or it is an error.
call() { curl -sS --fail --max-time 5 -H 'Content-Type: application/json' -d "$2" "$ETCD/v3/$1"; }

# number NAME: the value of a member of the answer on standard input; 64 bit numbers come as strings.
number() { sed -n "s/.*\"$1\":\"\\{0,1\\}\\([0-9]*\\).*/\\1/p"; }

# put STATE: writes the key with our lease.
put() {
    record=$(printf '{"address":"%s","state":"%s"}' "$ADDRESS" "$1")
    call kv/put "{\"key\":\"$key\",\"value\":\"$(encode "$record")\",\"lease\":\"$LEASE\"}" >/dev/null
}

register() {
    LEASE=$(call lease/grant "{\"TTL\":\"$TTL\"}" | number ID)
    [ -n "$LEASE" ] && put "${state:-up}"
}

# The answer of a lease that etcd does not know any more has no TTL.
refresh() {
    [ -n "$LEASE" ] || { register; return; }
    answer=$(call lease/keepalive "{\"ID\":\"$LEASE\"}") || return
    [ -n "$(printf %s "$answer" | number TTL)" ] || register
}

# Only a key of our own lease: another process may have registered under this name by now.
deregister() {
    ours="{\"key\":\"$key\",\"target\":\"LEASE\",\"lease\":\"$LEASE\"}"
    call kv/txn "{\"compare\":[$ours],\"success\":[{\"request_delete_range\":{\"key\":\"$key\"}}]}" >/dev/null
    call lease/revoke "{\"ID\":\"$LEASE\"}" >/dev/null
}

# rest SECONDS: a signal ends it at once.
rest() {
    sleep "$1" &
    wait $! || true
}

run() {
    ending=
    trap 'ending=1' TERM INT
    pause=$((TTL / 3))
    [ "$pause" -gt 0 ] || pause=1
    # While etcd is away it is tried again: the node lives on.
    until [ -n "$ending" ]; do
        refresh || echo "not registered: etcd does not answer; it is tried again" >&2
        [ -n "$ending" ] || rest "$pause"
    done
    [ -n "$LEASE" ] || return 0
    state=drain
    put drain || true
    rest "$DRAIN"
    deregister
}

case $1 in
    run) run ;;
    register) register && echo "$LEASE" ;;
    refresh) refresh && echo "$LEASE" ;;
    deregister) deregister ;;
    *) usage ;;
esac
