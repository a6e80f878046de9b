#!/usr/bin/env bash
# Prints the licences of the crates that are in the binary, with the texts that their authors ship: the MIT and BSD licences want
# them to go with every copy. A text that several crates have stands once. Only bash, coreutils and cargo are needed.
#
#   deploy/third-party.sh >third-party.txt
set -euo pipefail
cd "$(dirname "$0")/.."

# The sources are there once the binary is built; a folder for each index that crates come from.
sources=("${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/)
# What is linked, and neither what builds it nor what tests it.
crates=$(cargo tree --locked --offline --target "$(rustc -vV | sed -n 's/^host: //p')" --edges normal --prefix none --format '{p}|{l}|{r}' |
    grep -v '^clearcoat ' | sed 's/ (\*)$//; s/ (proc-macro)//' | sort -u)

echo "clearcoat is distributed under the Apache License 2.0. Its binary has in it the crates that follow, each under its own licence."
echo
declare -A users=() text_of=()
texts=()
while IFS='|' read -r crate licence home; do
    name=${crate%% v*} version=${crate##* v}
    printf '%s %s\n    %s\n    %s\n' "$name" "$version" "$licence" "${home:-https://crates.io/crates/$name}"
    shopt -s nullglob nocaseglob
    for source in "${sources[@]}"; do
        # One folder deeper is what a crate brings along, such as AWS-LC. PCRE2 has its licence in its sources alone.
        for file in "$source$name-$version"/{,*/}{licen[cs]e,copying,notice,unlicense}* \
            "$source$name-$version"/upstream/{src/pcre2_compile,deps/sljit/sljit_src/sljitLir}.c; do
            [ -f "$file" ] || continue
            sum=$(tr -d '[:space:]' <"$file" | sha256sum)
            if [ -z "${users[$sum]:-}" ]; then
                texts+=("$sum")
                text_of[$sum]=$file
            fi
            users[$sum]+="$name $version, "
        done
    done
    shopt -u nullglob nocaseglob
done <<<"$crates"

if [ "${#texts[@]}" -eq 0 ]; then
    echo "${0##*/}: no crate's sources were found in ${sources[*]}" >&2
    exit 1
fi
for sum in "${texts[@]}"; do
    printf '\n%s\n%s\n\n' "$(printf '%.0s-' {1..100})" "${users[$sum]%, }" | fold -s -w 120
    case ${text_of[$sum]} in
        # The comments that it begins with.
        *.c) sed '/^#include/,$d; /^#if/,$d' "${text_of[$sum]}" ;;
        *) cat "${text_of[$sum]}" ;;
    esac
done
