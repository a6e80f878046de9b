#!/usr/bin/env bash
# Makes the images of compose.yaml: by their Dockerfiles alone where the engine can pull debian:bookworm-slim and fetch packages,
# otherwise on bases made from this machine's Debian packages (deploy/base-image.sh).
#
#   deploy/compose/build-images.sh [TAG]      # dev; makes clearcoat-etcd:TAG, clearcoat-varnish:TAG, clearcoat-web:TAG
#
# clearcoat:TAG is made first if it is not there (deploy/build-image.sh). IMAGE_BUILD=inside|outside forces one way.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ $# -gt 1 ]; then
    echo "usage: ${0##*/} [TAG]" >&2
    exit 2
fi
tag=${1:-dev}
debian=debian:bookworm-slim
how=${IMAGE_BUILD:-auto}

docker image inspect "clearcoat:$tag" >/dev/null 2>&1 || deploy/build-image.sh "clearcoat:$tag"

can_fetch_inside() {
    { docker image inspect "$debian" || timeout 600 docker pull --quiet "$debian"; } >/dev/null 2>&1 &&
        timeout 120 docker run --rm "$debian" apt-get -qq -o APT::Update::Error-Mode=any update >/dev/null 2>&1
}
case $how in
    auto) if can_fetch_inside; then how=inside; else how=outside; fi ;;
    inside | outside) ;;
    *)
        echo "IMAGE_BUILD=$how: inside, outside or auto is allowed" >&2
        exit 2
        ;;
esac

bases=clearcoat-base-of
trap 'docker rmi $bases-{etcd,varnish,web}:$$ >/dev/null 2>&1 || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# image NAME PACKAGE...
image() {
    local name=$1 base=$debian
    shift
    if [ "$how" = outside ]; then
        base=$bases-$name:$$
        deploy/base-image.sh "$base" "$@" dash coreutils >/dev/null
    fi
    docker build --quiet --build-arg BASE="$base" --build-arg CLEARCOAT="clearcoat:$tag" -t "clearcoat-$name:$tag" "deploy/compose/$name" >/dev/null
    echo "clearcoat-$name:$tag: $(($(docker image inspect --format '{{.Size}}' "clearcoat-$name:$tag") / 1000)) kB"
}

# Side by side: each waits for downloads and for the engine most of the time.
image etcd etcd-server etcd-client &
running=($!)
image varnish varnish &
running+=($!)
image web php8.2-cli &
running+=($!)
failed=0
for pid in "${running[@]}"; do wait "$pid" || failed=1; done
exit $failed
