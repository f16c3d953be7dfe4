#!/bin/sh
# Rendered by corral from the inventory "farm", host box; do not edit.
# Change the inventory or litellm/start.sh, then run: ./generate.py render

# Starts LiteLLM with its secrets in the environment: it reads them only there, and a container's declared environment
# would show them in `docker inspect`. CORRAL_SECRETS names them, CORRAL_SECRETS_DIR has a file for each.
# CORRAL_SERVER_KEYS names the keys of pools' servers. They get names that no provider of LiteLLM uses by itself.
set -eu
read_secret() {
    file="$CORRAL_SECRETS_DIR/$1"
    if [ ! -r "$file" ]; then
        echo "corral: the secret $1 is missing; run: ./generate.py secrets init" >&2
        exit 78
    fi
    value=$(cat "$file")
}
for name in $CORRAL_SECRETS; do
    read_secret "$name"
    export "$name=$value"
done
for name in $CORRAL_SERVER_KEYS; do
    read_secret "$name"
    export "CORRAL_KEY_$name=$value"
done
# On a `local` host a further worker waits for the first, which makes the database's tables, at most three minutes;
# CORRAL_AFTER is its port.
if [ -n "${CORRAL_AFTER-}" ]; then
    python3 - "http://127.0.0.1:$CORRAL_AFTER/health/liveliness" <<'END'
import sys, time, urllib.request
until = time.monotonic() + 180
while time.monotonic() < until:
    try:
        urllib.request.urlopen(sys.argv[1], timeout=3)
        break
    except OSError:
        time.sleep(1)
END
fi
exec litellm "$@"
