#!/bin/sh
# Rendered by corral from the inventory "farm", host box; do not edit.
# Change the inventory or litellm/postgres.sh, then run: ./generate.py render

# postgres.sh PORT ADDRESS DATABASE ROLE PASSWORD_FILE [MONITOR PASSWORD_FILE] [-- DATABASE ROLE PASSWORD_FILE]…: starts
# PostgreSQL with its data in $PGDATA, which the first start creates.
#
# ROLE owns DATABASE and has no other rights; MONITOR reads statistics. What follows each `--` is a further database with a
# role of its own. Every start sets up both before PostgreSQL listens,
# which also migrates data of an older version with another ROLE that was a superuser. The superuser has no password and can
# connect only through the socket inside the container.
set -eu
port=$1 address=$2 database=$3 role=$4 password_file=$5 monitor='' monitor_file=''
shift 5
if [ $# -gt 0 ] && [ "$1" != -- ]; then
    monitor=$1 monitor_file=$2
    shift 2
fi
data=${PGDATA:?}
PATH=$PATH:$(find /usr/lib/postgresql -maxdepth 2 -name bin 2>/dev/null | sort -V | tail -n 1)
mkdir -p "$data"
as_owner=
if [ "$(id -u)" = 0 ]; then # PostgreSQL refuses to run as root, so root lends it the account `postgres`
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
    # shellcheck disable=SC2086
    $as_owner initdb --pgdata "$data" --username postgres --auth-local trust --auth-host scram-sha-256 >/dev/null
fi

# Runs standard input in a database without a server; statements end with a semicolon and an empty line. Use it only at the
# end of a pipe, whose process it becomes: after a crash the lock file contains this shell's process id, and PostgreSQL
# assumes another server unless the id is its parent's.
sql() {
    # shellcheck disable=SC2086
    exec $as_owner postgres --single -j -D "$data" -c exit_on_error=on -c log_checkpoints=off "$1"
}

# Creates a role without rights, and sets its password.
plain_role() {
    cat <<EOF
DO \$do\$ BEGIN
IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '$1') THEN CREATE ROLE $1; END IF;
END \$do\$;

ALTER ROLE $1 LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS PASSWORD '$(sed "s/'/''/g" "$2")';

EOF
}

{
    plain_role "$role" "$password_file"
    if [ -n "$monitor" ]; then
        plain_role "$monitor" "$monitor_file"
        printf 'GRANT pg_monitor TO %s;\n\n' "$monitor"
    fi
} | sql postgres >/dev/null

# Creates a database if there is none of that name.
database() {
    if ! echo "SELECT datname FROM pg_database WHERE datname = '$1';" | sql postgres | grep -q "\"$1\""; then
        echo "CREATE DATABASE $1 OWNER $2;" | sql postgres >/dev/null
    fi
}

database "$database" "$role"
{
    cat <<EOF
ALTER DATABASE $database OWNER TO $role;

REVOKE ALL ON DATABASE $database FROM PUBLIC;

ALTER SCHEMA public OWNER TO pg_database_owner;

DO \$do\$ DECLARE words text; BEGIN
FOR words IN
WITH spaces AS (
  SELECT oid, nspname, nspowner FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
), extended AS (
  SELECT classid, objid FROM pg_depend WHERE deptype = 'e'
)
SELECT format('SCHEMA %I', nspname) FROM spaces
  WHERE nspname <> 'public' AND nspowner <> '$role'::regrole
UNION ALL SELECT format('TABLE %s', found.oid::regclass) FROM pg_class found JOIN spaces ON spaces.oid = relnamespace
  WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND relowner <> '$role'::regrole
  AND ('pg_class'::regclass, found.oid) NOT IN (SELECT * FROM extended)
  AND NOT (relkind = 'S' AND EXISTS (SELECT FROM pg_depend WHERE objid = found.oid AND deptype IN ('a', 'i')))
UNION ALL SELECT format('TYPE %s', found.oid::regtype) FROM pg_type found JOIN spaces ON spaces.oid = typnamespace
  WHERE typtype IN ('e', 'd') AND typowner <> '$role'::regrole
  AND ('pg_type'::regclass, found.oid) NOT IN (SELECT * FROM extended)
UNION ALL SELECT format('ROUTINE %s', found.oid::regprocedure) FROM pg_proc found JOIN spaces ON spaces.oid = pronamespace
  WHERE proowner <> '$role'::regrole AND ('pg_proc'::regclass, found.oid) NOT IN (SELECT * FROM extended)
LOOP EXECUTE 'ALTER ' || words || ' OWNER TO $role'; END LOOP;
END \$do\$;

EOF
    if [ -n "$monitor" ]; then
        printf 'GRANT CONNECT ON DATABASE %s TO %s;\n\n' "$database" "$monitor"
    fi
} | sql "$database" >/dev/null

logins="host $database $role${monitor:+,$monitor} all scram-sha-256"
while [ "${1-}" = -- ]; do
    plain_role "$3" "$4" | sql postgres >/dev/null
    database "$2" "$3"
    printf 'ALTER DATABASE %s OWNER TO %s;\n\nREVOKE ALL ON DATABASE %s FROM PUBLIC;\n\n' "$2" "$3" "$2" | sql "$2" >/dev/null
    logins="$logins
host $2 $3 all scram-sha-256"
    shift 4
done

# shellcheck disable=SC2086,SC2016 # the inner shell expands its own variables
$as_owner sh -c 'cat >"$0"' "$data/corral_hba.conf" <<EOF
local all all trust
$logins
EOF
sockets=/var/run/postgresql
if [ "$address" = 127.0.0.1 ]; then sockets=; fi # on a machine that has other users
# shellcheck disable=SC2086
exec $as_owner postgres -D "$data" -p "$port" -c "listen_addresses=$address" -c "unix_socket_directories=$sockets" \
    -c "hba_file=$data/corral_hba.conf"
