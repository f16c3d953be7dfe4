#!/bin/sh
# start.sh PORT FOLDER HOST_KEY DATA [NAME…]: starts sshd as FOLDER/sshd_config says, for the workers whose public keys are
# in FOLDER/workers/NAME. It keeps a copy of its own key in DATA, because it refuses one that others may read.
set -eu
port=$1 folder=$2 host_key=$3 data=$4
shift 4
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
mkdir -p "$data"
umask 077
cp -f "$host_key" "$data/host_key"
as_user=
if [ "$(id -u)" = 0 ]; then # it needs no rights, so root lends it the account that comes with it
    chown sshd "$data" "$data/host_key"
    as_user="setpriv --reuid=sshd --regid=$(id -g sshd) --clear-groups --"
fi
there=$(printf '%s' "$folder" | sed 's/%/%%/g')
keys=
for name; do
    keys="$keys \"$there/workers/$name\""
done
# sshd starts itself again for each connection, and wants its whole path for that.
program=$(command -v sshd.pam || command -v sshd)
# shellcheck disable=SC2086 # $as_user is a list of words
$as_user "$program" -D -e -f "$folder/sshd_config" -h "$data/host_key" \
    -o "AllowUsers=$($as_user id -un)" -o "AuthorizedKeysFile=${keys:-none}" &
main=$!
# Connections would outlive it.
trap 'kill "$main" 2>/dev/null; sh "$folder/end_others.sh" "$port"' TERM INT
wait "$main" || wait "$main"
