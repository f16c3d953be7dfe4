#!/bin/sh
# Rendered by corral from the inventory "local-all", host here; do not edit.
# Change the inventory or litellm/valkey-local.sh, then run: ./generate.py render

# Valkey for a host without Docker, or Redis, whichever is installed: the same program under two names.
set -eu
exec "$(command -v valkey-server || command -v redis-server)" "$@"
