# shellcheck shell=sh disable=SC2154
# What doctor asks a host besides its containers; the checks read the sections. Given are the rendered `folder`, the
# `models` folder, the `stores` that are read besides, and their `files`, the paths of what is `private`, digests (`sums`) of the files on the operator's machine
# when that is another one, and the container of the gateway (`litellm`). What cannot be found out stays empty.

# macOS has another `stat`.
if ! stat -c %a / >/dev/null 2>&1; then
    stat() {
        follow=
        [ "$1" != -L ] || { follow=-L && shift; }
        form=$(echo "$2" | sed 's/%a/%Lp/; s/%s/%z/; s/%n/%N/')
        shift 2
        command stat $follow -f "$form" "$@"
    }
fi

section info
docker info --format '{{json .}}' 2>/dev/null

# The user, the groups of the session, and those from the next login on.
section user
id -un
id -nG
id -nG "$(id -un)"

section cpu
uname -m
getconf _NPROCESSORS_ONLN || echo 0
grep -m 1 -i '^flags' /proc/cpuinfo

section ram
cat /proc/meminfo 2>/dev/null || echo "MemTotal: $(($(sysctl -n hw.memsize) / 1024)) kB"

section addresses
PATH=$PATH:/usr/sbin:/sbin ip -j address 2>/dev/null

section listeners
ss -H -l -t -n -p 2>/dev/null

section published
docker ps --format '{{.Names}} {{.Ports}}' 2>/dev/null

# Free space of the nearest folder that exists.
room() {
    place=$2
    until [ -e "$place" ] || [ "$place" = / ] || [ "$place" = . ]; do place=$(dirname "$place"); done
    echo "$1 $(df -P -k "$place" | tail -n 1)"
}
section disks
room rendering "$folder"
room models "$models"
root=$(docker info --format '{{.DockerRootDir}}' 2>/dev/null)
[ -d "$root" ] && room engine "$root"

section time-service
timedatectl show --property NTPSynchronized --value 2>/dev/null || chronyc -n tracking 2>/dev/null

section modes
(
    cd "$folder" 2>/dev/null && eval "set -- $private" && stat -c '%a %n' "$@" 2>/dev/null
)

section same
[ -z "$sums" ] || (
    cd "$folder" 2>/dev/null && printf '%s\n' "$sums" | sha256sum -c 2>/dev/null
)

# Mode, size and the first four bytes (in hexadecimal) of the folder, the used stores and every model file; `outside`
# instead of the bytes for a link that leads out of its folder, which a container cannot follow.
section models
(
    # A file that is not in the models folder has its whole path.
    if cd "$models" 2>/dev/null; then stat -L -c '%a %s - %n' .; else cd /; fi
    eval "set -- $stores"
    [ $# = 0 ] || stat -L -c '%a %s - %n' "$@" 2>/dev/null
    tops=$(for store; do echo "$store"; done)
    eval "set -- $files"
    for file; do
        [ -e "$file" ] || continue
        magic=$(head -c 4 "$file" | od -A n -t x1 | tr -d ' ')
        top=$(echo "$tops" | while read -r store; do case $file in "$store"/*) echo "$store" ;; esac; done)
        case $(readlink -f "$file") in "$(readlink -f "${top:-.}")"/*) ;; *) magic=outside ;; esac
        echo "$(stat -L -c '%a %s' "$file") ${magic:--} $file"
    done
)

section hook
PATH=$PATH:/usr/local/bin:/usr/bin command -v nvidia-container-runtime-hook

# Through which AMD and Intel cards are reached, with the number of the group that owns each.
section devices
stat -L -c '%n %g' /dev/kfd /dev/dri/render* /dev/dri/by-path/*-render 2>/dev/null

# Both, since each of them may be closed to this user.
section xids
(journalctl -k -b -q --no-pager; dmesg) 2>/dev/null | grep -o 'NVRM: Xid .*' | sort -u | tail -n 50

section litellm
[ -z "$litellm" ] || docker exec "$litellm" python3 -c \
    "import importlib.metadata as m; print(m.version('litellm'))" 2>/dev/null

# The last one: it is compared with the time at which the answer is here.
section clock
date +%s.%N
