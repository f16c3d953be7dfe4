#!/bin/sh
# What upstream's /run.sh does that matters here: a secret's file becomes the variable, and the data folder has a place
# for plugins.
set -eu

[ -d "$GF_PATHS_PLUGINS" ] || mkdir "$GF_PATHS_PLUGINS"
for name in $(env | sed -n 's/^\(GF_[A-Z_]*\)__FILE=..*/\1/p'); do
    eval "file=\$${name}__FILE"
    # shellcheck disable=SC2154 # set by eval
    export "$name=$(cat "$file")"
    unset "${name}__FILE"
done
exec grafana server "$@"
