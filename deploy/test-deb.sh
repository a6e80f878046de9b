#!/usr/bin/env bash
# Installs the Debian package where a real systemd runs, and checks what it promises: nothing starts that nobody has
# configured, the service runs as its own user and is what systemd says it is (ready, alive, reloaded), manual pages and
# completions work, an upgrade keeps configuration and journal, removing keeps both, and purging keeps nothing.
# The container is made of this machine's Debian packages (deploy/base-image.sh), and leads nowhere. Leaves nothing behind.
#
#   deploy/test-deb.sh PACKAGE.deb
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: ${0##*/} PACKAGE.deb" >&2
    exit 2
fi
package=$1
here=$(dirname "$0")
name=clearcoat-deb-test-$$
work=$(mktemp -d)

cleanup() {
    local status=$?
    if [ $status -ne 0 ]; then
        docker exec "$name" journalctl --unit clearcoat --no-pager --lines 40 2>&1 | sed 's/^/    /' || true
    fi
    {
        docker rm --force --volumes "$name"
        docker rmi "$name"
        rm -rf "$work"
    } >/dev/null 2>&1 || true
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
    echo "package test failed: $*" >&2
    exit 1
}

# Everything below happens in the container.
inside() { docker exec "$name" "$@"; }

# wait_until WHAT COMMAND...
wait_until() {
    local _ what=$1
    shift
    for _ in {1..240}; do
        ! "$@" >/dev/null 2>&1 || return 0
        sleep 0.25
    done
    fail "not within a minute: $what"
}

# The packages in there were unpacked and never configured, so dpkg finds no lists of their files and says so of each.
dpkg_does() {
    inside dpkg --force-confold "$@" >"$work/dpkg.log" 2>&1 && return
    sed 's/^/    /' "$work/dpkg.log"
    fail "dpkg $*"
}
property() { inside systemctl show --property "$1" --value clearcoat.service; }
is_active() { [ "$(property ActiveState)" = active ]; }

# configure TEXT
configure() {
    printf '%s\n' "$1" >"$work/clearcoat.toml"
    docker cp "$work/clearcoat.toml" "$name:/etc/clearcoat/clearcoat.toml" >/dev/null
}

# Purges as Magento does, and leaves the position in $position.
purge() {
    local answer
    answer=$(inside clearcoat purge --tag cat_p_1) || fail "purge: exit status $?: $answer"
    [[ $answer =~ position[^0-9]{0,4}([0-9]+) ]] || fail "a purge that names no position: $answer"
    position=${BASH_REMATCH[1]}
}

# An engine that may not hand out every capability hands out the one that systemd needs for its mounts.
start_systemd() {
    local way
    "$here/base-image.sh" "$name" systemd systemd-sysv dbus dpkg coreutils diffutils libc-bin tar dash procps bash bash-completion \
        init-system-helpers perl-base sed grep man-db busybox
    for way in "--cap-add SYS_ADMIN --security-opt seccomp=unconfined --security-opt apparmor=unconfined" --privileged; do
        # shellcheck disable=SC2086 # Several words.
        if docker run --detach --name "$name" $way --cgroupns private --network none --tmpfs /run --tmpfs /run/lock --tmpfs /tmp \
            --env container=docker "$name" /lib/systemd/systemd >/dev/null 2>&1; then
            # What runs it is degraded, as much in there was never configured.
            wait_until "systemd runs" inside systemctl list-jobs --no-legend
            return
        fi
        docker rm --force "$name" >/dev/null 2>&1 || true
    done
    fail "this engine runs no systemd, neither with CAP_SYS_ADMIN nor privileged"
}

# A package as the next release would be: another version, and another default configuration.
make_newer() {
    dpkg-deb --raw-extract "$package" "$work/newer"
    sed -i 's/^Version: .*/Version: 99.0-1/' "$work/newer/DEBIAN/control"
    echo "# of another version" >>"$work/newer/etc/clearcoat/clearcoat.toml"
    dpkg-deb --root-owner-group --build "$work/newer" "$work/newer.deb" >/dev/null
    docker cp "$work/newer.deb" "$name:/newer.deb" >/dev/null
}

test_install() {
    local version said unit
    dpkg_does --install /package.deb
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../Cargo.toml" | head -n 1)
    [ "$(inside clearcoat --version)" = "clearcoat $version" ] || fail "it is $(inside clearcoat --version), wanted $version"
    inside id clearcoat >/dev/null || fail "there is no user"
    said=$(inside clearcoat check --config /etc/clearcoat/clearcoat.toml 2>&1) || fail "it comes with a configuration that is refused: $said"
    for unit in service socket; do
        [ "$(inside systemctl is-enabled "clearcoat.$unit")" = disabled ] || fail "clearcoat.$unit is enabled before anybody has configured it"
    done
    [ "$(property ActiveState)" = inactive ] || fail "it is started before anybody has configured it"
    said=$(inside systemd-analyze verify clearcoat.service clearcoat.socket 2>&1) || fail "systemd-analyze: $said"
    [ -z "$said" ] || fail "systemd-analyze: $said"
    docker cp "$name:/usr/share/doc/clearcoat/third-party.gz" "$work/third-party.gz" >/dev/null
    zgrep -qF 'University of Cambridge' "$work/third-party.gz" || fail "it comes without the licences of others"
    echo "install: version, user, units, and nothing is started"
}

test_pages() {
    local page said pages
    pages=$(inside dpkg --listfiles clearcoat | sed -n 's|^/usr/share/man/man[15]/\(.*\)\.\([15]\)\.gz$|\2 \1|p')
    for page in "1 clearcoat" "1 clearcoat-serve" "1 clearcoat-node-drain" "5 clearcoat.toml"; do
        grep -qFx "$page" <<<"$pages" || fail "no manual page $page in: $pages"
    done
    while read -r page; do
        # shellcheck disable=SC2086 # A section and a name.
        said=$(inside env LC_ALL=C.UTF-8 man --warnings $page 2>&1 >/dev/null) || fail "man $page: $said"
        [ -z "$said" ] || fail "man $page: $said"
    done <<<"$pages"

    # As a shell loads them when somebody presses Tab.
    # shellcheck disable=SC2016 # For the shell in there.
    said=$(inside bash -c 'source /usr/share/bash-completion/bash_completion
        __load_completion clearcoat && COMP_WORDS=(clearcoat pur) COMP_CWORD=1 && _clearcoat clearcoat pur clearcoat && echo "${COMPREPLY[*]}"')
    [ "$said" = purge ] || fail "bash completes pur to: $said"
    echo "pages: $(wc -l <<<"$pages") without a warning; bash completes"
}

test_service() {
    inside sh -c 'mkdir -p /srv/shop && echo a page >/srv/shop/page && echo well >/srv/shop/health_check.php && busybox httpd -p 127.0.0.1:80 -h /srv/shop'
    configure "$config"
    # Returns when the edge serves, and no sooner: the next line would fail.
    inside timeout 60 systemctl --quiet enable --now clearcoat.service
    wait_until "a page comes through the edge" inside busybox wget -q -O /dev/null http://127.0.0.1:8080/page
    [ "$(inside busybox wget -q -O - http://127.0.0.1:8080/page)" = "a page" ] || fail "another page"
    [ "$(inside stat --format %U "/proc/$(property MainPID)")" = clearcoat ] || fail "it runs as another user"
    [ "$(inside stat --format '%U %a' /var/lib/clearcoat)" = "clearcoat 700" ] || fail "the journal's folder: $(inside stat --format '%U %a' /var/lib/clearcoat)"
    [[ $(property StatusText) == serves* ]] || fail "systemd knows of it: $(property StatusText)"
    purge
    first=$position
    inside systemctl reload clearcoat.service
    echo "service: ready for systemd, as user clearcoat, answers a request and a purge"
}

# A process that stands still is ended by systemd's watchdog, and comes back by itself.
test_watchdog() {
    local before
    printf '[Service]\nWatchdogSec=2s\nTimeoutAbortSec=1s\n' >"$work/watchdog.conf"
    inside mkdir -p /run/systemd/system/clearcoat.service.d
    docker exec -i "$name" tee /run/systemd/system/clearcoat.service.d/watchdog.conf <"$work/watchdog.conf" >/dev/null
    inside systemctl daemon-reload
    inside systemctl restart clearcoat.service
    before=$(property MainPID)
    inside bash -c "kill -STOP $before"
    wait_until "the watchdog ends what stands still" restarted_since "$before"
    inside rm -r /run/systemd/system/clearcoat.service.d
    inside systemctl daemon-reload
    echo "watchdog: ended what stood still, and it is back"
}
restarted_since() { is_active && [ "$(property MainPID)" != "$1" ]; }

test_upgrade() {
    local before
    before=$(property MainPID)
    dpkg_does --install /newer.deb
    wait_until "the new version runs" restarted_since "$before"
    [ "$(inside cat /etc/clearcoat/clearcoat.toml)" = "$config" ] || fail "the upgrade changed the configuration"
    inside test -e /etc/clearcoat/clearcoat.toml.dpkg-dist || fail "the new default configuration was not put beside ours"
    purge
    [ "$position" -gt "$first" ] || fail "position $position does not follow $first: the journal was lost"

    before=$(property MainPID)
    configure "$config"$'\nno_such_section = true'
    dpkg_does --install /newer.deb
    grep -q "not restarted" "$work/dpkg.log" || fail "an upgrade says nothing of a configuration that is refused"
    if [ "$(property MainPID)" != "$before" ] || ! is_active; then
        fail "an upgrade ended a service whose configuration is refused"
    fi
    configure "$config"
    echo "upgrade: restarted, with its configuration and journal; not with a configuration that is refused"
}

test_removal() {
    dpkg_does --remove clearcoat
    if inside test -e /usr/bin/clearcoat; then fail "the program is still there"; fi
    [ "$(inside cat /etc/clearcoat/clearcoat.toml)" = "$config" ] || fail "removing took the configuration"
    inside test -e /var/lib/clearcoat/journal.redb || fail "removing took the journal"
    dpkg_does --install /package.deb
    inside systemctl is-enabled clearcoat.service >/dev/null || fail "it was enabled before it was removed"
    inside timeout 60 systemctl start clearcoat.service
    first=$position
    purge
    [ "$position" -gt "$first" ] || fail "position $position does not follow $first: the journal was lost"

    local left
    dpkg_does --purge clearcoat
    # shellcheck disable=SC2016 # For the shell in there.
    left=$(inside bash -c 'shopt -s nullglob; echo /etc/clearcoat* /var/{lib,log}/clearcoat* /{etc,usr/lib}/systemd/system/{,*/}clearcoat*')
    [ -z "${left// /}" ] || fail "purging left $left"
    if is_active; then fail "it still runs"; fi
    echo "removal: keeps configuration and journal; purging keeps nothing"
}

# Varnish has no part in this: with none, the edge asks the web node.
config='[[node]]
role = "web"
id = "web-1"
address = "127.0.0.1:80"'

# Nobody has asked Debian for it, so there is no such wish to close.
lintian --allow-root --fail-on error,warning --suppress-tags initial-upload-closes-no-bugs "$package" || fail "lintian has something to say"
echo "lintian: nothing to say"
start_systemd
docker cp "$package" "$name:/package.deb" >/dev/null
make_newer
test_install
test_pages
test_service
test_watchdog
test_upgrade
test_removal
