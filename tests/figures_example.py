"""Figures of a host with something of every kind, for tests and for the catalogue."""

from __future__ import annotations

from datetime import UTC, datetime

from corral.runtime.docker import Container
from corral.verbs.status.figures import HostFigures

RUNNING = Container(
    "1", "box-chat-1", "farm-box", "chat-1", "image", "running", "healthy", restarts=2, memory_mib=100, limit_mib=512
)
EXAMPLE = HostFigures(
    when=1_800_000_000.0,
    is_scheduled=True,
    rendering="0123456789abcdef",
    inventory="fedcba9876543210",
    drift={"rendering": False, "containers": True, "copy": False},
    containers={("chat-1", "box-chat-1"): RUNNING, ("haproxy", "box-haproxy"): None},
    verified={("qwen3", "qwen3.gguf"): True, ("nomic", "nomic.gguf"): False},
    checked={("qwen3", "qwen3.gguf"): 1_799_990_000.0},
    certificates={"/etc/ssl/farm.pem": datetime(2027, 6, 1, tzinfo=UTC), "/etc/ssl/page.pem": None},
    backup=1_799_900_000.0,
)
