#!/bin/sh
# As the haproxy image's entry point: `haproxy` runs as a master with workers, in the foreground.
set -eu
if [ "$1" = haproxy ]; then
    shift
    set -- haproxy -W -db "$@"
fi
exec "$@"
