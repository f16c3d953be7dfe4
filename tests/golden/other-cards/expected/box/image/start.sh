#!/bin/sh
# Rendered by corral from the inventory "other-cards", host box; do not edit.
# Change the inventory or gpu-server/image/start.sh, then run: ./generate.py render

# LocalAI's start: installs the backend into its volume once (several GB), puts the model file in place, hands over the key.
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
exec local-ai run
