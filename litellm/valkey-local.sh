#!/bin/sh
# Starts Valkey or Redis, whichever is installed, on a host without Docker; both are compatible.
set -eu
exec "$(command -v valkey-server || command -v redis-server)" "$@"
