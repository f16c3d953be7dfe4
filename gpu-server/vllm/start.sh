#!/bin/sh
# Starts vLLM, which reads its key from the environment only. The key's file is a secret; a container's declared environment
# would show the key in `docker inspect`, and a command line would show it to all users of the host.
set -eu
if [ ! -r "$CORRAL_API_KEY_FILE" ]; then
    echo "corral: the secret ${CORRAL_API_KEY_FILE##*/} is missing; run: ./generate.py secrets init" >&2
    exit 78
fi
for word in "$@"; do # the model, and adapters as name=path
    case $word in
        /models/* | *=/models/*)
            [ -e "${word#*=}" ] || {
                echo "corral: ${word#*=} is not there; fetch it with: ./generate.py models pull" >&2
                exit 78
            }
            ;;
    esac
done
VLLM_API_KEY=$(cat "$CORRAL_API_KEY_FILE")
export VLLM_API_KEY
exec vllm serve "$@"
