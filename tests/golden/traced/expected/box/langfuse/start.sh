#!/bin/sh
# Rendered by corral from the inventory "traced", host box; do not edit.
# Change the inventory or langfuse/start.sh, then run: ./generate.py render

# Becomes the program that is named, with each secret that it needs in its environment: Langfuse and ClickHouse read them
# from nowhere else, and a container's declared environment would show them in `docker inspect`. CORRAL_SECRETS says which
# variable gets which secret, as VARIABLE=SECRET, and CORRAL_SECRETS_DIR holds a file for each.
set -eu
for pair in $CORRAL_SECRETS; do
    file="$CORRAL_SECRETS_DIR/${pair#*=}"
    if [ ! -r "$file" ]; then
        echo "corral: the secret ${pair#*=} is missing; run: ./generate.py secrets init" >&2
        exit 78
    fi
    export "${pair%%=*}=$(cat "$file")"
done
exec "$@"
