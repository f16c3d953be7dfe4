#!/bin/sh
# Starts Valkey or Redis, whichever is installed, on a host without Docker; both are compatible.
set -eu
option=
for word; do
    [ "$option" != --dir ] || { mkdir -p "$word" && chmod 700 "$word"; }
    option=$word
done
# A new title would take the place of the environment, by which a process is known to be the kit's.
exec "$(command -v valkey-server || command -v redis-server)" "$@" --set-proc-title no
