#!/bin/sh
# Starts speaches with the key from its file, and the weights in the layout of a Hugging Face Hub cache, for use without
# network. Files are linked one by one: it looks for them without following links to folders.
set -eu
if [ ! -d "$CORRAL_WEIGHTS" ]; then
    echo "corral: $CORRAL_WEIGHTS is not there; fetch it with: ./generate.py models pull" >&2
    exit 78
fi
cache=$HF_HUB_CACHE/models--$(printf %s "$CORRAL_REPOSITORY" | sed 's,/,--,')
snapshot=$cache/snapshots/${CORRAL_WEIGHTS##*/}
mkdir -p "$cache/refs" "$cache/blobs" "$snapshot"
printf %s "${CORRAL_WEIGHTS##*/}" >"$cache/refs/main"
cp -rsf "$CORRAL_WEIGHTS/." "$snapshot/"
API_KEY=$(cat "$CORRAL_API_KEY_FILE")
export API_KEY
exec uvicorn --factory speaches.main:create_app
