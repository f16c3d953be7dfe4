#!/bin/sh
# Rendered by corral from the inventory "local-all", host here; do not edit.
# Change the inventory or litellm/postgres-local.sh, then run: ./generate.py render

# postgres-local.sh DATA PORT PASSWORD_FILE: PostgreSQL on loopback for a host without Docker, made on its first start.
# PostgreSQL refuses to run as root, so root lends it the account `postgres`.
set -eu
data=$1 port=$2 password_file=$3
PATH=$PATH:$(find /usr/lib/postgresql -maxdepth 2 -name bin 2>/dev/null | sort -V | tail -n 1)
mkdir -p "$data"
as_owner=
if [ "$(id -u)" = 0 ]; then
    chown postgres "$data"
    as_owner="setpriv --reuid=postgres --regid=postgres --init-groups --"
    # shellcheck disable=SC2086 # $as_owner is a list of words
    if ! $as_owner test -x "$data"; then
        echo "corral: the account postgres cannot enter $data; render into a folder whose parents others may enter" >&2
        exit 78
    fi
fi
chmod 700 "$data"
if [ ! -s "$data/PG_VERSION" ]; then
    # shellcheck disable=SC2016,SC2086 # $as_owner is a list of words; the inner shell expands its own variables
    $as_owner sh -c 'initdb --pgdata "$0" --username corral --auth scram-sha-256 --pwfile /dev/stdin >/dev/null' "$data" <"$password_file"
    # shellcheck disable=SC2086
    echo 'CREATE DATABASE corral' | $as_owner postgres --single -D "$data" postgres >/dev/null
fi
# shellcheck disable=SC2086
exec $as_owner postgres -D "$data" -p "$port" -c listen_addresses=127.0.0.1 -c unix_socket_directories=
