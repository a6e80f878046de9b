#!/bin/sh
# Runs every test in this directory against the VCL files of this repository: tests/vtc/run.sh [NAME...]
#
# A test file runs once per VCL file. Those whose name ends in -7 or -6 are about what only that file does. The file for
# Varnish 6.0 runs on 7.x too, because ban() is still there; so one Varnish 7 is enough to test both. With a Varnish 6
# first in PATH, only its own file is tested.
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
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

passed=0
failed=0
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
        if TMPDIR=$work varnishtest -Dvcl="$root/vcl/varnish$version.vcl" -Drender="sh $here/render.sh" \
            "$test" > "$work/log" 2>&1; then
            passed=$((passed + 1))
            echo "ok      $name (varnish$version.vcl)"
        else
            failed=$((failed + 1))
            echo "FAILED  $name (varnish$version.vcl)"
            cat "$work/log"
        fi
    done
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
