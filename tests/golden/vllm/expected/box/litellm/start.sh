#!/bin/sh
# Rendered by corral from the inventory "vllm", host box; do not edit.
# Change the inventory or litellm/start.sh, then run: ./generate.py render

# Becomes LiteLLM with each secret that it needs in its environment: it reads them from nowhere else, and a container's
# declared environment would show them in `docker inspect`. CORRAL_SECRETS names them, CORRAL_SECRETS_DIR holds a file each.
set -eu
for name in $CORRAL_SECRETS; do
    file="$CORRAL_SECRETS_DIR/$name"
    if [ ! -r "$file" ]; then
        echo "corral: the secret $name is missing; run: ./generate.py secrets init" >&2
        exit 78
    fi
    export "$name=$(cat "$file")"
done
exec litellm "$@"
