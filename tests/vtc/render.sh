#!/bin/sh
# Fills in a VCL template as `clearcoat vcl` does: render.sh TEMPLATE ORIGIN_HOST ORIGIN_PORT ADDRESS... > FILE
# With ADDITION in the environment, a file, as `clearcoat vcl --delivery` puts it in.
set -eu
template=$1 host=$2 port=$3
shift 3
allow=
for address in "$@"; do
    allow="$allow\"$address\"; "
done
sed -e "/^import std;\$/r ${ADDITION:-/dev/null}" "$template" |
    sed -e "s|@ORIGIN_HOST@|$host|" -e "s|@ORIGIN_PORT@|$port|" -e "s|@PURGE_ALLOW@|$allow|"
