#!/bin/sh
# Looks at, reads and writes one file of a folder, with what every Linux has.
action=$1 folder=$2 file=$3
umask 022
case $action in
room) mkdir -p -- "$folder" 2>/dev/null ;;
append) mkdir -p -- "$folder" || exit 1 ;;
esac
case $action in
all | append | settle) cd "$folder" || exit 1 ;;
*) cd "$folder" 2>/dev/null || exit 0 ;; # what is not there is an empty answer, no error
esac
case $action in
size) [ -f "$file" ] && wc -c <"$file" ;;
sum) [ -f "$file" ] && sha256sum -b -- "$file" ;;
text) [ -f "$file" ] && head -c 1048576 -- "$file" ;;
real) readlink -f -- "$file" ;;
room) df -Pk -- . 2>/dev/null | { read -r _; read -r _ _ _ free _; echo "$free"; } ;;
remove) rm -f -- "$file" ;;
all) exec cat -- "$file" ;;
append)
    mkdir -p -- "$(dirname -- "$file")" || exit 1
    exec cat >>"$file"
    ;;
settle)
    found=$(sha256sum -b -- "$file") || exit 1
    if [ "${found%% *}" != "$5" ]; then
        rm -f -- "$file"
        echo "its checksum is ${found%% *}" >&2
        exit 3
    fi
    sync -- "$file" 2>/dev/null || sync
    mv -f -- "$file" "$4" || exit 1
    sync -- . 2>/dev/null || sync
    ;;
esac
exit 0
