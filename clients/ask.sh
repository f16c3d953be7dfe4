#!/bin/sh
# Sends one chat request with the body in a file, and prints the answer. After a refusal it waits for `Retry-After` plus a
# random delay and retries, for a limited time. To send many, at most 3 at once:
#
#     printf '%s\n' questions/*.json | xargs -n 1 -P 3 clients/ask.sh
#
# docs/clients.md has the reasons.
set -eu
[ $# = 1 ] || { echo "usage: ask.sh BODY.json" >&2; exit 2; }
: "${OPENAI_BASE_URL:?is the address of the gateway, with /v1}" "${OPENAI_API_KEY:?is your key}"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM
end=$(($(date +%s) + ${PATIENCE_S:-900}))
spread=1
while :; do
    # Pass the key on standard input: all users of the machine can read a command line.
    status=$(printf 'header = "Authorization: Bearer %s"\n' "$OPENAI_API_KEY" |
        curl --config - --silent --show-error --connect-timeout 5 --max-time "${ANSWER_S:-600}" \
            --header 'Content-Type: application/json' --data-binary "@$1" \
            --dump-header "$folder/headers" --output "$folder/body" --write-out '%{http_code}' \
            "$OPENAI_BASE_URL/chat/completions")
    [ "$status" = 429 ] || break
    # A refusal that does not say when to come back (a spent budget) is final.
    after=$(sed -n 's/^[Rr]etry-[Aa]fter: *\([0-9][0-9]*\).*/\1/p' "$folder/headers")
    [ -n "$after" ] || break
    random=$(od -An -N2 -tu2 /dev/urandom)
    wait=$(awk "BEGIN { printf \"%.2f\", $after + ($after > 1 ? $after : 1) * $spread * $random / 65536 }")
    [ $(($(date +%s) + ${wait%.*})) -lt "$end" ] || break
    echo "ask.sh: refused, back in $wait s" >&2
    sleep "$wait"
    [ "$spread" -ge 8 ] || spread=$((spread * 2))
done
# In one piece, a line of its own: of several `cat`s that write to one file at once, some overwrite what others wrote.
echo >> "$folder/body"
dd if="$folder/body" bs=16777216 2> /dev/null
[ "$status" = 200 ]
