#!/bin/sh
# Starts Valkey or Redis, whichever is installed, on a host without Docker; both are compatible.
set -eu
option=
for word; do
    [ "$option" != --dir ] || { mkdir -p "$word" && chmod 700 "$word"; }
    option=$word
done
exec "$(command -v valkey-server || command -v redis-server)" "$@"
