#!/bin/sh
# end_others.sh DOOR [PORT…]: ends every connection to the sshd on DOOR that has opened none of these ports, so also one that
# came in with a key that is gone, and would open its port later.
set -eu
door=$(printf '%04X' "$1")
shift
kept=
for port; do
    kept="$kept $(printf '%04X' "$port")"
done
{
    # A socket's place here, its state (0A: it listens) and its inode.
    cat /proc/net/tcp6 2>/dev/null || true
    cat /proc/net/tcp
    for process in /proc/[0-9]*; do
        { read -r name <"$process/comm"; } 2>/dev/null || continue
        case $name in sshd*) ;; *) continue ;; esac
        { ls -l "$process/fd" || true; } 2>/dev/null | sed -n "s/.* socket:\[\([0-9]*\)\]\$/pid ${process#/proc/} \1/p"
    done
} | awk -v door="$door" -v kept="$kept " '
    NF > 9 { n = split($2, place, ":"); port[$10] = place[n]; listens[$10] = $4 == "0A" }
    $1 == "pid" && listens[$3] && index(kept, " " port[$3] " ") { stays[$2] = 1 }
    # The processes of a connection share its socket.
    $1 == "pid" && !listens[$3] && port[$3] == door { member[$2] = $3 }
    END {
        for (pid in member) if (pid in stays) keep[member[pid]] = 1
        for (pid in member) if (!keep[member[pid]]) print pid
    }
' | while read -r pid; do
    kill -KILL "$pid" 2>/dev/null || true
done
