"""Wakes machines that sleep: asks HAProxy each second which ones requests wait for, and sends them magic packets.

    python3 wake.py URL ADDRESS NAME=MAC …

URL answers with the names of these machines; ADDRESS is the host's own in the network that it shares with them. One
of IPv6, or the loopback address, tells no such network: the packets then take the host's usual way out.
"""
# ruff: noqa: INP001 - it runs by itself, in a container

import ipaddress
import socket
import sys
import time
import urllib.request
from pathlib import Path

POLL_S = 1.0
ASK_LIMIT_S = 3.0
# The port of Wake-on-LAN; nothing has to listen there.
PORT = 9
# Its age tells the health check that HAProxy answers.
SEEN = Path("/tmp/seen")  # noqa: S108 - a path in the container


def magic_packet(mac: str) -> bytes:
    """What wakes the network card with this address: six times FF, then sixteen times the address."""
    return b"\xff" * 6 + bytes.fromhex(mac.replace(":", "")) * 16


def send(mac: str, address: str) -> None:
    """Sends the packet to every machine of the network in which this host has the address, if it tells one."""
    own = ipaddress.ip_address(address)
    tells_network = isinstance(own, ipaddress.IPv4Address) and not own.is_loopback
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if tells_network:
            sender.bind((address, 0))
        sender.sendto(magic_packet(mac), ("255.255.255.255", PORT))


def watch(url: str, address: str, machines: dict[str, str]) -> None:
    """Asks and sends, without end."""
    while True:
        try:
            with urllib.request.urlopen(url, timeout=ASK_LIMIT_S) as answer:  # noqa: S310 - HAProxy on this host
                wanted = answer.read().decode().split()
            SEEN.touch()
            for name in wanted:
                sys.stderr.write(f"corral: requests wait for {name}: waking it\n")
                send(machines[name], address)
        except (OSError, KeyError) as error:
            sys.stderr.write(f"corral: {error!r}\n")
        time.sleep(POLL_S)


if __name__ == "__main__":
    watch(sys.argv[1], sys.argv[2], dict(word.split("=", 1) for word in sys.argv[3:]))
