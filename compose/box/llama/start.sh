#!/bin/sh
# Rendered by corral from the inventory "farm", host box; do not edit.
# Change the inventory or gpu-server/llama/start.sh, then run: ./generate.py render

# Starts llama-server with a watchdog. The arguments are llama-server's; `health PORT` is the health check.
#
# If the server has requests but makes no progress, does not answer, or has lost its card, the watchdog ends it, and this
# script exits with 75, so that Docker restarts both. It does not end busy or loading servers. After more than
# CORRAL_RESTARTS such ends in CORRAL_RESTARTS_S seconds it parks: it starts no server, and the health check prints the
# reason, until the container is stopped or restarted. If the server ends by itself, this script exits with the same code.
set -eu

: "${CORRAL_NAME:=llama-server}"
: "${CORRAL_COMPUTES_ON:=processor}" # `card`: a server that falls back to the processor has lost its card
: "${CORRAL_STALL_S:=120}"           # without progress, and idle
: "${CORRAL_LOOP_S:=$CORRAL_STALL_S}" # without progress, but it uses the processor: perhaps a batch that takes long
: "${CORRAL_FIRST_S:=$CORRAL_LOOP_S}" # the same before its first batch: perhaps the driver compiles for an old card
: "${CORRAL_RESTARTS:=5}"
: "${CORRAL_RESTARTS_S:=3600}"
: "${CORRAL_WATCH_S:=10}"    # from one look to the next
: "${CORRAL_CARD_EVERY:=6}"  # looks from one question to the driver to the next
: "${CORRAL_STATE_DIR:=/tmp}" # outlives the container's restarts
: "${CORRAL_TEMP_DIR:=/tmp}"

ASK_S=5         # longest wait for an answer
KILL_S=5        # what a server that is told to end gets for it
ENDED=75        # exit code of a server that the watchdog ended
SHOWN=200       # characters of a log line
LOST='is lost|fallen off the bus|Unable to determine the device handle|No devices were found'
LOST="$LOST|Failed to initialize NVML: Unknown Error" # systemctl daemon-reload took the card from the container
parked=$CORRAL_TEMP_DIR/corral-parked reason=$CORRAL_TEMP_DIR/corral-reason
trouble=$CORRAL_TEMP_DIR/corral-trouble pipe=$CORRAL_TEMP_DIR/corral-log
record=$CORRAL_STATE_DIR/$CORRAL_NAME

say() { echo "corral: $*"; }

if [ "${1:-}" = health ]; then
    [ ! -s "$parked" ] || { cat "$parked"; exit 1; }
    exec curl -fsS "http://localhost:$2/health"
fi

port=8080 keys='' server='' helpers=''
previous=''
for word in "$@"; do
    case $previous in
        --port) port=$word ;;
        --api-key-file) keys=$word ;;
    esac
    previous=$word
done
key=''
[ -z "$keys" ] || key=$(sed -n '/^[^#]/{p;q;}' "$keys")

# --- recent ends -----------------------------------------------------------------------------------------------------

# Sets `ends` to the number of recent ends by the watchdog, `last` to the reason of the last one.
count_ends() {
    ends=0 last='' from=$(($(date +%s) - CORRAL_RESTARTS_S))
    [ -r "$record" ] || return 0
    while read -r when why; do
        if [ "$when" -gt "$from" ]; then ends=$((ends + 1)) last=$why; fi
    done <"$record"
}

remember() {
    if ! echo "$(date +%s) $1" 2>/dev/null >>"$record"; then
        say "$CORRAL_STATE_DIR cannot be written: restarts are not counted"
    fi
}

# --- state of the server ---------------------------------------------------------------------------------------------

# Sets `figures` to the counters that change with each batch, `is_busy` to 1 while there are requests; returns 1 while the
# model loads, 2 without an answer, 3 for a server without metrics.
ask() {
    figures='' is_busy=0
    code=$(printf 'Authorization: Bearer %s' "$key" |
        curl -s -H @- -o "$CORRAL_TEMP_DIR/corral-figures" -w '%{http_code}' --max-time "$ASK_S" \
            "http://localhost:$port/metrics") || {
        [ $? = 7 ] && return 1 # not listening yet
        return 2
    }
    case $code in
        200) ;;
        503) return 1 ;;
        *) return 3 ;;
    esac
    while read -r name value _; do
        case $name in
            llamacpp:requests_processing | llamacpp:requests_deferred) [ "$value" = 0 ] || is_busy=1 ;;
            llamacpp:n_decode_total | llamacpp:prompt_tokens_total | llamacpp:tokens_predicted_total)
                figures="$figures $value" ;;
        esac
    done <"$CORRAL_TEMP_DIR/corral-figures"
}

# Sets `used` to the CPU time in hundredths of a second that the server has used since the last call.
use_of_processor() {
    { read -r stat <"/proc/$server/stat"; } 2>/dev/null || stat=''
    # shellcheck disable=SC2086 # words are wanted
    set -- ${stat##*) }
    used=$((${12:-0} + ${13:-0} - spent)) spent=$((${12:-0} + ${13:-0}))
}

# Sets `lost` to the driver's last message about a lost card, and queries it again in the background: with a failing card
# the query may never return and cannot be killed.
ask_driver() {
    lost=''
    [ "$CORRAL_COMPUTES_ON" = card ] && command -v nvidia-smi >/dev/null 2>&1 || return 0
    if [ -n "$asking" ] && kill -0 "$asking" 2>/dev/null; then return 0; fi
    if [ -n "$asking" ]; then
        lost=$(grep -m 1 -E "$LOST" "$CORRAL_TEMP_DIR/corral-driver") || true
    fi
    nvidia-smi --query-gpu=index,name --format=csv,noheader >"$CORRAL_TEMP_DIR/corral-driver" 2>&1 &
    asking=$!
}

end_server() {
    echo "$1" >"$reason"
    for name in TERM KILL; do
        kill -"$name" "$server" 2>/dev/null || true
        for _ in $(seq "$KILL_S"); do
            kill -0 "$server" 2>/dev/null || return 0
            sleep 1
        done
    done
    echo "parked: llama-server cannot be ended, it hangs in the driver: $1" >"$parked"
    say "$(cat "$parked")"
}

# The watchdog. It counts time in checks, so that clock changes and suspended machines do not count.
watch() {
    still=0 before='' spent=0 looks=0 is_blind=0 asking=''
    while sleep "$CORRAL_WATCH_S"; do
        looks=$((looks + 1))
        use_of_processor
        if [ -s "$trouble" ]; then
            end_server "$(first_trouble)"
            return
        fi
        if [ $((looks % CORRAL_CARD_EVERY)) = 0 ]; then
            ask_driver
            if [ -n "$lost" ]; then
                end_server "the driver has lost the card: $lost"
                return
            fi
        fi
        state=0
        ask || state=$?
        still=$((still + CORRAL_WATCH_S))
        what="busy, but no batch was done for $still s" limit=$CORRAL_STALL_S
        if [ "$used" -ge $((CORRAL_WATCH_S * 10)) ]; then # a tenth of a core
            limit=$CORRAL_LOOP_S
            case $before in '' | ' 0 0 0') limit=$CORRAL_FIRST_S ;; esac
        fi
        case $state in
            0)
                if [ "$is_busy" = 0 ] || [ "$figures" != "$before" ]; then still=0; fi
                before=$figures ;;
            1)
                what="no start within $still s, and the processor idle"
                [ "$used" = 0 ] || still=0 ;;
            2)
                still=$((still + ASK_S))
                what="no answer for $still s" ;;
            3)
                [ "$is_blind" = 1 ] || say "no figures at :$port/metrics ($code): only the log is watched"
                is_blind=1 still=0 ;;
        esac
        if [ "$still" -ge "$limit" ]; then
            end_server "$what"
            return
        fi
    done
}

first_trouble() { head -n 1 "$trouble" | cut -c "1-$SHOWN"; }

# --- running ---------------------------------------------------------------------------------------------------------

# A deliberate stop: reset the count.
# shellcheck disable=SC2317,SC2329 # the trap calls it
stop() {
    trap '' TERM INT
    rm -f "$record" 2>/dev/null || true
    code=0
    if [ -n "$server" ]; then
        kill -TERM "$server" 2>/dev/null || true
        wait "$server" || code=$?
    fi
    # shellcheck disable=SC2086 # several
    [ -z "$helpers" ] || kill $helpers 2>/dev/null || true
    exit "$code"
}
trap stop TERM INT

rm -f "$parked" "$reason" "$trouble" "$pipe"
count_ends
if [ "$ends" -gt "$CORRAL_RESTARTS" ]; then
    echo "parked: ended $ends times in $((CORRAL_RESTARTS_S / 60)) min, last: $last" >"$parked"
    say "$(cat "$parked"); restart it once the cause is gone"
    while :; do
        sleep 3600 &
        helpers=$!
        wait "$helpers" || true
    done
fi

PATH=$PATH:/app # where upstream's image has its program
if ! command -v llama-server >/dev/null; then
    say "there is no llama-server in this image, neither in /app nor on PATH" >&2
    exit 127
fi

# Lines that only a failing card causes; matched at their beginning, so that logged prompts cannot match.
signs='(CUDA|ROCm|SYCL) error: |NVRM: Xid |ggml_cuda_init: failed to initialize | *what\(\): .*ErrorDeviceLost'
[ "$CORRAL_COMPUTES_ON" != card ] || signs="$signs|warning: no usable GPU found|load_tensors: offloaded 0/"
: >"$trouble"
mkfifo -m 600 "$pipe"
LC_ALL=C sed -u -E -e "\\%^([0-9.]+ [A-Z] )?($signs)%w $trouble" <"$pipe" &
helpers=$!
llama-server "$@" >"$pipe" 2>&1 &
server=$!
watch &
helpers="$helpers $!"

code=0
wait "$server" || code=$?
watcher=${helpers#* }
for _ in $(seq 20); do # for the last lines of the log; a child of the server may keep it open
    kill -0 "${helpers%% *}" 2>/dev/null || break
    sleep 0.1
done
kill "$watcher" 2>/dev/null || true
if [ ! -s "$reason" ] && [ -s "$trouble" ]; then
    first_trouble >"$reason"
fi
[ -s "$reason" ] || exit "$code"
why=$(cat "$reason")
say "llama-server was ended ($code): $why"
remember "$why"
exit "$ENDED"
