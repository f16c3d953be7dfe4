"""The systemd units of a host: start the project at boot, set power limits, write metrics every minute."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from corral.declarations import ASSETS, IS_CHECKOUT
from corral.errors import CorralError
from corral.render.compose import figure_units, metrics_hosts, unit_names
from corral.render.templates import Tree
from corral.render.tree import site_of
from corral.runtime.hosts import CommandError, ComposeHost
from corral.verbs.setup.machine import Look

UNITS_FOLDER = "/etc/systemd/system"
QUOTED = str.maketrans({"\\": "\\\\", '"': '\\"', "%": "%%", "$": "$$"})
WRITE = 'umask 022 && mkdir -p "${1%/*}" && cat >"$1.new" && mv "$1.new" "$1"'


def look_at_units(host: ComposeHost, files: Mapping[str, bytes], folder: str) -> Look:
    """Whether the units are installed as they should be, and enabled."""
    if host.run(["test", "-d", "/run/systemd/system"], check=False).code != 0:
        return Look("done", "this machine does not run systemd; the containers come back by their restart policy")
    enabled = _enabled_units(host)
    names = " and ".join(enabled)
    codes = [host.run(["systemctl", "is-enabled", "--quiet", name], check=False).code for name in enabled]
    if _stale(host, files) or any(codes):
        return Look("todo", f"install {names} in {folder} and enable them")
    return Look("done", f"{names} are installed and enabled")


def install_units(host: ComposeHost, files: Mapping[str, bytes]) -> None:
    """Writes what differs, enables the units, and restarts those that take effect at once."""
    sudo = [] if host.run(["id", "-u"]).out.strip() == "0" else ["sudo", "-n"]
    stale = _stale(host, files)
    changed = {path.rpartition("/")[2] for path in stale}
    power_and_metrics = [name for name in _enabled_units(host) if name != unit_names(host.plan, host.name)[-1]]
    commands = [
        ["daemon-reload"],
        *(["enable", name] for name in _enabled_units(host)),
        *(["restart", name] for name in power_and_metrics if name in changed),
    ]
    try:
        for path, data in stale.items():
            host.run([*sudo, "sh", "-c", WRITE, "sh", path], given=data)
        for command in commands:
            host.run([*sudo, "systemctl", *command])
    except CommandError as error:
        words = "needs root for its units; let this user use sudo without a password, or run setup as root"
        raise CorralError(f"{host.name}: {words}. {error.done.words}" if sudo else str(error)) from None


def unit_files(host: ComposeHost, tree: Tree, units_folder: str) -> dict[str, bytes]:
    """The files of the host's units by path: as rendered, and drop-ins with the paths of this installation."""
    folder = host.run(["sh", "-c", f"cd {shlex.quote(host.folder)} 2>/dev/null && pwd -P || true"]).out.strip()
    names, figures = unit_names(host.plan, host.name), figure_units(host.plan, host.name)
    drop_ins = {names[-1]: f"[Service]\nWorkingDirectory={folder.replace('%', '%%')}\n"}
    if figures:
        drop_ins[figures[0]] = _figures_drop_in(host)
    files = {f"{units_folder}/{name}": tree[f"{host.name}/systemd/{name}"] for name in (*names, *figures)}
    return files | {f"{units_folder}/{name}.d/folder.conf": text.encode() for name, text in drop_ins.items()}


def _stale(host: ComposeHost, files: Mapping[str, bytes]) -> dict[str, bytes]:
    found = {path: host.run(["cat", path], check=False).out for path in files}
    for path, text in found.items():
        if site_of(text) not in ("", host.plan.inventory.name):
            words = f"{host.name}: {path} belongs to the site {site_of(text)}"
            raise CorralError(f"{words}; set container_prefix in one of the inventories, or remove the unit")
    return {path: data for path, data in files.items() if found[path].encode() != data}


def _enabled_units(host: ComposeHost) -> list[str]:
    """What systemd starts at boot; the timer starts the service that writes metrics."""
    return [*unit_names(host.plan, host.name), *figure_units(host.plan, host.name)[1:]]


def _figures_drop_in(host: ComposeHost) -> str:
    """User, kit and inventory of the timer that writes metrics; only on this machine, which has the kit."""
    paths = ["--inventory", str(Path(host.plan.source_file).resolve()), "--out", str(host.out.resolve())]
    hosts = [word for name in metrics_hosts(host.plan, host.name) for word in ("--host", name)]
    kit = [str(ASSETS / "generate.py")] if IS_CHECKOUT else ["-m", "corral"]
    command = [sys.executable, *kit, "figures", "--scheduled", *paths, *hosts]
    user = host.run(["id", "-un"]).out.strip()
    return f"[Service]\nUser={user}\nExecStart=\nExecStart={' '.join(map(_systemd_word, command))}\n"


def _systemd_word(word: str) -> str:
    """A word of a unit's command line, quoted so that systemd expands nothing in it."""
    return f'"{word.translate(QUOTED)}"'
