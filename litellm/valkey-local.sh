#!/bin/sh
# Valkey for a host without Docker, or Redis, whichever is installed: the same program under two names.
set -eu
exec "$(command -v valkey-server || command -v redis-server)" "$@"
