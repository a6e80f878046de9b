#!/usr/bin/env bash
# Builds the release binary as it is shipped, in the image (deploy/build-image.sh) and in the Debian package
# (deploy/build-deb.sh): target/release/clearcoat. Who builds both builds it once.
#
#   deploy/build-binary.sh
set -euo pipefail
cd "$(dirname "$0")/.."

# The list of all crates goes into the binary (the section .dep-v0), where scanners look for it: a bill of materials that
# cannot get lost. The same version as in the Dockerfile; `make clean` removes it.
auditable() {
    local place=${CARGO_TARGET_DIR:-$PWD/target}/tools/cargo-auditable
    PATH=$place/bin:$PATH
    cargo auditable --version >/dev/null 2>&1 || cargo install --locked --quiet --root "$place" cargo-auditable@0.7.7
}

# Statically linked PCRE2 for the reason that the Dockerfile gives.
export PCRE2_SYS_STATIC=1
if auditable; then
    cargo auditable build --release --locked --bin clearcoat
else
    echo "the binary is without the list of its crates, because cargo-auditable cannot be installed" >&2
    cargo build --release --locked --bin clearcoat
fi
