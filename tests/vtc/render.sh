#!/bin/sh
# Fills in a VCL template as `clearcoat vcl` does: render.sh TEMPLATE ORIGIN_HOST ORIGIN_PORT ADDRESS... > FILE
# With ADDITION in the environment, a file, as `clearcoat vcl --delivery` puts it in. With OTHERS in the environment,
# "HOST:PORT ...", for several clearcoats, of which the arguments name the first; NO_PROBE leaves their health to the
# test, whose servers then see what it sends and nothing else.
set -eu
template=$1 host=$2 port=$3
shift 3
allow=
for address in "$@"; do
    allow="$allow\"$address\"; "
done

# vcl/origins.vcl for these origins. A host may have colons, too.
several() {
    awk -v origins="$host:$port $OTHERS" '
        BEGIN { count = split(origins, origin, " ") }
        / *# End of for each\.$/ {
            for (number = 1; number <= count; number++) {
                text = block
                host = origin[number]; sub(/:[0-9]+$/, "", host)
                port = origin[number]; sub(/.*:/, "", port)
                gsub("@NUMBER@", number, text)
                gsub("@NEXT@", number % count + 1, text)
                gsub("@HOST@", host, text)
                gsub("@PORT@", port, text)
                printf "%s", text
            }
            inside = 0
            next
        }
        / *# For each clearcoat\.$/ { inside = 1; block = ""; next }
        inside { block = block $0 "\n"; next }
        { gsub("@OTHERS@", count - 1); print }
    ' "$(dirname "$template")/origins.vcl"
}

# The template with all clearcoats in the place of its one backend.
body() {
    if [ -z "${OTHERS:-}" ]; then
        cat "$template"
        return
    fi
    sed -n '1,/^backend origin {$/p' "$template" | sed '$d'
    several
    sed -n '/^backend origin {$/,$p' "$template" | sed '1,/^}$/d'
}

without_probe() {
    if [ -z "${NO_PROBE:-}" ]; then
        cat
    else
        sed -e '/^probe clearcoat {$/,/^}$/d' -e '/^    \.probe = clearcoat;$/d'
    fi
}

body | without_probe | sed -e "/^import std;\$/r ${ADDITION:-/dev/null}" |
    sed -e "s|@ORIGIN_HOST@|$host|" -e "s|@ORIGIN_PORT@|$port|" -e "s|@PURGE_ALLOW@|$allow|"
