#!/bin/bash
# Does on the first start what the postgres image's entry point does with the variables that corral uses: the cluster, its
# owner's password, the database, password logins from the network; the server is only reachable when all of it is there.
set -Eeuo pipefail
if [ "${1:-}" != postgres ] || [ -s "$PGDATA/PG_VERSION" ]; then
    exec "$@"
fi
mkdir -p "$PGDATA"
chmod 700 "$PGDATA"
password=$(<"$POSTGRES_PASSWORD_FILE")
[ -n "$password" ] || { echo "the file in POSTGRES_PASSWORD_FILE is empty" >&2; exit 1; }
initdb --username="$POSTGRES_USER" --pwfile=<(printf '%s\n' "$password") --pgdata="$PGDATA"
echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
pg_ctl --pgdata="$PGDATA" --wait --options="-c listen_addresses=''" start
psql --username="$POSTGRES_USER" --dbname=postgres --command="CREATE DATABASE \"$POSTGRES_DB\""
pg_ctl --pgdata="$PGDATA" --wait --mode=fast stop
exec "$@"
