#!/bin/sh
# Rendered by corral from the inventory "heartcode", host prod; do not edit.
# Change the inventory or litellm/start.sh, then run: ./generate.py render

# Becomes LiteLLM with each secret that it needs in its environment: it reads them from nowhere else, and a container's
# declared environment would show them in `docker inspect`. CORRAL_SECRETS names them, CORRAL_SECRETS_DIR holds a file each.
# CORRAL_SERVER_KEYS names the keys of pools' servers. They get names that no provider of LiteLLM's takes by itself.
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
exec litellm "$@"
