#!/bin/sh
# Copies a folder of a paused container. It ends by itself when its reader is gone, and always ends the pause.
set -eu
id=$1 path=$2 held=
end() { [ -z "$held" ] || docker unpause "$id" >/dev/null; }
trap end EXIT
trap 'exit 1' HUP INT TERM
if [ "$(docker inspect --format '{{.State.Running}} {{.State.Paused}}' "$id")" = "true false" ]; then
    held=yes
    docker pause "$id" >/dev/null
fi
docker cp --archive "$id:$path/." -
