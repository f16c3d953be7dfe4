#!/usr/bin/env bash
# Docker engine, Compose and buildx from Debian's own packages, started; as root, without systemd. Does nothing where an
# engine answers. Takes sid's engine: bookworm's is older than the floor (Engine 25), and sid's runs on bookworm's libc.
set -euo pipefail

if docker version >/dev/null 2>&1 && docker compose version >/dev/null 2>&1; then
    exit 0
fi

log=$(mktemp -t corral-engine.XXXXXX)
trap 'rm -f "$log"' EXIT

has_new_engine() { dockerd --version 2>/dev/null | grep -qE 'version (2[5-9]|[3-9][0-9])\.' && docker compose version >/dev/null 2>&1; }

# shellcheck source=.ci/sid.sh
. "$(dirname "${BASH_SOURCE[0]}")/sid.sh"

if ! has_new_engine; then
    {
        offer_sid
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            docker.io/sid docker-cli/sid containerd/sid docker-buildx/sid docker-compose/sid tini-static/sid \
            iptables iproute2 ca-certificates
    } >"$log" 2>&1 || { tail -20 "$log" >&2; exit 1; }
fi

if ! docker version >/dev/null 2>&1; then
    # A machine that was switched off under a running engine leaves process ids that others may have by now.
    pgrep -x dockerd >/dev/null || rm -f /var/run/docker.pid /var/run/docker/containerd/containerd.pid
    setsid nohup dockerd >/var/log/dockerd.log 2>&1 </dev/null &
    for _ in $(seq 1 150); do
        docker version >/dev/null 2>&1 && break
        sleep 0.2
    done
fi
docker version >/dev/null 2>&1 || { tail -20 /var/log/dockerd.log >&2; exit 1; }
docker version --format 'engine {{.Server.Version}}'
