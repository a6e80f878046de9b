#!/usr/bin/env bash
# Runs an image as an operator would, and checks what it promises: the configuration inside it is sound, it does not run
# as root, it is ready, it carries out purges and keeps them over a restart, and it ends cleanly; as another user, and on a
# volume that is not its own; it says what is in it. Then as the agent of a node that runs in the container, with an etcd of this machine.
# On a network of its own that leads nowhere. Leaves nothing behind.
#
#   deploy/test-image.sh NAME[:TAG]
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: ${0##*/} NAME[:TAG]" >&2
    exit 2
fi
image=$1
name=clearcoat-test-$$
work=$(mktemp -d)
helpers=() # Processes of ours.

cleanup() {
    local status=$?
    if [ $status -ne 0 ]; then
        for container in "$name" "$name-other" "$name-agent"; do
            docker logs "$container" 2>&1 | tail -n 50 | sed 's/^/    /' || true
        done
    fi
    {
        [ ${#helpers[@]} -eq 0 ] || kill "${helpers[@]}" || true
        docker rm --force --volumes "$name" "$name-other" "$name-agent"
        docker volume rm --force "$name"
        docker network rm "$name"
        rm -rf "$work"
    } >/dev/null 2>&1 || true
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
    echo "image test failed: $*" >&2
    exit 1
}

health() { docker inspect --format '{{.State.Status}}/{{.State.Health.Status}}' "$1"; }

# wait_healthy CONTAINER
wait_healthy() {
    local _
    for _ in {1..120}; do
        case $(health "$1") in
            running/healthy) return ;;
            running/starting) sleep 0.25 ;;
            *) break ;;
        esac
    done
    fail "not healthy: $(health "$1")"
}

# What is said of it, and what scanners find in it.
test_contents() {
    local key value
    for key in title description vendor authors licenses version created; do
        value=$(docker image inspect --format "{{index .Config.Labels \"org.opencontainers.image.$key\"}}" "$image")
        [ -n "$value" ] || fail "the label $key is missing"
    done
    docker create --name "$name-other" "$image" >/dev/null
    docker cp "$name-other:/usr/local/bin/clearcoat" "$work/clearcoat"
    docker cp "$name-other:/usr/share/doc/clearcoat/third-party.txt" "$work/third-party"
    docker rm --volumes "$name-other" >/dev/null
    for text in 'tokio 1' 'University of Cambridge' 'Redistributions in binary form'; do
        grep -qF "$text" "$work/third-party" || fail "the licences of others are without: $text"
    done
    # Where cargo-auditable could not be had, the build has said so.
    if readelf --section-headers --wide "$work/clearcoat" | grep -qF .dep-v0; then
        objcopy --dump-section .dep-v0="$work/crates" "$work/clearcoat" "$work/copy"
        crates=$(python3 -c 'import json, sys, zlib
print(*(package["name"] for package in json.loads(zlib.decompress(open(sys.argv[1], "rb").read()))["packages"]))' "$work/crates")
        for crate in clearcoat tokio rustls; do
            [[ " $crates " == *" $crate "* ]] || fail "the list of crates in the binary has no $crate: $crates"
        done
        echo "contents: labels, and $(wc -w <<<"$crates") crates"
    else
        echo "contents: labels, and no list of crates"
    fi
}

# other ARGUMENT...: another container, locked down as well; whether its user may write is the question.
other() {
    docker rm --force --volumes "$name-other" >/dev/null 2>&1 || true
    docker run --detach --name "$name-other" --network none --read-only --cap-drop ALL --security-opt no-new-privileges "$@" >/dev/null
}

test_users() {
    local said
    # A tmpfs is root's, as is the volume that somebody else made.
    other --tmpfs /var/lib/clearcoat "$image"
    [ "$(timeout 60 docker wait "$name-other")" = 1 ] || fail "it runs without a place for its journal"
    said=$(docker logs "$name-other" 2>&1)
    [[ $said == *"runs as uid 10001: chown it to that, or run clearcoat as its owner"* ]] || fail "a volume of root is met with: $said"

    other --tmpfs /var/lib/clearcoat:uid=10001,gid=10001 "$image"
    wait_healthy "$name-other"
    other --user 4711:4711 --tmpfs /var/lib/clearcoat:uid=4711,gid=4711 "$image"
    wait_healthy "$name-other"
    [ "$(docker top "$name-other" -eo uid,pid | awk 'NR > 1 { print $1 }' | sort -u)" = 4711 ] || fail "it does not run as the user that was asked for"
    echo "users: root's volume is refused with words; a tmpfs, and another user, will do"
}

# A clearcoat that knows no fleet yet runs, and answers, and is not ready.
test_readiness() {
    other --tmpfs /var/lib/clearcoat:uid=10001,gid=10001 --env CLEARCOAT_REGISTRY__KIND=etcd --env CLEARCOAT_REGISTRY__ETCD__ENDPOINTS=http://127.0.0.1:9 \
        --health-interval 1s --health-start-period 0s --health-retries 3 "$image"
    local _
    for _ in {1..120}; do
        [ "$(health "$name-other")" != running/unhealthy ] || break
        sleep 0.25
    done
    [ "$(health "$name-other")" = running/unhealthy ] || fail "without a fleet it is $(health "$name-other")"
    local said
    said=$(docker exec "$name-other" clearcoat status 2>&1) && fail "status has nothing to say of a clearcoat that is not ready"
    [[ $said == *"is not ready: "* ]] || fail "it does not answer: $said"
    docker rm --force --volumes "$name-other" >/dev/null
    echo "health: not ready is unhealthy"
}

# Prints what the purge answered, and leaves the position in $position.
purged() {
    [[ $1 =~ position[^0-9]{0,4}([0-9]+) ]] || fail "a purge that names no position: $1"
    position=${BASH_REMATCH[1]}
    echo "purge: $1"
}

stop_cleanly() {
    docker stop --time 30 "$1" >/dev/null
    local code
    code=$(docker inspect --format '{{.State.ExitCode}}' "$1")
    [ "$code" = 0 ] || fail "exit status $code after docker stop"
}

export ETCDCTL_API=3
node=/clearcoat/v1/nodes/web/web-1

# Where a container finds this machine, on the network that is there for it.
start_etcd() {
    etcd=http://$1:2379
    etcd --data-dir "$work/etcd" --listen-client-urls "$etcd" --advertise-client-urls "$etcd" \
        --listen-peer-urls "http://$1:2380" --initial-advertise-peer-urls "http://$1:2380" \
        --initial-cluster "default=http://$1:2380" >"$work/etcd.log" 2>&1 &
    helpers+=($!)
    local _
    for _ in {1..60}; do
        ! etcdctl --endpoints "$etcd" endpoint health >/dev/null 2>&1 || return 0
        sleep 0.25
    done
    tail -n 20 "$work/etcd.log" | sed 's/^/    /'
    fail "etcd does not serve at $etcd"
}

wait_registered() {
    local _
    for _ in {1..60}; do
        value=$(etcdctl --endpoints "$etcd" get --print-value-only "$node")
        [ -z "$value" ] || return 0
        sleep 0.25
    done
    fail "the node is not registered"
}

# The events are written by a process of their own, which may be a moment behind.
wait_drained() {
    local _ events
    for _ in {1..20}; do
        events=$(grep -oE '^(PUT|DELETE)$|"state":"[a-z]+"' "$work/events" | tr '\n' ' ')
        [[ $events != *'"state":"drain" DELETE '* ]] || return 0
        sleep 0.25
    done
    fail "it did not drain before it went: $events"
}

# The agent as the first process of a container; the node is another clearcoat, since the image has nothing else that runs.
test_agent() {
    local gateway address began
    gateway=$(docker network inspect --format '{{(index .IPAM.Config 0).Gateway}}' "$name")
    if ! hostname -I | grep -qwF "$gateway"; then
        echo "agent: not tested, because the engine is on another machine"
        return
    fi
    start_etcd "$gateway"
    etcdctl --endpoints "$etcd" watch "$node" >"$work/events" 2>&1 &
    helpers+=($!)

    docker run --detach --name "$name-agent" --network "$name" --read-only --cap-drop ALL --entrypoint clearcoat "$image" \
        agent --role web --id web-1 --port 8080 --etcd "$etcd" --check http://127.0.0.1:9180/readyz --drain 2s \
        -- clearcoat serve >/dev/null
    wait_registered
    address=$(docker inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$name-agent")
    [[ $value == *"\"address\":\"$address:8080\""* ]] || fail "registered as $value, and its address is $address"
    echo "agent: $value"

    # With the time that docker stop gives by itself.
    began=$SECONDS
    docker stop "$name-agent" >/dev/null
    local code
    code=$(docker inspect --format '{{.State.ExitCode}}' "$name-agent")
    [ "$code" = 0 ] || fail "the agent ended with $code, and its node ends with 0"
    value=$(etcdctl --endpoints "$etcd" get --print-value-only "$node")
    [ -z "$value" ] || fail "still registered after the end: $value"
    wait_drained
    echo "agent: drained, ended and gone after $((SECONDS - began)) s"

    code=0
    docker run --rm --network "$name" --entrypoint clearcoat "$image" \
        agent --role web --port 8080 --etcd "$etcd" -- clearcoat check --config nowhere.toml >/dev/null 2>&1 || code=$?
    [ "$code" = 1 ] || fail "the agent ended with $code, and its command with 1"
    echo "agent: ends with the status of its command"
}

docker run --rm --network none "$image" check >/dev/null || fail "check refuses the configuration in the image"
if docker run --rm --network none --env CLEARCOAT_PURGE__ACK_TIMEOUT=never "$image" check >/dev/null 2>&1; then
    fail "check accepts a configuration that is wrong"
fi
echo "check: the configuration in the image is sound, and a wrong one is refused"

test_contents
test_users
test_readiness

docker network create --internal "$name" >/dev/null
docker volume create "$name" >/dev/null
# As locked down as a careful cluster runs it.
docker run --detach --name "$name" --network "$name" --volume "$name:/var/lib/clearcoat" \
    --read-only --cap-drop ALL --security-opt no-new-privileges "$image" >/dev/null
wait_healthy "$name"

uids=$(docker top "$name" -eo uid,pid | awk 'NR > 1 { print $1 }' | sort -u)
[ "$uids" = 10001 ] || fail "runs as uid $uids, wanted 10001"
echo "serve: healthy, as uid $uids"

answer=$(docker exec "$name" clearcoat purge --tag cat_p_1) || fail "purge inside the container: exit status $?: $answer"
purged "$answer"
first=$position

answer=$(docker run --rm --network "$name" "$image" purge --endpoint "http://$name:6081" --tag cat_p_1) ||
    fail "purge from another container: exit status $?: $answer"
purged "$answer"
[ "$position" -gt "$first" ] || fail "position $position does not follow $first"
second=$position

stop_cleanly "$name"
docker start "$name" >/dev/null
wait_healthy "$name"
answer=$(docker exec "$name" clearcoat purge --tag cat_p_1) || fail "purge after the restart: exit status $?: $answer"
purged "$answer"
[ "$position" -gt "$second" ] || fail "position $position after a restart does not follow $second: the journal was lost"
stop_cleanly "$name"
echo "stop: clean, twice; the journal outlived the container's restart"

test_agent
