#!/usr/bin/env bash
# Builds the Debian package around the release binary, which may be there from the image, and prints where it is.
# It is for the Debian that it is built on: the libraries that it asks for are those of this machine.
#
#   deploy/build-deb.sh
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-target}
stage=$target/release/package
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)-1
maintainer=$(sed -n 's/^maintainer = "\(.*\)"/\1/p' Cargo.toml)

deploy/build-binary.sh

rm -rf "$stage"
mkdir -p "$stage"/{completions,doc}
"$target/release/clearcoat" man "$stage"
"$target/release/clearcoat" completions bash >"$stage/completions/clearcoat"
"$target/release/clearcoat" completions zsh >"$stage/completions/_clearcoat"
"$target/release/clearcoat" completions fish >"$stage/completions/clearcoat.fish"
# What users read; plan.md is for those who go on with the work.
cp docs/*.md docs/*.png docs/openapi.json "$stage/doc"
rm "$stage/doc/plan.md"
deploy/third-party.sh | gzip -9 --no-name >"$stage/doc/third-party.gz"
gzip -9 --no-name --stdout CHANGELOG.md >"$stage/doc/changelog.gz"
gzip -9 --no-name "$stage"/man?/*
# The time of the commit, so that one commit makes one package.
made=$(git log -1 --format=%ct 2>/dev/null || date +%s)
cat >"$stage/changelog" <<EOF
clearcoat ($version) unstable; urgency=medium

  * What is new stands in /usr/share/doc/clearcoat/changelog.gz.

 -- $maintainer  $(LC_ALL=C date -u -R -d "@$made")
EOF

export SOURCE_DATE_EPOCH=$made
PATH=$PWD/$target/tools/cargo-deb/bin:$target/tools/cargo-deb/bin:$PATH
cargo deb --quiet --no-build --deb-version "$version" --strip --no-separate-debug-symbols
