# shellcheck shell=sh disable=SC2154
# Asks a host for everything that observe.py reads: an answer in sections. Given are the labels of the containers of the
# Compose `project` and of the `site`, the rendered `folder`, a command that asks the `balancer` (or nothing), and the
# functions `section` and `cards`.

listed() { docker ps --all --quiet --no-trunc --filter "label=$1"; }

section cards
cards

if ids=$(listed "$project" 2>&1); then
    others=$(listed "$site" 2>/dev/null)
    # shellcheck disable=SC2046 # one word for each id
    set -- $(printf '%s\n%s\n' "$ids" "$others" | sort -u)
    section containers
    [ $# = 0 ] || docker inspect "$@" 2>/dev/null

    # Memory from the control groups: `docker stats` needs two seconds for its two samples.
    section memory
    [ $# = 0 ] || docker inspect --format '{{.Id}} {{.State.Pid}}' "$@" 2>/dev/null | while read -r id pid; do
        [ -r "/proc/${pid:-0}/cgroup" ] || continue
        while IFS=: read -r _ controllers path; do
            case ",$controllers," in
                *,memory,*)
                    group=/sys/fs/cgroup/memory$path used=memory.usage_in_bytes cold=total_inactive_file
                    limit=memory.limit_in_bytes
                    break ;;
                ,,) group=/sys/fs/cgroup$path used=memory.current cold=inactive_file limit=memory.max ;;
            esac
        done <"/proc/$pid/cgroup"
        [ -r "$group/$used" ] || continue
        read -r bytes <"$group/$used"
        read -r most <"$group/$limit"
        echo "$id $bytes $(sed -n "s/^$cold //p" "$group/memory.stat") $most"
    done

    # Of what is rendered, from the files that the project was started with: perhaps the variant without cards, too.
    section hashes
    one=$(echo "$ids" | head -n 1)
    label='{{index .Config.Labels "com.docker.compose.project.config_files"}}'
    files=$([ -z "$one" ] || docker inspect --format "$label" "$one")
    set -- --file "$folder/compose.yaml"
    case "$files" in
        *,*) set -f; IFS=,; set --; for file in $files; do set -- "$@" --file "$file"; done; unset IFS; set +f ;;
    esac
    docker compose --project-directory "$folder" "$@" config --hash '*' 2>&1

    section balancer
    eval "$balancer" 2>/dev/null
else
    section engine
    printf '%s\n' "$ids"
fi
