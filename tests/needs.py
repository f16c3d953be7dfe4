"""What tests need beyond Python: how to see whether it is there, and what to do when it is not.

A test says `@pytest.mark.needs("haproxy", "redis")`; `tests/conftest.py` leaves it out, or fails it, where that is not
there.
"""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.make_open_webui import is_made

# Daemons lie outside an ordinary user's PATH.
EXTRA_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/opt/homebrew/bin")
POSTGRES_FOLDERS = ("/usr/lib/postgresql", "/usr/local/lib/postgresql", "/opt/homebrew/opt")
ANSWER_DEADLINE_S = 20
OLDEST_AMTOOL = (0, 26)


@dataclass(frozen=True)
class Need:
    """One thing that a test may need."""

    title: str  # completes "12 tests need …"
    remedy: str  # completes "to run them: …"
    why_missing: Callable[[], str | None]  # None when it is there


def find_program(*names: str) -> Path | None:
    """The first of these programs on PATH or where daemons lie; None if there is none."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *EXTRA_FOLDERS])
    found = (shutil.which(name, path=path) for name in names)
    return next((Path(program) for program in found if program), None)


def program(*names: str) -> Path:
    """The path of a program that a test has named among its needs."""
    found = find_program(*names)
    if found is None:
        message = f"{names[0]} is not installed; is it among the test's needs?"
        raise FileNotFoundError(message)
    return found


def postgres_folder() -> Path | None:
    """The folder with initdb and postgres of the newest PostgreSQL; Debian keeps it off PATH."""
    roots = [folder for root in POSTGRES_FOLDERS for folder in Path(root).glob("*/bin")]
    newest_first = sorted((folder for folder in roots if (folder / "initdb").exists()), key=_version_in, reverse=True)
    on_path = shutil.which("initdb")
    return newest_first[0] if newest_first else Path(on_path).parent if on_path else None


def _version_in(folder: Path) -> int:
    return int("".join(filter(str.isdigit, folder.parent.name)) or 0)


def _lacks_program(*names: str) -> Callable[[], str | None]:
    return lambda: None if find_program(*names) else f"{' or '.join(names)} is not on PATH"


def _lacks_postgres() -> str | None:
    return None if postgres_folder() else "initdb is neither on PATH nor under /usr/lib/postgresql"


def _first_complaint(*command: str) -> str | None:
    """The last line a failing command prints; None if it succeeds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_DEADLINE_S, check=False)
    except FileNotFoundError:
        return f"{command[0]} is not on PATH"
    except subprocess.TimeoutExpired:
        return f"{' '.join(command)} gave no answer within {ANSWER_DEADLINE_S} s"
    lines = (done.stderr.strip() or done.stdout.strip() or f"{' '.join(command)} failed").splitlines()
    return None if done.returncode == 0 else lines[-1]


def _lacks_docker_compose() -> str | None:
    return _first_complaint("docker", "compose", "version")


def _lacks_docker_engine() -> str | None:
    return _lacks_docker_compose() or _first_complaint("docker", "version", "--format", "{{.Server.Version}}")


def _lacks_new_amtool() -> str | None:
    """Older ones do not know that an address may stand in a file."""
    found = find_program("amtool")
    if found is None:
        return "amtool is not on PATH"
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False, timeout=ANSWER_DEADLINE_S)
    version = re.search(r"version (\d+)\.(\d+)", done.stdout + done.stderr)
    is_new = version is not None and (int(version[1]), int(version[2])) >= OLDEST_AMTOOL
    return None if is_new else f"{found} is older"


def _lacks_network_namespaces() -> str | None:
    if os.geteuid() != 0:
        return "only root may make them"
    return None if find_program("ip") else "ip is not on PATH"


def _lacks_prisma_engine() -> str | None:
    engine = os.environ.get("PRISMA_QUERY_ENGINE_BINARY", "")
    if not engine:
        return "PRISMA_QUERY_ENGINE_BINARY is not set"
    return None if os.access(engine, os.X_OK) else f"{engine} cannot be run"


NEEDS = {
    "alertmanager": Need(
        "Prometheus's Alertmanager",
        "apt install prometheus-alertmanager",
        _lacks_program("prometheus-alertmanager", "alertmanager"),
    ),
    "amtool": Need(
        "Alertmanager's amtool, 0.26 or newer", "apt install prometheus-alertmanager/sid", _lacks_new_amtool
    ),
    "chromium": Need("Chromium", "apt install chromium", _lacks_program("chromium", "google-chrome")),
    "curl": Need("curl", "apt install curl", _lacks_program("curl")),
    "docker-compose": Need("Docker Compose", "install its plugin, 2.24 or newer", _lacks_docker_compose),
    "docker-engine": Need("a Docker engine", "install and start Docker Engine 25 or newer", _lacks_docker_engine),
    "docker-registry": Need("a Docker registry", "apt install docker-registry", _lacks_program("docker-registry")),
    "haproxy": Need("HAProxy", "apt install haproxy", _lacks_program("haproxy")),
    "mmdebstrap": Need("mmdebstrap", "apt install mmdebstrap", _lacks_program("mmdebstrap")),
    "network-namespaces": Need(
        "network namespaces", "apt install iproute2, and run as root", _lacks_network_namespaces
    ),
    "node-exporter": Need(
        "Prometheus's node-exporter",
        "apt install prometheus-node-exporter",
        _lacks_program("prometheus-node-exporter", "node_exporter"),
    ),
    "open-webui": Need("Open WebUI", "make open-webui", lambda: None if is_made() else "it is not installed, or older"),
    "postgres": Need("PostgreSQL", "apt install postgresql", _lacks_postgres),
    "prisma-engine": Need(
        "Prisma's query engine",
        "run `prisma generate` in .venv and point PRISMA_QUERY_ENGINE_BINARY at the engine",
        _lacks_prisma_engine,
    ),
    "prometheus": Need("Prometheus", "apt install prometheus", _lacks_program("prometheus")),
    "promtool": Need("Prometheus's promtool", "apt install prometheus", _lacks_program("promtool")),
    "redis": Need("Valkey or Redis", "apt install redis-server", _lacks_program("valkey-server", "redis-server")),
    "store-exporters": Need(
        "the exporters of PostgreSQL and Redis",
        "apt install prometheus-postgres-exporter prometheus-redis-exporter",
        lambda: _lacks_program("prometheus-postgres-exporter")() or _lacks_program("prometheus-redis-exporter")(),
    ),
    "sshd": Need("OpenSSH's server", "apt install openssh-server", _lacks_program("sshd")),
    "root": Need("root", "run as root", lambda: None if os.geteuid() == 0 else "the tests run as another user"),
    "shellcheck": Need("shellcheck", "apt install shellcheck", _lacks_program("shellcheck")),
    "systemd": Need("systemd's systemd-analyze", "apt install systemd", _lacks_program("systemd-analyze")),
}


@functools.cache
def why_missing(name: str) -> str | None:
    """Why this need is not met on this machine; None if it is. Looked up once per run."""
    return NEEDS[name].why_missing()
