#!/usr/bin/env bash
# Runs compose.yaml, and does to it what happens to a shop: Varnish and web are scaled up and down, containers are killed, paused,
# cut off from the network, clearcoats are recreated with other addresses. All the while 200 pages a second are read and five
# products are saved and purged, by clients inside the network (deploy/compose/checker.php): none may be refused, none stale. While
# clearcoats are restarted, reloaded and recreated, uploads of 20 s are under way: none may be cut.
#
# What no fleet can hide is a clearcoat that is itself killed, paused or cut off, from those connected to it. Then, and at
# no other time, the clients ask the other one, as a balancer would.
#
# Needs the images (deploy/compose/build-images.sh), under one tag. Leaves nothing behind but them.
#
#   deploy/test-compose.sh [TAG]              # dev
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -gt 1 ]; then
    echo "usage: ${0##*/} [TAG]" >&2
    exit 2
fi
export CLEARCOAT_TAG=${1:-dev}
# Any free port.
export EDGE_1=0 EDGE_2=0 ADMIN_1=0 ADMIN_2=0
export COMPOSE_PROJECT_NAME=clearcoat-test-$$
load=$COMPOSE_PROJECT_NAME-load
dummies=()
clients=none

if docker compose version >/dev/null 2>&1; then
    compose() { docker compose "$@"; }
else
    compose() { docker-compose "$@"; }
fi
quietly() {
    local output
    output=$("$@" 2>&1 </dev/null) || { echo "$output" >&2 && return 1; }
}

cleanup() {
    local status=$?
    if [ $status -ne 0 ]; then
        docker logs "$load" 2>&1 | tail -n 40 | sed 's/^/    /' || true
        table 1 | sed 's/^/    /' || true
        compose logs --no-color --tail 30 clearcoat-1 clearcoat-2 varnish 2>&1 | sed 's/^/    /' || true
    fi
    {
        docker rm --force --volumes "$load" "${dummies[@]}"
        # A paused container is not stopped.
        compose unpause
        compose kill
        compose down --volumes --remove-orphans
    } >/dev/null 2>&1 </dev/null || true
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

began=$SECONDS
say() { printf '%3d s  %s\n' $((SECONDS - began)) "$*"; }
fail() {
    echo "compose test failed: $*" >&2
    exit 1
}
# eventually WHAT COMMAND...
eventually() {
    local what=$1 end=$((SECONDS + 90))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || fail "gave up waiting until $what"
        [ $clients = none ] || [ "$(docker inspect --format '{{.State.Status}}' "$load")" = running ] || fail "the clients ended"
        sleep 0.5
    done
}

# container SERVICE [NUMBER], in the order of their ids.
container() { compose ps -q "$1" </dev/null | sed -n "${2:-1}p"; }
address() { docker inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$1"; }
addresses_of() { for one in "$@"; do address "$one"; done; }
table() { docker exec "$(container "clearcoat-$1")" clearcoat status; }
# sees CLEARCOAT VARNISH WEB: it sees exactly as many well nodes, and the other clearcoat.
sees() {
    table "$1" 2>/dev/null | awk -v varnish="$2" -v web="$3" '
        $4 == "up" && $5 == "yes" { well[$1]++ }
        /^clearcoat-/ { replicas++; if ($4 == "yes") confirming++ }
        END { exit !(well["varnish"] == varnish && well["web"] == web && replicas == 2 && confirming == 1) }'
}
is_whole() { sees 1 "$1" "$2" && sees 2 "$1" "$2"; }
# whole VARNISH WEB
whole() { eventually "$1 Varnish and $2 web nodes are well" is_whole "$@"; }
in_load() { docker exec "$load" sh -c "$1"; }
# The clients may ask the other clearcoat, from now on.
excuse() { in_load ': >/tmp/excused'; }
# No more: what was under way then has come to its end.
no_excuse() {
    sleep 4
    in_load 'rm /tmp/excused'
}
network=${COMPOSE_PROJECT_NAME}_default
cut_off() { docker network disconnect "$network" "$1"; }
# Every Varnish fetches from where the clearcoats are now, and nowhere else.
vcl_is_current() {
    local wanted id
    wanted=$(for number in 1 2; do address "$(container clearcoat-$number)"; done | sort | tr '\n' ' ')
    for id in $(compose ps -q varnish </dev/null); do
        [ "$(docker exec "$id" cat /var/lib/varnish/clearcoat.vcl | sed -n 's/^ *\.host = "\(.*\)";/\1/p' | sort | tr '\n' ' ')" = "$wanted" ] || return 1
        # The one in use is of the agent, or that of the start if nothing has changed since.
        docker exec "$id" varnishadm -n /var/lib/varnish/node backend.list | grep -c '\.origin_.*healthy' | grep -x 2 >/dev/null || return 1
    done
}

start_clients() {
    # Names that are not there are not looked for elsewhere.
    docker create --name "$load" --network "$network" --dns 127.0.0.1 --tmpfs /tmp --volume "${COMPOSE_PROJECT_NAME}_shop:/var/lib/shop" \
        --entrypoint php8.2 "clearcoat-web:$CLEARCOAT_TAG" /srv/checker.php 200 10 5 clearcoat-1 clearcoat-2 >/dev/null 2>&1
    docker cp deploy/compose/checker.php "$load:/srv/checker.php"
    docker start "$load" >/dev/null
    clients=started
}
clients_purge() { [ "$(docker exec "$load" ls /tmp/checker 2>/dev/null | grep -c promised)" -gt 20 ]; }
end_clients() {
    in_load ': >/tmp/stop'
    local code
    code=$(timeout 60 docker wait "$load") || fail "the clients do not end"
    local total
    total=$(docker logs "$load" 2>&1 | tail -n 1)
    say "$total"
    clients=none
    if ! [[ $total =~ '"uploads":'([0-9]+) ]] || [ "${BASH_REMATCH[1]}" -lt 9 ]; then fail "too few uploads"; fi
    [ "$code" = 0 ] || fail "a page was refused or stale, an upload was cut, or too few were read"
}

scale() { quietly compose up --detach --no-recreate --scale varnish="$1" --scale web="$2"; }

# occupy ADDRESS: so that who had it gets another one.
occupy() {
    local name
    # Not `grep -q`, which would end before all was said to it.
    until addresses_of "${dummies[@]}" | grep -xF "$1" >/dev/null; do
        [ ${#dummies[@]} -lt 16 ] || fail "no container gets $1"
        name=$COMPOSE_PROJECT_NAME-dummy-${#dummies[@]}
        dummies+=("$name")
        docker run --detach --name "$name" --network "$network" --entrypoint sleep "clearcoat-etcd:$CLEARCOAT_TAG" 1000 >/dev/null
    done
}
give_back() {
    docker rm --force --volumes "${dummies[@]}" >/dev/null
    dummies=()
}

# recreate NUMBER: as another container, with another address.
recreate() {
    local old new service=clearcoat-$1
    old=$(address "$(container "$service")")
    quietly compose stop "$service"
    quietly compose rm --force "$service"
    occupy "$old"
    quietly compose up --detach --no-deps --no-recreate "$service"
    new=$(address "$(container "$service")")
    give_back
    [ "$new" != "$old" ] || fail "$service has its old address, $old"
    say "$service: $old is $new"
}

say "docker-compose up"
quietly compose up --detach
whole 3 2
eventually "each Varnish has a VCL" vcl_is_current
start_clients
eventually "clients purge" clients_purge

say "five Varnish and four web nodes"
scale 5 4
whole 5 4
say "three and two"
scale 3 2
whole 3 2

say "a member of etcd is killed, another one paused"
docker kill "$(container etcd-1)" >/dev/null
sleep 2
docker start "$(container etcd-1)" >/dev/null
sleep 5
docker pause "$(container etcd-2)" >/dev/null
sleep 5
docker unpause "$(container etcd-2)" >/dev/null
whole 3 2

say "a Varnish and a web node are killed"
killed=("$(container varnish 1)" "$(container web 1)")
docker kill "${killed[@]}" >/dev/null
whole 2 1
docker start "${killed[@]}" >/dev/null
whole 3 2
say "a Varnish and a web node are paused"
paused=("$(container varnish 2)" "$(container web 2)")
docker pause "${paused[@]}" >/dev/null
whole 2 1
docker unpause "${paused[@]}" >/dev/null
whole 3 2
say "a Varnish and a web node are cut off"
addresses=()
for id in "${paused[@]}"; do
    addresses+=("$(address "$id")")
    cut_off "$id"
done
whole 2 1
for number in 0 1; do
    id=${paused[number]}
    old=${addresses[number]}
    occupy "$old"
    docker network connect "$network" "$id"
    [ "$(address "$id")" != "$old" ] || fail "it has its old address, $old"
    say "$old is $(address "$id")"
done
give_back
whole 3 2

excuse
say "a clearcoat is killed"
id=$(container clearcoat-2)
docker kill "$id" >/dev/null
sleep 3
docker start "$id" >/dev/null
whole 3 2
say "a clearcoat is paused"
docker pause "$(container clearcoat-1)" >/dev/null
sleep 4
docker unpause "$(container clearcoat-1)" >/dev/null
whole 3 2
say "a clearcoat is cut off"
in_load ': >/tmp/cut-off'
cut_off "$id"
sleep 8
docker network connect --alias clearcoat --alias clearcoat-2 "$network" "$id"
whole 3 2
eventually "every Varnish has found it" vcl_is_current
no_excuse
in_load 'rm /tmp/cut-off'

in_load ': >/tmp/uploads'
say "both are reloaded each second"
for _ in {1..10}; do
    docker kill --signal HUP "$(container clearcoat-1)" "$(container clearcoat-2)" >/dev/null
    sleep 1
done
whole 3 2
for number in 1 2; do
    say "clearcoat-$number is ended by SIGTERM, and recreated with another address"
    excuse
    recreate $number
    whole 3 2
    eventually "every Varnish has found it" vcl_is_current
    no_excuse
done
in_load 'rm /tmp/uploads'
end_clients
say "docker-compose down"
# It has a volume of the project.
docker rm --volumes "$load" >/dev/null
quietly compose down --volumes
left=$({ docker ps --all --format '{{.Names}}' && docker volume ls --format '{{.Name}}' && docker network ls --format '{{.Name}}'; } | grep "^$COMPOSE_PROJECT_NAME" || true)
[ -z "$left" ] || fail "left behind: $left"
