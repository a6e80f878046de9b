#!/usr/bin/env bash
# Builds the image: by the Dockerfile alone where the engine can pull its bases and fetch crates; otherwise cargo builds
# the binary out here, and it goes onto a base made from this machine's Debian packages (deploy/base-image.sh).
#
#   deploy/build-image.sh NAME[:TAG]
#
# IMAGE_BUILD=inside|outside forces one way; BUILD_BASE and RUN_BASE name other base images.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -ne 1 ]; then
    echo "usage: ${0##*/} NAME[:TAG]" >&2
    exit 2
fi
image=$1
build_base=${BUILD_BASE:-rust:1-bookworm}
run_base=${RUN_BASE:-}
how=${IMAGE_BUILD:-auto}

available() {
    docker image inspect "$1" >/dev/null 2>&1 || timeout 600 docker pull --quiet "$1" >/dev/null 2>&1
}
# Questions that can only be answered from the network: by cargo, and by apt, from where protoc comes.
sources_inside() {
    timeout 120 docker run --rm "$build_base" \
        sh -c 'cargo info --quiet bytes && apt-get -qq -o APT::Update::Error-Mode=any update' >/dev/null 2>&1
}

if [ "$how" = auto ]; then
    how=outside
    if ! available "$build_base"; then
        why="$build_base is not here and cannot be pulled"
    elif ! available "${run_base:-debian:bookworm-slim}"; then
        why="${run_base:-debian:bookworm-slim} is not here and cannot be pulled"
    elif ! sources_inside; then
        why="crates or Debian packages cannot be fetched inside a container"
    else
        how=inside
        why="base images, crates and Debian packages can be reached"
    fi
else
    why="as asked by IMAGE_BUILD"
fi

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
labels=(--label "org.opencontainers.image.version=$version" --label "org.opencontainers.image.created=$(date -u +%Y-%m-%dT%H:%M:%SZ)")
if revision=$(git rev-parse HEAD 2>/dev/null); then
    labels+=(--label "org.opencontainers.image.revision=$revision")
fi

case $how in
    inside)
        echo "building $image by the Dockerfile alone ($why)"
        docker build "${labels[@]}" --build-arg BUILD_BASE="$build_base" ${run_base:+--build-arg RUN_BASE="$run_base"} -t "$image" .
        ;;
    outside)
        echo "building $image around a binary built outside the engine ($why)"
        work=$(mktemp -d)
        frame=clearcoat-frame:$$
        made=("$frame")
        trap 'rm -rf "$work"; docker rmi "${made[@]}" >/dev/null 2>&1 || true' EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM

        deploy/build-binary.sh
        strip --strip-debug -o "$work/clearcoat" "${CARGO_TARGET_DIR:-target}/release/clearcoat"
        deploy/third-party.sh >"$work/third-party.txt"

        if [ -z "$run_base" ]; then
            run_base=clearcoat-base:$$
            made+=("$run_base")
            deploy/base-image.sh "$run_base"
        fi
        docker build --quiet --target frame --build-arg RUN_BASE="$run_base" -t "$frame" . >/dev/null
        printf 'FROM %s\nCOPY clearcoat /usr/local/bin/clearcoat\nCOPY third-party.txt /usr/share/doc/clearcoat/\n' "$frame" |
            docker build --quiet "${labels[@]}" -t "$image" -f - "$work" >/dev/null
        ;;
    *)
        echo "IMAGE_BUILD=$how: inside, outside or auto is allowed" >&2
        exit 2
        ;;
esac
echo "$image: $(($(docker image inspect --format '{{.Size}}' "$image") / 1000)) kB"
