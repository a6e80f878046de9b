#!/usr/bin/env bash
# Makes a runtime base image out of this machine's Debian packages, for where no image can be pulled.
# It holds the C library, the CA certificates and what names the system to a scanner: no shell, no package manager; and
# each PACKAGE with all that it depends on, unpacked: no install script has run, so there are no users and no alternatives.
# The packages come by apt from wherever this machine gets its own, so libc is the one that the binary was linked with.
# Needs apt, dpkg-deb and a Docker engine; neither root nor a network inside Docker.
#
#   deploy/base-image.sh NAME[:TAG] [PACKAGE...]
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: ${0##*/} NAME[:TAG] [PACKAGE...]" >&2
    exit 2
fi
image=$1
shift
packages=(base-files ca-certificates libc6 libgcc-s1)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
root=$work/root
mkdir -p "$work/debs/partial" "$root"
# What is installed here: nothing.
touch "$work/status"

# download [PACKAGE...], each with what it depends on.
download() (
    cd "$work/debs"
    # As ourselves: apt's own user may not write to a private directory.
    apt=(apt-get -qq -o APT::Sandbox::User="$(id -un)")
    "${apt[@]}" download "${packages[@]}" </dev/null
    if [ $# -gt 0 ]; then
        "${apt[@]}" -o Dir::State::status="$work/status" -o Dir::Cache::archives="$work/debs" -o Debug::NoLocking=1 \
            install --yes --download-only --no-install-recommends "$@" </dev/null >/dev/null
    fi
)
refresh() {
    if [ "$(id -u)" -eq 0 ]; then apt-get -qq update; else sudo apt-get -qq update; fi </dev/null
}
# Lists that are missing, or so old that the mirror has dropped the files they name.
download "$@" || { refresh && download "$@"; }

# Debian's merged /usr, as an installed system has it.
mkdir -p "$root"/usr/{bin,sbin,lib,lib64}
for dir in bin sbin lib lib64; do ln -s "usr/$dir" "$root/$dir"; done

mkdir -p "$root/var/lib/dpkg"
for deb in "$work"/debs/*.deb; do
    # Through tar, because dpkg-deb would replace the links just made by directories.
    dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink -C "$root"
    # What dpkg would have noted: scanners read here which version of what is inside.
    dpkg-deb --field "$deb" | sed '/^Package:/a Status: install ok installed' >>"$root/var/lib/dpkg/status"
    echo >>"$root/var/lib/dpkg/status"
done

# What the packages' install scripts would have done.
cat "$root"/usr/share/ca-certificates/mozilla/*.crt >"$root/etc/ssl/certs/ca-certificates.crt"
printf 'root:x:0:0:root:/root:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n' >"$root/etc/passwd"
printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
# Without this file libc would ask DNS before it looks at /etc/hosts.
printf 'passwd: files\ngroup: files\nhosts: files dns\n' >"$root/etc/nsswitch.conf"

# No program in here reads them; the licences (copyright files) stay.
rm -rf "$root"/usr/lib/*/gconv "$root"/usr/share/{ca-certificates,info,lintian,locale,man}
find "$root/usr/share/doc" -type f ! -name copyright -delete

tar -C "$root" --numeric-owner --owner=0 --group=0 --sort=name -c . | docker import - "$image" >/dev/null
size=$(docker image inspect --format '{{.Size}}' "$image")
echo "$image: $((size / 1000)) kB, from $(sed -n 's/^PRETTY_NAME="\(.*\)"/\1/p' "$root/usr/lib/os-release")"
