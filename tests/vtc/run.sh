#!/bin/sh
# Runs every test in this directory against the VCL files of this repository: tests/vtc/run.sh [NAME...]
#
# A test file runs once per VCL file. Those whose name ends in -7 or -6 are about what only that file does. The file for
# Varnish 6.0 runs on 7.x too, because ban() is still there; so one Varnish 7 is enough to test both. With a Varnish 6
# first in PATH, only its own file is tested.
#
# Each runs without and with vcl/xkey.vcl, which must change nothing but what is new; those whose name begins with xkey-
# are about what is new. A Varnish 6 without vmod_xkey is tested without it.
#
# They wait most of their time, so twice as many run at once as there are cores; JOBS=N is another number.
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
# run_one NAME VERSION without|with
run_one() {
    case $3 in
        without) addition=/dev/null label="varnish$2.vcl" ;;
        *) addition=$root/vcl/xkey.vcl label="varnish$2.vcl with xkey.vcl" ;;
    esac
    log=$work/$1-$2-$3
    if TMPDIR=$work varnishtest -Dvcl="$root/vcl/varnish$2.vcl" -Drender="env ADDITION=$addition sh $here/render.sh" \
        "$here/$1.vtc" > "$log" 2>&1; then
        echo "ok      $1 ($label)"
    else
        # In one piece, as others print meanwhile.
        printf 'FAILED  %s (%s)\n%s\n' "$1" "$label" "$(cat "$log")"
    fi
}

# One of those that run at once.
if [ "${1-}" = --one ]; then
    work=$2
    shift 2
    run_one "$@"
    exit
fi
work=$(mktemp -d)
# Started by root, Varnish compiles VCL as another user, who must be able to read it.
chmod 755 "$work"
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
command -v varnishtest > "$work/which" || { echo "varnishtest is not installed (Debian: apt-get install varnish)" >&2; exit 2; }
case $(varnishd -V 2>&1) in
    *"varnish-6."*) known=6 ;;
    *) known="7 6" ;;
esac

printf 'vcl 4.0; import xkey; backend none { .host = "127.0.0.1"; }' > "$work/xkey.vcl"
additions="without with"
if ! varnishd -C -f "$work/xkey.vcl" -n "$work/probe" > "$work/which" 2>&1; then
    if [ "$known" != 6 ]; then
        echo "vmod_xkey is not installed (Debian: apt-get install varnish-modules)" >&2
        exit 2
    fi
    additions=without
fi

for test in "$here"/*.vtc; do
    name=$(basename "$test" .vtc)
    if [ $# -gt 0 ]; then
        case " $* " in *" $name "*) ;; *) continue ;; esac
    fi
    case $name in
        *-7) versions=7 ;;
        *-6) versions=6 ;;
        *) versions=$known ;;
    esac
    for version in $versions; do
        case " $known " in *" $version "*) ;; *) continue ;; esac
        for which in $additions; do
            case $name-$which in xkey-*-without) continue ;; esac
            echo "$name $version $which"
        done
    done
done > "$work/all"
cores=$(nproc)
xargs -P "${JOBS:-$((2 * cores))}" -n 3 sh "$here/run.sh" --one "$work" < "$work/all" | tee "$work/results"
passed=$(grep -c '^ok ' "$work/results")
failed=$(($(wc -l < "$work/all") - passed))
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
