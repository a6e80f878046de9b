#!/usr/bin/env bash
# Runs an image as an operator would, and checks what it promises: the configuration inside it is sound, it does not run
# as root, it is ready, it carries out purges and keeps them over a restart, and it ends cleanly.
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

cleanup() {
    local status=$?
    if [ $status -ne 0 ]; then
        docker logs "$name" 2>&1 | tail -n 50 | sed 's/^/    /' || true
    fi
    {
        docker rm --force "$name"
        docker volume rm --force "$name"
        docker network rm "$name"
    } >/dev/null 2>&1 || true
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
    echo "image test failed: $*" >&2
    exit 1
}

health() { docker inspect --format '{{.State.Status}}/{{.State.Health.Status}}' "$name"; }

wait_healthy() {
    local _
    for _ in {1..120}; do
        case $(health) in
            running/healthy) return ;;
            running/starting) sleep 0.25 ;;
            *) break ;;
        esac
    done
    fail "not healthy: $(health)"
}

# Prints what the purge answered, and leaves the position in $position.
purged() {
    [[ $1 =~ position[^0-9]{0,4}([0-9]+) ]] || fail "a purge that names no position: $1"
    position=${BASH_REMATCH[1]}
    echo "purge: $1"
}

stop_cleanly() {
    docker stop --time 30 "$name" >/dev/null
    local code
    code=$(docker inspect --format '{{.State.ExitCode}}' "$name")
    [ "$code" = 0 ] || fail "exit status $code after docker stop"
}

docker run --rm --network none "$image" check >/dev/null || fail "check refuses the configuration in the image"
if docker run --rm --network none --env CLEARCOAT_PURGE__ACK_TIMEOUT=never "$image" check >/dev/null 2>&1; then
    fail "check accepts a configuration that is wrong"
fi
echo "check: the configuration in the image is sound, and a wrong one is refused"

docker network create --internal "$name" >/dev/null
docker volume create "$name" >/dev/null
# As locked down as a careful cluster runs it.
docker run --detach --name "$name" --network "$name" --volume "$name:/var/lib/clearcoat" \
    --read-only --cap-drop ALL --security-opt no-new-privileges "$image" >/dev/null
wait_healthy

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

stop_cleanly
docker start "$name" >/dev/null
wait_healthy
answer=$(docker exec "$name" clearcoat purge --tag cat_p_1) || fail "purge after the restart: exit status $?: $answer"
purged "$answer"
[ "$position" -gt "$second" ] || fail "position $position after a restart does not follow $second: the journal was lost"
stop_cleanly
echo "stop: clean, twice; the journal outlived the container's restart"
