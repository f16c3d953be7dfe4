#!/bin/sh
# Rendered by corral from the inventory "everything.on", host big.iron; do not edit.
# Change the inventory or gpu-server/image/start.sh, then run: ./generate.py render

# LocalAI's start: installs the backend into its volume once (several GB), puts the model file in place, hands over the
# key, and asks for a first picture as soon as the server is ready.
set -eu
PATH=$PATH:/ # where LocalAI's image has its program
models=${LOCALAI_MODELS_PATH:-/models} installed=${LOCALAI_BACKENDS_PATH:-/backends}/.corral-$CORRAL_BACKEND
cp "/etc/corral/$CORRAL_MODEL_FILE" "$models/$CORRAL_MODEL_FILE"
if [ ! -e "$installed" ]; then
    echo "corral: installing the backend $CORRAL_BACKEND; this is done once"
    local-ai backends install "$CORRAL_BACKEND"
    : >"$installed" # only now: what was interrupted is installed again
fi
LOCALAI_API_KEY=$(cat "$CORRAL_API_KEY_FILE")
export LOCALAI_API_KEY

# Weights are fetched and loaded by the first picture, for which nobody should have to wait (004-50). `$$` is the server,
# from `exec` on: when it ends, so does the waiting. The key goes by a file descriptor, out of the list of processes.
first_picture() {
    url=http://localhost:${LOCALAI_ADDRESS##*:}
    until curl -fsS -o /dev/null "$url/readyz" 2>/dev/null; do
        kill -0 $$ 2>/dev/null || return 0
        sleep 1
    done
    if printf 'Authorization: Bearer %s' "$LOCALAI_API_KEY" |
        curl -fsS -o /dev/null --max-time 1800 -H @- -H 'Content-Type: application/json' \
            -d "$CORRAL_FIRST_PICTURE" "$url/v1/images/generations"; then
        echo "corral: the first picture is drawn: the model is loaded"
    else
        echo "corral: the first picture failed; the next request tries again" >&2
    fi
}
if [ -n "${CORRAL_FIRST_PICTURE:-}" ]; then
    first_picture &
fi
exec local-ai run
