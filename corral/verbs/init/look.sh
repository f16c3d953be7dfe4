# shellcheck shell=sh disable=SC2154
# What `init` asks a machine; look.py reads the sections. Given are the seconds (`limit`) that an answer may take, the
# `fields` of nvidia-smi, the `system`'s folder /sys, `folders` to look into (one a line) and the `ports` of servers.
# Everything is asked at the same time, and what hangs is left behind: a broken driver can hang in a way that no signal
# ends.

section() { printf '\n\036%s\n' "$1"; }
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

# ask NAME COMMAND …: if the machine has that command, its output and exit code as a section.
ask() {
    name=$1
    shift
    command -v "$1" >/dev/null 2>&1 || return 0
    : >"$work/$name.part"
    (
        "$@" >"$work/$name.part" 2>&1 &
        echo $! >"$work/$name.pid"
        wait $!
        code=$?
        [ -e "$work/$name.late" ] && exit
        echo "code $code" >>"$work/$name.part"
        mv "$work/$name.part" "$work/$name"
    ) </dev/null >/dev/null 2>&1 &
}

machine() {
    uname -n && uname -s && uname -m
    echo "cores $(getconf _NPROCESSORS_ONLN)"
    df -Pk . | sed -n '2s/^/disk /p'
    case $(uname -s) in
        Darwin) echo "memory $(sysctl -n hw.memsize)" && sysctl -n machdep.cpu.brand_string && ipconfig getifaddr en0 ;;
        *)
            echo "pages $(getconf _PHYS_PAGES) $(getconf PAGESIZE)"
            lscpu
            ip -4 route get 192.0.2.1
            ;;
    esac
}

# Graphics of every maker, as the kernel sees them without any tool: slot, maker, device, and of AMD's the memory, how
# much of it is used, the host's memory that it may take, the unique number, and the name.
graphics() {
    for card in "$system"/bus/pci/devices/*; do
        case $(cat "$card/class" 2>/dev/null) in 0x0300* | 0x0302* | 0x0380*) ;; *) continue ;; esac
        line=${card##*/}
        for file in vendor device mem_info_vram_total mem_info_vram_used mem_info_gtt_total unique_id product_name; do
            line="$line|$(cat "$card/$file" 2>/dev/null)"
        done
        echo "$line"
    done
}

devices() { stat -L -c '%n %g' /dev/kfd /dev/dri/render*; }

# Model files in the usual places and in given ones: a line for each folder that is there, one for each file below it,
# and one for each model of Ollama's.
models() {
    hub=${HF_HUB_CACHE:-${HF_HOME:-$HOME/.cache/huggingface}/hub}
    {
        echo "hub $hub"
        echo "ollama ${OLLAMA_MODELS:-$HOME/.ollama/models}"
        echo "ollama /usr/share/ollama/.ollama/models"
        echo "lmstudio $HOME/.lmstudio/models"
        echo "lmstudio $HOME/.cache/lm-studio/models"
        echo "llama ${LLAMA_CACHE:-$HOME/.cache/llama.cpp}"
        echo "llama $HOME/Library/Caches/llama.cpp"
        echo "$folders" | while read -r folder; do [ -z "$folder" ] || echo "folder $folder"; done
    } | while read -r kind folder; do
        if ! [ -d "$folder" ]; then
            [ "$kind" != folder ] || echo "absent $folder"
            continue
        fi
        echo "$kind $folder"
        case $kind in
            ollama) (cd "$folder/manifests" 2>/dev/null && find . -type f | sed 's|^\./|model |') ;;
            *) (cd "$folder" && find -L . -maxdepth 7 -type f -name '*.gguf' 2>/dev/null | sed 's|^\./|file |') ;;
        esac
    done
}

# Servers that answer on loopback: what they say of themselves, each answer on one line.
servers() {
    if command -v ip >/dev/null 2>&1; then
        outside=$(ip -4 route get 192.0.2.1 2>/dev/null | sed -n 's/.* src \([0-9.]*\).*/\1/p')
    else
        outside=$(ipconfig getifaddr en0 2>/dev/null)
    fi
    for port in $ports; do
        curl --silent --noproxy '*' --max-time 3 --output /dev/null "http://127.0.0.1:$port/" || continue
        for path in /api/version /api/tags /api/v0/models /v1/models /props /health/liveliness; do
            echo "$port $path $(curl --silent --noproxy '*' --max-time 3 "http://127.0.0.1:$port$path" | tr -d '\r\n')"
        done
        if curl --silent --noproxy '*' --max-time 1 --output /dev/null "http://${outside:-127.0.0.1:0}:$port/"; then
            echo "$port open"
        fi
    done
}

ask machine machine
ask nvidia-smi nvidia-smi "--query-gpu=$fields" --format=csv,noheader,nounits
ask rocm-smi rocm-smi --showproductname --showuniqueid --showbus --showmeminfo vram --json
ask amd-smi amd-smi static --asic --bus --vram --json
ask xpu-smi xpu-smi discovery -j
ask apple system_profiler SPDisplaysDataType -json
ask graphics graphics
ask docker docker info --format '{{json .}}'
ask compose docker compose version --short
ask hook nvidia-container-runtime-hook --version
ask devices devices
ask models models
command -v curl >/dev/null 2>&1 && ask servers servers

waited=0
while [ -n "$(find "$work" -name '*.part')" ] && [ "$waited" -lt $((limit * 10)) ]; do
    sleep 0.1
    waited=$((waited + 1))
done
for file in "$work"/*.part; do
    [ -e "$file" ] || continue
    name=${file##*/}
    section "silent ${name%.part}"
    : >"${file%.part}.late"
    kill -9 "$(cat "${file%.part}.pid")" 2>/dev/null
done
for file in "$work"/*; do
    case $file in *.pid | *.late) continue ;; esac
    name=${file##*/}
    section "${name%.part}"
    cat "$file"
done
