#!/bin/sh
# Starts LocalAI: links model file and weights, passes the key, and requests a first image as soon as the server is ready.
# Without a backend in the image it installs one into its volume, once (several GB).
set -eu
PATH=$PATH:/ # where LocalAI's image has its program
models=${LOCALAI_MODELS_PATH:-/models}
cp "/etc/corral/$CORRAL_MODEL_FILE" "$models/$CORRAL_MODEL_FILE"

# The folder with the weights in the layout of a Hugging Face Hub cache, for use without network.
if [ -n "${CORRAL_REPOSITORY:-}" ]; then
    if [ ! -d "$CORRAL_WEIGHTS" ]; then
        echo "corral: $CORRAL_WEIGHTS is not there; fetch it with: ./generate.py models pull" >&2
        exit 78
    fi
    cache=$HF_HUB_CACHE/models--$(printf %s "$CORRAL_REPOSITORY" | sed 's,/,--,')
    mkdir -p "$cache/refs" "$cache/snapshots"
    printf %s "${CORRAL_WEIGHTS##*/}" >"$cache/refs/main"
    [ -e "$cache/snapshots/${CORRAL_WEIGHTS##*/}" ] || ln -s "$CORRAL_WEIGHTS" "$cache/snapshots/"
fi

# Files and folders by the names that the model file has for them; LocalAI takes nothing outside of its folder for local.
printf '%s' "${CORRAL_FILES:-}" | while IFS='=' read -r name path || [ -n "$name" ]; do
    if [ ! -e "$path" ]; then
        echo "corral: $path is not there; fetch it with: ./generate.py models pull" >&2
        exit 78
    fi
    [ -e "$models/$name" ] || ln -s "$path" "$models/$name"
done

if [ -n "$CORRAL_BACKEND" ]; then
    installed=${LOCALAI_BACKENDS_PATH:-/backends}/.corral-$CORRAL_BACKEND
    if [ ! -e "$installed" ]; then
        echo "corral: installing the backend $CORRAL_BACKEND; this is done once"
        local-ai backends install "$CORRAL_BACKEND"
        : >"$installed" # only now: what was interrupted is installed again
    fi
fi
LOCALAI_API_KEY=$(cat "$CORRAL_API_KEY_FILE")
export LOCALAI_API_KEY

# The first image loads the weights, so it is generated before client requests. `$$` is the server,
# from `exec` on: when it ends, the loop ends too. A file descriptor passes the key, so no process list shows it.
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
